"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its scalings in float64, read from config.json's keys.

`t` position, `T` positions, `R` rotated dimensions. Both forms of config.json are read: `rope_theta` with
`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
"""

import math

import numpy as np

from jaxllm.errors import SettingsError, nearest

# The keys that a rope type needs, and those that it may have. Others are refused: they could change the function.
KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
        + ("mscale", "mscale_all_dim", "truncate"),
    ),
}
ALIASES = {"su": "longrope"}  # the first Phi-3 files


def parameters(c: dict, layer_type: str | None = None) -> dict:
    """The rope of a layer: `type`, `theta`, `partial`, `context` (before scaling) and the keys of its type.

    `layer_type` is given where layer types have ropes of their own (Gemma 3: arXiv 2503.19786, section 2).
    Raises SettingsError for a rope type, or a key of one, that is not known here.
    """
    new, old, theta = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}, c["rope_theta"]
    rope = dict(old or new)
    if layer_type:
        rope = dict(new.get(layer_type) or {}) | (old if layer_type == "full_attention" else {})
        theta = theta if layer_type == "full_attention" else c["rope_local_base_freq"]
    short, long = rope.pop("type", None), rope.pop("rope_type", None)
    kind = ALIASES.get(long or short, long or short) or "default"
    if kind not in KEYS:
        raise SettingsError(f"config.json: rope type {kind!r} is not known{nearest(kind, KEYS)}")
    partial = rope.pop("partial_rotary_factor", c.get("partial_rotary_factor"))
    theta = rope.pop("rope_theta", theta)
    needed, optional = KEYS[kind]
    if wrong := set(needed) - set(rope) | set(rope) - {*needed, *optional}:
        raise SettingsError(f"config.json: rope of type {kind!r}: missing or unknown keys {sorted(wrong)}")
    if partial not in (None, 1.0) and "partial_rotary_factor" not in c:
        raise SettingsError(f"config.json: partial_rotary_factor={partial} is not known for this architecture")
    longest = c["max_position_embeddings"]
    context = c.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    context = context or (round(longest / rope["factor"]) if kind == "linear" else longest)
    return rope | {
        "type": kind,
        "theta": theta,
        "partial": 1.0 if partial is None else partial,
        "context": context,
        "longest": longest,
    }


def angles(rope: dict, head: int, positions_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(cos, sin)`, each `[T, R / 2]`, already times the attention factor of the scaling."""
    dims = int(head * rope["partial"])
    freq, factor = SCALINGS[rope["type"]](rope, dims, int(positions_T.max()) + 1)
    angle = positions_T[:, None] * freq
    return np.cos(angle) * factor, np.sin(angle) * factor


def rotate(x_THD: np.ndarray, cos, sin, interleaved: bool = False) -> np.ndarray:
    """Turns pairs of the first R dimensions of `[T, heads, head]`; the rest passes.

    A pair is dimensions (i, i + R/2), or (2i, 2i + 1) where `interleaved`.
    """
    dims = 2 * cos.shape[-1]
    cos, sin, turning = cos[:, None], sin[:, None], x_THD[..., :dims]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else np.split(turning, 2, -1)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return np.concatenate([turned, x_THD[..., dims:]], -1)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature 0.1 m ln(s) + 1 (arXiv 2309.00071, equation 22; m as in DeepSeek-V2's code)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _frequencies(theta: float, dims: int) -> np.ndarray:
    return theta ** (-np.arange(0, dims, 2) / dims)


def _default(rope, dims, length):
    return _frequencies(rope["theta"], dims), 1.0


def _linear(rope, dims, length):
    """Position interpolation (arXiv 2306.15595)."""
    return _frequencies(rope["theta"], dims) / rope["factor"], 1.0


def _dynamic(rope, dims, length):
    """NTK-aware base that grows with the sequence (arXiv 2309.00071, section 3.3)."""
    s, longest = rope["factor"], rope["longest"]
    stretch = s * max(length, longest) / longest - (s - 1)
    return _frequencies(rope["theta"] * stretch ** (dims / (dims - 2)), dims), 1.0


def _llama3(rope, dims, length):
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended (arXiv 2407.21783)."""
    freq = _frequencies(rope["theta"], dims)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["context"] * freq / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return freq * kept + freq / rope["factor"] * (1 - kept), 1.0


def _longrope(rope, dims, length):
    """LongRoPE (arXiv 2402.13753): one divisor for each dimension, another set beyond the original context."""
    context = rope["context"]
    factor = rope.get("factor") or rope["longest"] / context
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    divisors = np.asarray(rope["long_factor" if length > context else "short_factor"], np.float64)
    return _frequencies(rope["theta"], dims) / divisors, attention


def _yarn(rope, dims, length):
    """YaRN (arXiv 2309.00071, equations 17 to 22): dimensions that turn often are kept, slow ones interpolated."""
    context, base = rope["context"], rope["theta"]
    factor = rope["factor"]

    def dimension(turns):
        return dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    interpolated = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    freq = _frequencies(base, dims)
    attention = rope.get("attention_factor")
    if attention is None:
        m, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = mscale(factor, m) / mscale(factor, all_dims) if m and all_dims else mscale(factor)
    return freq * (1 - interpolated) + freq / factor * interpolated, attention


SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
