"""Small random models of every family, as a published folder holds them: config.json and tensors by their names.

Weights are scaled up so that every mechanism matters: attention is peaked, windows and original contexts are shorter
than a test's text, routers are decided, and no key has its default value.
"""

import copy

SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 56}
BASE = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.02,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 2.0, "beta_slow": 0.5}
YARN |= {"rope_theta": 100.0}
LONGROPE = {"rope_type": "longrope", "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0]}
LONGROPE |= {"long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0]}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _config(model_type: str, architecture: str, rope: dict | None = None, theta: float = 3e3, **changes) -> dict:
    """As transformers 5 writes it; a change to ... leaves the key out."""
    config = {"model_type": model_type, "architectures": [f"{architecture}ForCausalLM"]} | BASE
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | (rope or {})
    return {key: value for key, value in (config | changes).items() if value is not ...}


def _llama(**changes):
    return _config("llama", "Llama", **changes)


def _mixture(experts: int, chosen: int, name: str = "num_experts") -> dict:
    return {name: experts, "num_experts_per_tok": chosen}


def _deepseek(version: int, **changes) -> dict:
    yarn = YARN | {"mscale": 1.4, "mscale_all_dim": 0.7}
    latent = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "v_head_dim": 10, "head_dim": ...}
    sparse = {"moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_routed_experts": 8}
    sparse |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.7}
    sparse |= {"q_lora_rank": 24, "num_key_value_heads": 4, "attention_bias": False}
    return _config(f"deepseek_v{version}", f"DeepseekV{version}", yarn, **latent | sparse | changes)


def _gpt2() -> dict:
    names = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_inner": 56, "n_positions": 256, "vocab_size": 97}
    rest = {"activation_function": "gelu_new", "layer_norm_epsilon": 0.02, "tie_word_embeddings": True}
    rest |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "dtype": "float32"}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | names | rest


GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 = {"hidden_act": ..., "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 |= {"query_pre_attn_scalar": 40, "sliding_window": 7}
PHI3 = {"head_dim": ..., "hidden_size": 64, "num_attention_heads": 4}

#: variant: config.json. The family is `model_type`; what follows a dash says what sets the variant apart.
VARIANTS = {
    "gpt2": _gpt2(),
    "llama2": _llama(head_dim=..., num_key_value_heads=..., rms_norm_eps=1e-5),
    "llama3": _llama(),
    "llama3.1": _llama(rope=LLAMA3_ROPE),
    "llama3.2": _llama(rope=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    "llama-linear": _llama(rope={"rope_type": "linear", "factor": 4.0}, attention_bias=True, mlp_bias=True),
    "llama-dynamic": _llama(rope={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=32),
    "mistral": _config("mistral", "Mistral", sliding_window=7),
    "mistral-full": _config("mistral", "Mistral", sliding_window=None),
    "mixtral": _config("mixtral", "Mixtral", sliding_window=7, **_mixture(6, 2, "num_local_experts")),
    "qwen2": _config("qwen2", "Qwen2", head_dim=..., hidden_size=64, tie_word_embeddings=True),
    "qwen2.5-yarn": _config(
        "qwen2",
        "Qwen2",
        YARN,
        head_dim=...,
        hidden_size=64,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "qwen3": _config("qwen3", "Qwen3", YARN, tie_word_embeddings=True),
    "qwen3_moe": _config(
        "qwen3_moe",
        "Qwen3Moe",
        **_mixture(6, 3),
        norm_topk_prob=True,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_hidden_layers=5,
    ),
    "gemma": _config("gemma", "Gemma", **GEMMA),
    "gemma2": _config(
        "gemma2",
        "Gemma2",
        **GEMMA2,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=9.0,
        layer_types=[LOCAL, GLOBAL, LOCAL],
    ),
    "gemma3": _config(
        "gemma3_text",
        "Gemma3",
        **GEMMA2,
        num_hidden_layers=7,
        layer_types=[LOCAL] * 5 + [GLOBAL, LOCAL],
        rope_parameters={
            GLOBAL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3},
            LOCAL: {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "gemma3-old": _config(
        "gemma3_text",
        "Gemma3",
        **GEMMA2,
        num_hidden_layers=4,
        sliding_window_pattern=3,
        rope_parameters=...,
        rope_theta=5e3,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "phi3": _config("phi3", "Phi3", **PHI3, sliding_window=7),
    "phi3-longrope": _config(
        "phi3",
        "Phi3",
        LONGROPE,
        **PHI3,
        original_max_position_embeddings=32,
        sliding_window=None,
    ),
    "olmo2": _config("olmo2", "Olmo2", head_dim=..., hidden_size=64),
    "olmoe": _config("olmoe", "Olmoe", head_dim=..., hidden_size=64, **_mixture(6, 3), norm_topk_prob=False),
    "smollm2": _llama(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    "smollm3": _config(
        "smollm3", "SmolLM3", head_dim=..., hidden_size=64, num_hidden_layers=4, no_rope_layer_interval=2
    ),
    "smollm3-window": _config(
        "smollm3",
        "SmolLM3",
        head_dim=...,
        hidden_size=64,
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=7,
    ),
    "gpt_oss": _config(
        "gpt_oss",
        "GptOss",
        YARN | {"truncate": False},
        **_mixture(6, 3, "num_local_experts"),
        layer_types=[LOCAL, GLOBAL, LOCAL],
        sliding_window=7,
        attention_bias=True,
        swiglu_limit=7.0,
    ),
    "gpt_oss-mxfp4": _config(
        "gpt_oss",
        "GptOss",
        YARN | {"truncate": False},
        **_mixture(6, 3, "num_local_experts"),
        hidden_size=64,
        intermediate_size=32,
        sliding_window=7,
        layer_types=[LOCAL, GLOBAL, LOCAL],
        quantization_config={"quant_method": "mxfp4"},
    ),
    "deepseek_v2": _deepseek(2, topk_method="group_limited_greedy"),
    "deepseek_v2-lite": _deepseek(2, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"),
    "deepseek_v3": _deepseek(3, norm_topk_prob=True),
}


def old_form(config: dict) -> dict:
    """The same model as transformers 4 writes its config.json."""
    old = copy.deepcopy(config)
    if "rope_parameters" not in old:
        return old
    rope = old.pop("rope_parameters")
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if GLOBAL in rope:
        old["rope_local_base_freq"] = rope[LOCAL]["rope_theta"]
        rope = rope[GLOBAL]
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    name = "rope_type" if kind in ("llama3", "linear") else "type"
    old["rope_scaling"] = None if kind == "default" else {name: kind} | rope
    return old
