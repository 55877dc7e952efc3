"""OLMo 2 (arXiv 2501.00656: norms after the sublayers, QK-norm over all heads) and OLMoE (arXiv 2409.02060)."""

from jaxllm.families.base import Family
from jaxllm.families.common import (
    EXPERTS,
    MLP,
    POST_NORMS,
    PRE_NORMS,
    PROJECTIONS,
    QK_NORM_ALL,
    TOP,
    activation,
    read_base,
    read_mlp,
    read_rope,
    write_base,
)
from jaxllm.families.keys import Keys
from jaxllm.model.spec import AttnSpec, LayerSpec, ModelConfig, MoeSpec


def _attention(keys: Keys, base) -> AttnSpec:
    bias = keys.flag("attention_bias", False)
    return base.attn(rope=read_rope(keys, base.context), qk_norm="all", qkv_bias=bias, out_bias=bias)


def read2(keys: Keys) -> ModelConfig:
    base = read_base(keys, eps=1e-5)
    layer = LayerSpec(attn=_attention(keys, base), mlp=read_mlp(keys, base.ffw))
    return base.config([layer] * base.layers, norm_placement="post")


def write2(config: ModelConfig) -> dict:
    bias = {"attention_bias": config.layer_specs[0].attn.qkv_bias}
    return write_base(config, "olmo2", "Olmo2ForCausalLM") | bias


def read_moe(keys: Keys) -> ModelConfig:
    base = read_base(keys, eps=1e-5, context=4096)
    keys.expect("clip_qkv")
    moe = MoeSpec(
        experts=keys.number("num_experts", 64),
        experts_per_token=keys.number("num_experts_per_tok", 8),
        ffw=base.ffw,
        activation=activation(keys),
        renormalize=keys.flag("norm_topk_prob", False),
    )
    return base.config([LayerSpec(attn=_attention(keys, base), moe=moe)] * base.layers)


def write_moe(config: ModelConfig) -> dict:
    spec = config.layer_specs[0]
    if spec.moe is None:
        return {}
    return write_base(config, "olmoe", "OlmoeForCausalLM") | {
        "attention_bias": spec.attn.qkv_bias,
        "num_experts": spec.moe.experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "norm_topk_prob": spec.moe.renormalize,
    }


FAMILIES = (
    Family(
        name="olmo2",
        architectures=("Olmo2ForCausalLM",),
        model_types=("olmo2",),
        read=read2,
        write=write2,
        layer=PROJECTIONS + QK_NORM_ALL + MLP + POST_NORMS,
        top=TOP,
    ),
    Family(
        name="olmoe",
        architectures=("OlmoeForCausalLM",),
        model_types=("olmoe",),
        read=read_moe,
        write=write_moe,
        layer=PROJECTIONS + QK_NORM_ALL + EXPERTS + PRE_NORMS,
        top=TOP,
    ),
)
