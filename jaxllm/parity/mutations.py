"""What each key of config.json means for the function: keys that change it, with another value; shapes; the rest.

A reader of config.json that ignored a key of the first kind would compute another function than the published one
after the key is changed. So parity must fail when one side has the original config and the other a mutated one.
"""

import copy
from collections.abc import Iterator

from jaxllm.parity.tiny import GLOBAL, LOCAL, VARIANTS

#: Keys that do not change the function.
INERT = {"model_type", "architectures", "dtype", "pad_token_id", "bos_token_id", "eos_token_id", "quantization_config"}
#: Keys that a reader refuses when they are wrong, since then the tensors do not have the shapes that they say.
SHAPES = {"vocab_size", "intermediate_size", "n_inner", "n_positions", "hidden_size", "n_embd", "head_dim"}
SHAPES |= {"num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"}
SHAPES |= {"n_shared_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}

#: Another value for each key that changes the function, given the value that it has.
CHANGED = {
    "num_hidden_layers": lambda v: v - 1,
    "n_layer": lambda v: v - 1,
    "num_attention_heads": lambda v: v // 2,
    "n_head": lambda v: v // 2,
    "rms_norm_eps": lambda v: 0.3,
    "layer_norm_epsilon": lambda v: 0.3,
    "hidden_act": lambda v: "gelu" if v == "silu" else "silu",
    "hidden_activation": lambda v: "silu",
    "activation_function": lambda v: "relu",
    "tie_word_embeddings": lambda v: not v,
    "attention_bias": lambda v: not v,
    "mlp_bias": lambda v: not v,
    "scale_attn_weights": lambda v: not v,
    "scale_attn_by_inverse_layer_idx": lambda v: not v,
    "max_position_embeddings": lambda v: v * 4,
    "original_max_position_embeddings": lambda v: v * 2,
    "sliding_window": lambda v: 3,
    "use_sliding_window": lambda v: not v,
    "max_window_layers": lambda v: v + 1,
    "layer_types": lambda v: [GLOBAL if kind == LOCAL else LOCAL for kind in v],
    "no_rope_layer_interval": lambda v: v + 1,
    "sliding_window_pattern": lambda v: v - 1,
    "rope_local_base_freq": lambda v: v / 30,
    "no_rope_layers": lambda v: [1 - rotates for rotates in v],
    "query_pre_attn_scalar": lambda v: v // 4,
    "attn_logit_softcapping": lambda v: v / 2,
    "final_logit_softcapping": lambda v: v / 2,
    "num_experts_per_tok": lambda v: v - 1,
    "norm_topk_prob": lambda v: not v,
    "decoder_sparse_step": lambda v: v - 1,
    "mlp_only_layers": lambda v: [],
    "swiglu_limit": lambda v: v / 2,
    "q_lora_rank": lambda v: None if v else 24,
    "first_k_dense_replace": lambda v: v - 1,
    "n_group": lambda v: v // 2,
    "topk_group": lambda v: v + 1,
    "topk_method": lambda v: "greedy" if v == "group_limited_greedy" else "group_limited_greedy",
    "routed_scaling_factor": lambda v: v / 2,
    "rope_theta": lambda v: v / 30,
    "partial_rotary_factor": lambda v: v / 2,
    "type": lambda v: "default" if v == "linear" else "linear",
    "rope_type": lambda v: "default" if v == "linear" else "linear",
    "factor": lambda v: v / 4,
    "low_freq_factor": lambda v: v * 2,
    "high_freq_factor": lambda v: v * 2,
    "beta_fast": lambda v: v * 4,
    "beta_slow": lambda v: v / 8,
    "mscale": lambda v: v / 2,
    "mscale_all_dim": lambda v: v / 2,
    "truncate": lambda v: not v,
    "short_factor": lambda v: [x + 1 for x in v],
    "long_factor": lambda v: [x + 1 for x in v],
}
#: Absent keys that change the function once they are there.
ADDED = {
    "llama3": {"rope_parameters.partial_rotary_factor": 0.5, "attention_bias": True, "mlp_bias": True},
    "llama3.1": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e3}},
    "gemma2": {"use_bidirectional_attention": True},
    "qwen2.5-yarn": {"layer_types": [LOCAL, LOCAL, GLOBAL]},
    "qwen3": {"rope_parameters.attention_factor": 2.0, "rope_parameters.truncate": False},
    "gemma3": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "phi3-longrope": {"rope_parameters.attention_factor": 2.0, "rope_parameters.factor": 3.0},
    "olmoe": {"clip_qkv": 0.7},
    "gpt_oss": {"swiglu_alpha": 0.8},
    "deepseek_v2": {"norm_topk_prob": True, "scoring_func": "sigmoid", "moe_layer_freq": 2},
    "deepseek_v3": {"rope_interleave": False, "scoring_func": "softmax", "topk_method": "greedy"},
}


def mutations(variant: str) -> Iterator[tuple[str, dict]]:
    """`(key, config.json with that key changed)` for every key of a variant that changes the function.

    A key inside of another is written `rope_parameters.factor`. Raises KeyError for a key that no list here names.
    """
    config = VARIANTS[variant]
    for path, value in _items(config):
        if path[-1] not in INERT | SHAPES and _acts(config, path[-1]):
            yield ".".join(path), _set(config, path, CHANGED[path[-1]](value))
    for key, value in ADDED.get(variant, {}).items():
        yield key, _set(config, key.split("."), value)


def _acts(config: dict, key: str) -> bool:
    if key == "max_position_embeddings":
        return config.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope")
    if key in ("n_group", "topk_group"):
        return config.get("topk_method") != "greedy"
    if key == "topk_method":
        return config["n_group"] > 1
    return True


def _items(value: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, item in value.items():
        if isinstance(item, dict) and key not in INERT:
            yield from _items(item, (*path, key))
        else:
            yield (*path, key), item


def _set(config: dict, path, value) -> dict:
    out = copy.deepcopy(config)
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out
