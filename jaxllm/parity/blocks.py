"""The attention and feed-forward blocks of the published architectures, wired from config.json's keys.

`c` config.json with its defaults filled in, `traits` what no key says, `w` the tensors of the block.
T positions, N query heads, K kv heads, H head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.parity import rope
from jaxllm.parity.layers import (
    Weights,
    activation,
    attend,
    choose,
    clamped_swiglu,
    gated,
    mixture,
    mxfp4,
    rms_norm,
    sigmoid,
    softmax,
    within_groups,
)


@dataclass(frozen=True)
class Traits:
    """What an architecture does that no key of its config.json says."""

    attention: Callable = None
    feed: Callable = None
    #: Where the norms of a layer stand: before each block, after it (OLMo 2), or both (Gemma 2).
    norms: str = "pre"
    #: Gemma: norm weights are stored less one, embeddings are scaled by sqrt(embed).
    gemma: bool = False
    #: Biases of (q, k and v, o); None: `attention_bias` says.
    bias: tuple[bool, bool] | None = None
    #: Norm of queries and keys: over each "head" or over the "width" of all heads.
    qk_norm: str | None = None
    sinks: bool = False
    #: Whether a layer has the window, where `layer_types` does not say.
    windowed: Callable[[dict, int], bool] | None = None
    #: What the tensors of the feed-forward block are called.
    feed_name: str = "mlp"


def layer_type(c: dict, traits: Traits, layer: int) -> str:
    """`sliding_attention` or `full_attention`."""
    if traits.windowed is None:
        return "full_attention"
    if kinds := c.get("layer_types"):
        if kinds[layer] not in ("sliding_attention", "full_attention"):
            raise SettingsError(f"config.json: layer_types[{layer}]={kinds[layer]!r} is not known")
        return kinds[layer]
    return "sliding_attention" if traits.windowed(c, layer) else "full_attention"


def window(c: dict, traits: Traits, layer: int) -> int | None:
    """Keys that a query of the layer sees, itself included; None for all."""
    used = c.get("use_sliding_window", True) and layer_type(c, traits, layer) == "sliding_attention"
    return c["sliding_window"] if used else None


def rotates(c: dict, layer: int) -> bool:
    """SmolLM3 leaves rope out of every fourth layer (NoPE, arXiv 2501.18795)."""
    if "no_rope_layer_interval" not in c:
        return True
    if (listed := c["no_rope_layers"]) is not None:
        return bool(listed[layer])
    return (layer + 1) % c["no_rope_layer_interval"] != 0


def scale_of(traits: Traits, weight):
    """The factor that a norm's stored weight means."""
    return 1 + weight if traits.gemma else weight


def grouped_query(c: dict, traits: Traits, w: Weights, x, layer: int, positions):
    """Rotary attention with shared keys and values (arXiv 2305.13245); all architectures but DeepSeek's."""
    T, N, K, H = len(x), c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    in_bias, out_bias = traits.bias or (c["attention_bias"], c["attention_bias"])
    q, k, v = (w.linear(f"{name}_proj", x, in_bias) for name in "qkv")
    if traits.qk_norm == "width":
        q, k = (rms_norm(y, w(f"{n}_norm.weight"), c["rms_norm_eps"]) for y, n in ((q, "q"), (k, "k")))
    if (clip := c.get("clip_qkv")) is not None:
        q, k, v = (np.clip(y, -clip, clip) for y in (q, k, v))
    q, k, v = q.reshape(T, N, H), k.reshape(T, K, H), v.reshape(T, K, H)
    if traits.qk_norm == "head":
        q = rms_norm(q, scale_of(traits, w("q_norm.weight")), c["rms_norm_eps"])
        k = rms_norm(k, scale_of(traits, w("k_norm.weight")), c["rms_norm_eps"])
    if rotates(c, layer):
        own = layer_type(c, traits, layer) if "rope_local_base_freq" in c else None
        turn = rope.angles(rope.parameters(c, own), H, positions)
        q, k = rope.rotate(q, *turn), rope.rotate(k, *turn)
    strength = c.get("query_pre_attn_scalar", H) ** -0.5
    sinks = w("sinks") if traits.sinks else None
    out = attend(q, k, v, strength, window(c, traits, layer), c.get("attn_logit_softcapping"), sinks)
    return w.linear("o_proj", out.reshape(T, N * H), out_bias)


class Fused:
    """Phi-3's two fused projections (arXiv 2404.14219) under the names of their parts."""

    def __init__(self, c: dict, w: Weights):
        N, K, H = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.w, self.cuts = w, {"qkv_proj": [N * H, (N + K) * H], "gate_up_proj": 2}
        self.parts = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}

    def linear(self, name: str, x, bias: bool = False):
        if name not in self.parts:
            return self.w.linear(name, x, bias)
        whole = "qkv_proj" if name[0] in "qkv" else "gate_up_proj"
        return np.split(self.w.linear(whole, x), self.cuts[whole], -1)[self.parts[name]]


def phi3_attention(c, traits, w, x, layer, positions):
    return grouped_query(c, traits, Fused(c, w), x, layer, positions)


def latent(c: dict, traits: Traits, w: Weights, x, layer: int, positions):
    """Multi-head latent attention, not absorbed (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19 and 37 to 47).

    The norms of the latents have 1e-6 as their epsilon, whatever `rms_norm_eps` says, as the published code has it.
    """
    T, N = len(x), c["num_attention_heads"]
    nope, turning, value, rank = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    bias = c["attention_bias"]
    if c["q_lora_rank"] is None:
        q = w.linear("q_proj", x)
    else:
        q = w.linear("q_b_proj", rms_norm(w.linear("q_a_proj", x, bias), w("q_a_layernorm.weight"), 1e-6))
    q = q.reshape(T, N, nope + turning)
    latent, k_rope = np.split(w.linear("kv_a_proj_with_mqa", x, bias), [rank], -1)
    kv = w.linear("kv_b_proj", rms_norm(latent, w("kv_a_layernorm.weight"), 1e-6)).reshape(T, N, nope + value)

    spec = rope.parameters(c)
    turn = rope.angles(spec, turning, positions)
    interleaved = c.get("rope_interleave", True)
    q_rope = rope.rotate(q[..., nope:], *turn, interleaved)
    k_rope = np.repeat(rope.rotate(k_rope[:, None], *turn, interleaved), N, 1)
    q = np.concatenate([q[..., :nope], q_rope], -1)
    k = np.concatenate([kv[..., :nope], k_rope], -1)
    strength = (nope + turning) ** -0.5
    if spec.get("mscale_all_dim"):
        strength *= rope.mscale(spec["factor"], spec["mscale_all_dim"]) ** 2
    out = attend(q, k, kv[..., nope:], strength)
    return w.linear("o_proj", out.reshape(T, N * value), bias)


def dense(c: dict, w: Weights, x, layer: int):
    """Gated feed-forward."""
    return gated(w, x, activation(c["hidden_act"]), c["mlp_bias"])


def phi3_dense(c, w, x, layer):
    return gated(Fused(c, w), x, activation(c["hidden_act"]))


def softmax_mixture(c: dict, w: Weights, x, layer: int):
    """Qwen3-MoE (arXiv 2505.09388, section 2) and OLMoE (arXiv 2409.02060, section 2): softmax, then the largest k."""
    sparse = (layer + 1) % c.get("decoder_sparse_step", 1) == 0
    if not sparse or layer in (c.get("mlp_only_layers") or ()):
        return dense(c, w, x, layer)
    act = activation(c["hidden_act"])
    experts, weights = choose(softmax(w.linear("gate", x)), c["num_experts_per_tok"], c["norm_topk_prob"])
    return mixture(x, experts, weights, lambda e, y: gated(w.at(f"experts.{e}"), y, act))


def mixtral_mixture(c: dict, w: Weights, x, layer: int):
    """Mixtral (arXiv 2401.04088, section 2.1): softmax over the logits of the k chosen experts."""
    act = activation(c["hidden_act"])
    experts, weights = choose(softmax(w.linear("gate", x)), c["num_experts_per_tok"], True)
    return mixture(x, experts, weights, lambda e, y: gated(w.at(f"experts.{e}"), y, act, names=("w1", "w3", "w2")))


def gpt_oss_mixture(c: dict, w: Weights, x, layer: int):
    """gpt-oss: Mixtral's with biases and a clamped SwiGLU; experts are stacked [E, in, out], as MXFP4 [E, out, in]."""
    experts, weights = choose(softmax(w.linear("router", x, True)), c["num_experts_per_tok"], True)
    w = w.at("experts")
    packed = (c["quantization_config"] or {}).get("quant_method") == "mxfp4"

    def linear(name, e, y):
        if packed:
            matrix = mxfp4(w.get(f"{name}_blocks")[e], w.get(f"{name}_scales")[e]).T
        else:
            matrix = w.get(name)[e].astype(np.float64)
        return y @ matrix + w.get(f"{name}_bias")[e].astype(np.float64)

    def expert(e, y):
        return linear(
            "down_proj", e, clamped_swiglu(linear("gate_up_proj", e, y), c["swiglu_alpha"], c["swiglu_limit"])
        )

    return mixture(x, experts, weights, expert)


def deepseek_mixture(c: dict, w: Weights, x, layer: int):
    """DeepSeek-V2 and V3: shared experts, and routed ones chosen within a few groups (see `within_groups`).

    V2 (`greedy`, `group_limited_greedy`) scores by softmax; V3 (`noaux_tc`) by sigmoid, and its bias chooses but does
    not weigh (arXiv 2412.19437, equations 12 to 16).
    """
    act = activation(c["hidden_act"])
    if layer < c["first_k_dense_replace"]:
        return gated(w, x, act)
    k, logits = c["num_experts_per_tok"], w.linear("gate", x)
    if c["topk_method"] == "noaux_tc":
        scores = sigmoid(logits)
        ranking = within_groups(scores + w("gate.e_score_correction_bias"), c["n_group"], c["topk_group"], 2, -np.inf)
        experts = choose(ranking, k, False)[0]
        weights = np.take_along_axis(scores, experts, -1)
        if c["norm_topk_prob"]:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    else:
        scores = softmax(logits)
        if c["topk_method"] == "group_limited_greedy":
            scores = within_groups(scores, c["n_group"], c["topk_group"], 1, 0.0)
        experts, weights = choose(scores, k, False)
    weights = weights * c["routed_scaling_factor"]
    out = mixture(x, experts, weights, lambda e, y: gated(w.at(f"experts.{e}"), y, act))
    return out + gated(w.at("shared_experts"), x, act) if c["n_shared_experts"] else out
