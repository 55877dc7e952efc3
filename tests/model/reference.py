"""An independent decoder in float64 NumPy: the papers' equations in plain loops over rows, layers, heads and queries.

Slow and short on purpose; nothing here comes from `jaxllm.model` but the names of settings and weights.
"""

import math

import numpy as np


def forward(params, config, tokens, positions, segments):
    """Logits `[B, T, vocab]`."""
    return np.stack([_row(params, config, *row) for row in zip(tokens, positions, segments, strict=True)])


def _row(params, config, tokens, positions, segments):
    x = params["embed"][tokens] * (config.embed_scale or 1.0)
    if config.positions == "learned":
        x = x + params["positions"][positions]
    if config.positions == "sinusoidal":
        x = x + _sinusoidal(positions, config.embed)
    for spec, w in layers(params, config):
        h = x if config.norm_placement == "post" else norm(config, w["attn_norm"], x)
        h = attend(config, spec.attn, w["attn"], h, positions, segments)
        x = x + (h if config.norm_placement == "pre" else norm(config, w["attn_post_norm"], h))
        h = x if config.norm_placement == "post" else norm(config, w["mlp_norm"], x)
        h = feed(spec.mlp, w["mlp"], h) if spec.mlp else experts(spec.moe, w["moe"], h, segments > 0)
        x = x + (h if config.norm_placement == "pre" else norm(config, w["mlp_post_norm"], h))
    head = params["embed"] if config.tied else params["head"]
    logits = norm(config, params["norm"], x) @ head[: config.vocab].T
    if config.logit_softcap:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return logits


def layers(params, config):
    """`(spec, weights)` of each layer in order: the prefix, whole periods of the pattern, the remainder."""
    for i, spec in enumerate(config.prefix):
        yield spec, params["prefix"][str(i)]
    left = config.layers - len(config.prefix)
    for n in range(left):
        period, slot = divmod(n, len(config.pattern))
        if period < left // len(config.pattern):
            yield config.pattern[slot], _at(params["layers"][str(slot)], period)
        else:
            yield config.pattern[slot], params["suffix"][str(slot)]


def _at(stacked, i):
    return {key: _at(value, i) if isinstance(value, dict) else value[i] for key, value in stacked.items()}


def norm(config, w, x):
    if config.norm != "layer":
        return rms(config, w["scale"], x, config.norm_eps)
    mean, var = np.mean(x, -1, keepdims=True), np.var(x, -1, keepdims=True)
    return (x - mean) / np.sqrt(var + config.norm_eps) * w["scale"] + w["bias"]


def rms(config, scale, x, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * (scale + (config.norm == "rms_unit_offset"))


def _sinusoidal(positions, embed):
    out = np.zeros((len(positions), embed))
    for t, position in enumerate(positions):
        for i in range(embed // 2):
            angle = position / 10_000 ** (2 * i / embed)
            out[t, i], out[t, embed // 2 + i] = math.sin(angle), math.cos(angle)
    return out


def attend(config, attn, w, x, positions, segments):
    T, N, K = len(x), attn.heads, attn.kv_heads or attn.heads
    q, k, v = (latent_project if attn.latent else project)(config, attn, w, x, positions)  # each [heads, T, dim]
    H, out = q.shape[-1], np.zeros((T, config.embed))
    for n in range(N):
        for t in range(T):
            seen = [s for s in range(T) if segments[s] == segments[t] and positions[s] <= positions[t]]
            seen = [s for s in seen if attn.window is None or positions[t] - positions[s] < attn.window]
            logits = np.array([q[n, t] @ k[n * K // N, s] for s in seen]) * (attn.scale or H**-0.5)
            if attn.softcap:
                logits = attn.softcap * np.tanh(logits / attn.softcap)
            if attn.alibi:
                logits = logits - slope(n, N) * np.array([positions[t] - positions[s] for s in seen])
            if attn.sinks:
                logits = np.append(logits, w["sinks"][n])
            p = np.exp(logits - logits.max())
            p = p / p.sum()
            out[t] += sum(p[i] * v[n * K // N, s] for i, s in enumerate(seen)) @ w["o"][n]
    return out + w["o_bias"] if attn.out_bias else out


def project(config, attn, w, x, positions):
    q, k, v = (np.stack([x @ w[name][:, n] for n in range(w[name].shape[1])]) for name in "qkv")
    if attn.qkv_bias:
        q, k, v = q + w["q_bias"][:, None], k + w["k_bias"][:, None], v + w["v_bias"][:, None]
    if attn.qk_norm:
        q, k = (_qk_norm(config, attn, y, w[name]) for y, name in ((q, "q_norm"), (k, "k_norm")))
    if attn.rope:
        q, k = (np.stack([_turn(attn.rope, y, positions) for y in heads]) for heads in (q, k))
    return q, k, v


def latent_project(config, attn, w, x, positions):
    """DeepSeek-V2, appendix C, equations 37 to 47."""
    turn = lambda y: _turn(attn.rope, y, positions) if attn.rope else y  # noqa: E731
    eps, heads, H = attn.latent.norm_eps, range(attn.heads), attn.head or config.embed // attn.heads
    from_q, up = (x, w["q"]) if attn.latent.q_rank is None else (x @ w["q_down"], w.get("q_up"))
    if attn.latent.q_rank is not None:
        from_q = rms(config, w["q_norm"], from_q, eps)
    c, shared = rms(config, w["kv_norm"], x @ w["kv_down"], eps), turn(x @ w["k_rope"])
    q = [from_q @ up[:, n] for n in heads]
    q = [np.concatenate([y[:, :H], turn(y[:, H:])], axis=1) for y in q]
    k = [np.concatenate([c @ w["k_up"][:, n], shared], axis=1) for n in heads]
    return np.stack(q), np.stack(k), np.stack([c @ w["v_up"][:, n] for n in heads])


def _qk_norm(config, attn, y, scale):
    if attn.qk_norm == "head":
        return rms(config, scale, y, config.norm_eps)
    y = np.concatenate(list(y), axis=-1)  # all heads side by side
    return np.stack(np.split(rms(config, scale.ravel(), y, config.norm_eps), len(scale), axis=-1))


def slope(n, heads):
    """ALiBi: 2^(-8/N) to the power of head 1, 2, ...; other counts interleave the next power of two."""
    power = 2 ** int(math.log2(heads))
    return 2 ** (-8 * (n + 1) / power) if n < power else 2 ** (-8 * (2 * (n - power) + 1) / (2 * power))


def _turn(rope, y, positions):
    """Dimensions i and i + R are the real and imaginary parts of a number that turns with the position."""
    half = round(y.shape[1] * rope.fraction) // 2
    turning = y[:, :half] + 1j * y[:, half : 2 * half]
    document = np.cumsum(np.asarray(positions) == 0)  # one begins wherever positions do
    longest = [max(np.asarray(positions)[document == d]) + 1 for d in document]
    angles = [[angle_per_position(rope, i, 2 * half, n) for i in range(half)] for n in longest]
    turning = turning * np.exp(1j * np.asarray(positions)[:, None] * angles) * temperature(rope)
    return np.concatenate([turning.real, turning.imag, y[:, 2 * half :]], axis=1)


def temperature(rope):
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "longrope":
        return math.sqrt(1 + math.log(rope.factor, rope.original_context))
    return 0.1 * math.log(rope.factor) + 1


def angle_per_position(rope, i, dims, longest):
    base, s, L = rope.base, rope.factor, rope.original_context
    if rope.scaling == "ntk":
        base = base * s ** (dims / (dims - 2))
    if rope.scaling == "dynamic_ntk" and longest > L:
        base = base * (s * longest / L - (s - 1)) ** (dims / (dims - 2))
    angle = base ** (-2 * i / dims)
    if rope.scaling == "linear":
        return angle / s
    if rope.scaling == "yarn":
        turns_at = lambda turns: dims * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
        low, high = turns_at(rope.beta_fast), turns_at(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        interpolated = min(max((i - low) / max(high - low, 0.001), 0), 1)
        return angle * (1 - interpolated) + angle / s * interpolated
    if rope.scaling == "longrope":
        return angle / (rope.long_factors if longest > L else rope.short_factors)[i]
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / angle
        if wavelength < L / rope.high_freq_factor:
            return angle
        if wavelength > L / rope.low_freq_factor:
            return angle / s
        smooth = (L / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * angle / s + smooth * angle
    return angle


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


GATED = {"swiglu": lambda x: x / (1 + np.exp(-x)), "geglu": _gelu, "geglu_tanh": _gelu_tanh}
PLAIN = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu2": lambda x: np.maximum(x, 0) ** 2}


def feed(mlp, w, x):
    def linear(name, x):
        return x @ w[name] + (w[f"{name}_bias"] if getattr(mlp, "bias", False) else 0)

    if mlp.activation == "swiglu_clamped":
        gate, up = np.minimum(linear("gate", x), 7), np.clip(linear("up", x), -7, 7)
        return linear("down", gate / (1 + np.exp(-1.702 * gate)) * (up + 1))
    if mlp.activation in GATED:
        return linear("down", GATED[mlp.activation](linear("gate", x)) * linear("up", x))
    return linear("down", PLAIN[mlp.activation](linear("up", x)))


def experts(moe, w, x, real):
    """Each token passes its best experts; with a capacity, first choices go before second ones, early tokens first."""
    logits = x @ w["router"] + (w["router_bias"] if moe.router_bias else 0)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores = scores / scores.sum(-1, keepdims=True) if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
    ranking = scores + w["bias"] if moe.balance == "bias" else scores
    if moe.groups > 1:
        ranking = np.stack([within_groups(moe, row) for row in ranking])
    best = np.argsort(-ranking, axis=-1, kind="stable")[:, : moe.experts_per_token]
    out, taken = np.zeros_like(x), np.zeros(moe.experts)
    limit = math.inf
    if moe.capacity_factor is not None:
        limit = max(1, math.ceil(len(x) * moe.experts_per_token / moe.experts * moe.capacity_factor))
    for choice in range(moe.experts_per_token):
        for t in np.flatnonzero(real):
            e = best[t, choice]
            taken[e] += 1
            if taken[e] <= limit:
                gate = scores[t, e] / (scores[t, best[t]].sum() if moe.renormalize else 1) * moe.scale
                part = {name: w[name][e] for name in w if name.removesuffix("_bias") in ("gate", "up", "down")}
                out[t] += gate * feed(moe, part, x[t : t + 1])[0]
    return out + feed(moe, w["shared"], x) if moe.shared_ffw else out


def within_groups(moe, ranking):
    """DeepSeek-V2, section 2.2.2: the experts of a token's best groups only; V3 ranks groups by their best two."""
    groups = np.split(ranking, moe.groups)
    worth = [sum(sorted(group)[-(1 if moe.group_score == "max" else 2) :]) for group in groups]
    best = np.argsort(worth)[-moe.groups_per_token :]
    return np.concatenate([group if i in best else np.full_like(group, -np.inf) for i, group in enumerate(groups)])
