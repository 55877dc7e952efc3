"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in every `decoder_sparse_step`-th layer."""

from jaxllm.families.base import Family
from jaxllm.families.common import (
    EXPERTS,
    MLP,
    PRE_NORMS,
    PROJECTIONS,
    QK_NORM_HEAD,
    TOP,
    activation,
    read_base,
    read_mlp,
    read_rope,
    write_base,
)
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig, MoeSpec


def read(keys: Keys) -> ModelConfig:
    base, bias = read_base(keys, context=32_768, kv_heads=4), keys.flag("attention_bias", False)
    on, size = keys.flag("use_sliding_window", False), keys.number("sliding_window", 4096)
    keys.ignore("max_window_layers", "this family's window, where it is on, is in every layer")
    window = size if on else None
    attn = base.attn(rope=read_rope(keys, base.context), qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
    dense = LayerSpec(attn=attn, mlp=read_mlp(keys, base.ffw))
    sparse = LayerSpec(attn=attn, moe=read_moe(keys))
    step, without = keys.number("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    return base.config([dense if i in without or (i + 1) % step else sparse for i in range(base.layers)])


def read_moe(keys: Keys) -> MoeSpec:
    experts = keys.number("num_experts", None)
    return MoeSpec(
        experts=keys.number("num_local_experts", experts or 128),
        experts_per_token=keys.number("num_experts_per_tok", 8),
        ffw=keys.number("moe_intermediate_size", 768),
        activation=activation(keys),
        renormalize=keys.flag("norm_topk_prob", False),
    )


def write(config: ModelConfig) -> dict:
    specs = config.layer_specs
    moe = next((spec.moe for spec in specs if spec.moe), None)
    if moe is None:
        return {}
    dense = next((spec.mlp.ffw for spec in specs if spec.mlp), moe.ffw)
    return write_base(config, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "attention_bias": specs[0].attn.qkv_bias,
        "use_sliding_window": specs[0].attn.window is not None,
        "sliding_window": specs[0].attn.window,
        "intermediate_size": dense,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffw,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, spec in enumerate(specs) if spec.mlp],
    }


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read=read,
    write=write,
    layer=PROJECTIONS + QK_NORM_HEAD + MLP + EXPERTS + PRE_NORMS,
    top=TOP,
)
