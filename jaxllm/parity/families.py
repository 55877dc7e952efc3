"""The published architectures: the keys of config.json each one reads, their defaults, and what no key says.

The defaults are those of the configuration classes of transformers, which wrote the files: an absent key means them.
"""

from jaxllm.errors import SettingsError, nearest
from jaxllm.parity import blocks
from jaxllm.parity.blocks import Traits

#: Keys without a default.
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
REQUIRED_GPT2 = ("n_embd", "n_layer", "n_head", "n_positions")
#: Read for every architecture; absent means none.
COMMON = ("rope_scaling", "rope_parameters", "original_max_position_embeddings", "quantization_config")

LLAMA = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
MISTRAL = LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
MIXTRAL = MISTRAL | {"sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2}
QWEN2 = LLAMA | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN3_MOE = LLAMA | {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
GEMMA = LLAMA | {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA2 = GEMMA | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = GEMMA2 | {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
PHI3 = LLAMA | {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
OLMO2 = LLAMA | {"rms_norm_eps": 1e-5}
OLMOE = OLMO2 | {
    "max_position_embeddings": 4096,
    "clip_qkv": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
SMOLLM3 = LLAMA | {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
}
GPT_OSS = LLAMA | {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
DEEPSEEK2 = LLAMA | {
    "first_k_dense_replace": 0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "num_experts_per_tok": None,
    "routed_scaling_factor": 1.0,
}
DEEPSEEK3 = DEEPSEEK2 | {
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
}
GPT2 = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def _every(c, layer):
    return True


def _alternating(c, layer):
    return layer % 2 == 0


def _after_first(c, layer):
    return layer >= c["max_window_layers"]


def _local_of_period(c, layer):
    return (layer + 1) % c["sliding_window_pattern"] != 0


def _without_rope(c, layer):
    return not blocks.rotates(c, layer)


LLAMA_LIKE = Traits(blocks.grouped_query, blocks.dense)
PLAIN = (False, False)  # no biases in attention, whatever config.json says
MIXTRAL_TRAITS = Traits(
    blocks.grouped_query, blocks.mixtral_mixture, bias=PLAIN, windowed=_every, feed_name="block_sparse_moe"
)
DEEPSEEK = Traits(blocks.latent, blocks.deepseek_mixture)

#: model_type: (keys with defaults, traits)
FAMILIES: dict[str, tuple[dict, Traits | None]] = {
    "gpt2": (GPT2, None),
    "llama": (LLAMA, LLAMA_LIKE),
    "mistral": (MISTRAL, Traits(blocks.grouped_query, blocks.dense, bias=PLAIN, windowed=_every)),
    "mixtral": (MIXTRAL, MIXTRAL_TRAITS),
    "qwen2": (QWEN2, Traits(blocks.grouped_query, blocks.dense, bias=(True, False), windowed=_after_first)),
    "qwen3": (QWEN3, Traits(blocks.grouped_query, blocks.dense, qk_norm="head", windowed=_after_first)),
    "qwen3_moe": (QWEN3_MOE, Traits(blocks.grouped_query, blocks.softmax_mixture, qk_norm="head", windowed=_every)),
    "gemma": (GEMMA, Traits(blocks.grouped_query, blocks.dense, gemma=True)),
    "gemma2": (GEMMA2, Traits(blocks.grouped_query, blocks.dense, "both", True, windowed=_alternating)),
    "gemma3_text": (
        GEMMA3,
        Traits(blocks.grouped_query, blocks.dense, "both", True, qk_norm="head", windowed=_local_of_period),
    ),
    "phi3": (PHI3, Traits(blocks.phi3_attention, blocks.phi3_dense, bias=PLAIN, windowed=_every)),
    "olmo2": (OLMO2, Traits(blocks.grouped_query, blocks.dense, "post", qk_norm="width")),
    "olmoe": (OLMOE, Traits(blocks.grouped_query, blocks.softmax_mixture, qk_norm="width")),
    "smollm3": (SMOLLM3, Traits(blocks.grouped_query, blocks.dense, windowed=_without_rope)),
    "gpt_oss": (GPT_OSS, Traits(blocks.grouped_query, blocks.gpt_oss_mixture, sinks=True, windowed=_alternating)),
    "deepseek_v2": (DEEPSEEK2, DEEPSEEK),
    "deepseek_v3": (DEEPSEEK3, DEEPSEEK),
}

#: Keys that may only have the value that the published code assumes; another one is refused.
FIXED = {
    "": {"use_bidirectional_attention": (None, False), "add_cross_attention": (False,)},
    "gemma3_text": {"attn_logit_softcapping": (None,)},
    "gpt_oss": {"hidden_act": ("silu",)},
    "deepseek_v2": {
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "norm_topk_prob": (None, False),
        "moe_layer_freq": (1,),
        "mlp_bias": (False,),
    },
    "deepseek_v3": {
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
        "moe_layer_freq": (1,),
        "mlp_bias": (False,),
    },
}
QUANTIZED = {"gpt_oss": ("mxfp4",), "deepseek_v3": ("fp8",)}


def fill(config: dict) -> tuple[dict, Traits | None]:
    """The keys that the architecture reads, with its defaults, and its traits (None for GPT-2).

    Raises SettingsError for an unknown `model_type`, a missing key, or a value without a meaning here.
    """
    if config.get("model_type") == "gemma3":  # text and image: the text model is inside
        config = {"model_type": "gemma3_text"} | config["text_config"]
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise SettingsError(f"config.json: model_type {kind!r} is not known{nearest(str(kind), FAMILIES)}")
    _refuse(config, kind)
    defaults, traits = FAMILIES[kind]
    required = REQUIRED[: 4 if "num_experts_per_tok" in defaults else 3] if traits else REQUIRED_GPT2
    c = {key: config.get(key, defaults.get(key)) for key in (*required, *COMMON, *defaults)}
    if missing := [key for key in required if c[key] is None]:
        raise SettingsError(f"config.json: missing {', '.join(missing)}")
    if traits:
        c["num_key_value_heads"] = c["num_key_value_heads"] or c["num_attention_heads"]
        c["head_dim"] = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    if traits and traits.gemma:
        _gemma(c, config)
    return c, traits


def _gemma(c: dict, config: dict) -> None:
    """Gemma 1's `gelu` always meant its tanh form; from Gemma 2 on another key names the activation."""
    if "hidden_activation" in c:
        c["hidden_act"] = c["hidden_activation"]
    elif c["hidden_act"] == "gelu":
        c["hidden_act"] = config.get("hidden_activation") or "gelu_pytorch_tanh"
    if "sliding_window_pattern" in c:
        period = config.get("_sliding_window_pattern", c["sliding_window_pattern"])
        c["sliding_window_pattern"] = config.get("sliding_window_pattern", period)


def _refuse(config: dict, kind: str) -> None:
    fixed = FIXED[""] | FIXED.get(kind, {})
    if kind != "phi3":
        fixed = fixed | {"partial_rotary_factor": (None, 1.0)}
    for key, values in fixed.items():
        if key in config and config[key] not in values:
            allowed = " or ".join(map(str, values))
            raise SettingsError(f"config.json: {key}={config[key]!r} is not known for {kind}: only {allowed}")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in QUANTIZED.get(kind, ()):
        raise SettingsError(f"config.json: weights of quant_method {method!r} are not known for {kind}")
