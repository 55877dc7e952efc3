"""Random tensors for the small models of `tiny.py`, under the names and in the shapes of published files."""

import copy
import math

import numpy as np

from jaxllm.parity.tiny import VARIANTS

#: Standard deviation of what a matrix makes of inputs of size one, by a part of its name; 1 elsewhere.
GAINS = {
    "q_proj": 2.0,
    "k_proj": 2.0,
    "qkv_proj": 2.0,
    "q_b_proj": 2.0,
    "c_attn": 1.6,
    "gate.weight": 3.0,
    "router": 3.0,
    "experts.gate_up_proj": 5.0,  # past the clamp of gpt-oss at 7
    "experts.down_proj": 0.2,
}


def random_model(variant: str, seed: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a variant: float32, and the packed bytes of experts where it has MXFP4."""
    config = copy.deepcopy(VARIANTS[variant])
    rng = np.random.default_rng(seed)
    tensors = {name: _random(rng, name, shape, config) for name, shape in shapes(config).items()}
    return config, tensors


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """`{name: shape}` of all tensors of a model."""
    if c["model_type"] == "gpt2":
        return _gpt2(c)
    D, V = c["hidden_size"], c["vocab_size"]
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for i in range(c["num_hidden_layers"]):
        parts = _norms(c) | _attention(c) | _feed(c, i)
        out |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    return out


def _random(rng, name: str, shape, c: dict) -> np.ndarray:
    if shape[0] == "bytes":
        # Exponents near 2^-3 keep the values, up to 6, at the size of the other weights.
        return rng.integers(*((0, 256) if name.endswith("blocks") else (122, 126)), shape[1:], np.uint8)
    x = rng.standard_normal(shape)
    if name.endswith("norm.weight") or ".ln_" in name or "ln_f" in name:
        x = 0.3 * x + (name.endswith(".weight") and not c["model_type"].startswith("gemma"))
        x = x + 0.8 * name.endswith(("q_norm.weight", "k_norm.weight"))
    elif name.endswith(("bias", "sinks")):
        x = 0.6 * x
    elif "embed" not in name and "wte" not in name:
        inside = shape[-2] if _stored_transposed(name) else shape[-1]
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        x = gain * x / math.sqrt(inside)
    elif c["model_type"].startswith("gemma"):
        x = x / math.sqrt(c["hidden_size"])
    return x.astype(np.float32)


def _stored_transposed(name: str) -> bool:
    return ".c_" in name or name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def _gpt2(c: dict) -> dict:
    D, F = c["n_embd"], c["n_inner"]
    out = {"wte.weight": (c["vocab_size"], D), "wpe.weight": (c["n_positions"], D)}
    for i in range(c["n_layer"]):
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in linears.items():
            out |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        out |= {f"h.{i}.{norm}.{part}": (D,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    out |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    return {f"transformer.{name}": shape for name, shape in out.items()}


def _norms(c: dict) -> dict:
    names = ["input_layernorm", "post_attention_layernorm"]
    if c["model_type"] == "olmo2":
        names = ["post_attention_layernorm", "post_feedforward_layernorm"]
    if c["model_type"] in ("gemma2", "gemma3_text"):
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return {f"{name}.weight": (c["hidden_size"],) for name in names}


def _linear(name: str, out: int, into: int, bias: bool = False) -> dict:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _attention(c: dict) -> dict:
    D, N, kind = c["hidden_size"], c["num_attention_heads"], c["model_type"]
    if kind.startswith("deepseek"):
        return _latent(c, D, N)
    H, K = c.get("head_dim", D // N), c.get("num_key_value_heads", N)
    bias = c.get("attention_bias", kind in ("qwen2", "gpt_oss"))
    if kind == "phi3":
        return _linear("self_attn.qkv_proj", (N + 2 * K) * H, D) | _linear("self_attn.o_proj", D, N * H)
    out = _linear("self_attn.q_proj", N * H, D, bias) | _linear("self_attn.o_proj", D, N * H, bias and kind != "qwen2")
    out |= _linear("self_attn.k_proj", K * H, D, bias) | _linear("self_attn.v_proj", K * H, D, bias)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        out |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
    if kind in ("olmo2", "olmoe"):
        out |= {"self_attn.q_norm.weight": (N * H,), "self_attn.k_norm.weight": (K * H,)}
    return out | ({"self_attn.sinks": (N,)} if kind == "gpt_oss" else {})


def _latent(c: dict, D: int, N: int) -> dict:
    rank, R = c["kv_lora_rank"], c["q_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    out = {"kv_a_proj_with_mqa.weight": (rank + rope, D), "kv_a_layernorm.weight": (rank,)}
    out |= {"kv_b_proj.weight": (N * (nope + value), rank), "o_proj.weight": (D, N * value)}
    if R is None:
        out |= {"q_proj.weight": (N * (nope + rope), D)}
    else:
        out |= {"q_a_proj.weight": (R, D), "q_a_layernorm.weight": (R,), "q_b_proj.weight": (N * (nope + rope), R)}
    return {f"self_attn.{name}": shape for name, shape in out.items()}


def _gated(name: str, D: int, F: int, bias: bool = False, names=("gate_proj", "up_proj", "down_proj")) -> dict:
    gate, up, down = (f"{name}.{part}" for part in names)
    return _linear(gate, F, D, bias) | _linear(up, F, D, bias) | _linear(down, D, F, bias)


def _feed(c: dict, layer: int) -> dict:
    D, F, kind = c["hidden_size"], c["intermediate_size"], c["model_type"]
    if kind == "phi3":
        return _linear("mlp.gate_up_proj", 2 * F, D) | _linear("mlp.down_proj", D, F)
    if kind == "mixtral":
        return _experts("block_sparse_moe", c["num_local_experts"], D, F, ("w1", "w3", "w2"))
    if kind == "olmoe":
        return _experts("mlp", c["num_experts"], D, F)
    if kind == "qwen3_moe" and (layer + 1) % c["decoder_sparse_step"] == 0 and layer not in c["mlp_only_layers"]:
        return _experts("mlp", c["num_experts"], D, c["moe_intermediate_size"])
    if kind == "gpt_oss":
        return _gpt_oss(c, D, F)
    if kind.startswith("deepseek") and layer >= c["first_k_dense_replace"]:
        E, F = c["n_routed_experts"], c["moe_intermediate_size"]
        out = _experts("mlp", E, D, F) | _gated("mlp.shared_experts", D, F * c["n_shared_experts"])
        return out | ({"mlp.gate.e_score_correction_bias": (E,)} if kind == "deepseek_v3" else {})
    return _gated("mlp", D, F, c.get("mlp_bias", False))


def _experts(name: str, count: int, D: int, F: int, names=("gate_proj", "up_proj", "down_proj")) -> dict:
    out = {f"{name}.gate.weight": (count, D)}
    for e in range(count):
        out |= _gated(f"{name}.experts.{e}", D, F, names=names)
    return out


def _gpt_oss(c: dict, D: int, F: int) -> dict:
    E = c["num_local_experts"]
    out = _linear("mlp.router", E, D, True)
    for name, into, wide in (("gate_up_proj", D, 2 * F), ("down_proj", F, D)):
        out[f"mlp.experts.{name}_bias"] = (E, wide)
        if "quantization_config" in c:
            out[f"mlp.experts.{name}_blocks"] = ("bytes", E, wide, into // 32, 16)
            out[f"mlp.experts.{name}_scales"] = ("bytes", E, wide, into // 32)
        else:
            out[f"mlp.experts.{name}"] = (E, into, wide)
    return out
