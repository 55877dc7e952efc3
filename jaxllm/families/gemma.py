"""Gemma 1, 2 and 3, text (arXiv 2403.08295, 2408.00118, 2503.19786)."""

import dataclasses

from jaxllm.families.base import Family, Map
from jaxllm.families.common import (
    MLP,
    PRE_NORMS,
    PROJECTIONS,
    QK_NORM_HEAD,
    TOP,
    layer_types,
    read_base,
    read_mlp,
    read_rope,
    write_base,
    write_rope,
)
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig

TANH = "gelu_pytorch_tanh"
BOTH_NORMS = (
    Map("attn_norm/scale", "input_layernorm.weight", "D"),
    Map("attn_post_norm/scale", "post_attention_layernorm.weight", "D"),
    Map("mlp_norm/scale", "pre_feedforward_layernorm.weight", "D"),
    Map("mlp_post_norm/scale", "post_feedforward_layernorm.weight", "D"),
)


def _shared(base, **more) -> dict:
    return dict(norm="rms_unit_offset", embed_scale=base.embed**0.5) | more


def _bidirectional(keys: Keys) -> None:
    keys.expect("use_bidirectional_attention", False)


def read1(keys: Keys) -> ModelConfig:
    base = read_base(keys, tied=True, context=8192, head=256)
    bias = keys.flag("attention_bias", False)
    attn = base.attn(rope=read_rope(keys, base.context), qkv_bias=bias, out_bias=bias)
    key = "hidden_activation" if "hidden_activation" in keys else "hidden_act"  # the newer key wins, as there
    mlp = read_mlp(keys, base.ffw, key=key, default=TANH)
    keys.ignore("hidden_act", "hidden_activation says it")
    _bidirectional(keys)
    return base.config([LayerSpec(attn=attn, mlp=mlp)] * base.layers, **_shared(base))


def write1(config: ModelConfig) -> dict:
    keys = write_base(config, "gemma", "GemmaForCausalLM")
    return keys | {
        "attention_bias": config.layer_specs[0].attn.qkv_bias,
        "hidden_activation": keys["hidden_act"],
    }


def read2(keys: Keys) -> ModelConfig:
    base = read_base(keys, tied=True, context=8192, kv_heads=4, head=256)
    windowed = layer_types(keys, base.layers, [i % 2 == 0 for i in range(base.layers)])
    rope = read_rope(keys, base.context)
    return _layers(keys, base, windowed, rope, rope, softcaps=(50.0, 30.0))


def read3(keys: Keys) -> ModelConfig:
    base = read_base(keys, tied=True, context=131_072, kv_heads=4, head=256)
    period = keys.number("sliding_window_pattern", keys.number("_sliding_window_pattern", 6))
    windowed = layer_types(keys, base.layers, [(i + 1) % period != 0 for i in range(base.layers)])
    everywhere = read_rope(keys, base.context, base=1e6, kind="full_attention")
    if "rope_parameters" in keys:
        local = read_rope(keys, base.context, kind="sliding_attention")
    else:  # a scaling stretches the global layers only
        local = dataclasses.replace(type(everywhere)(), base=keys.number("rope_local_base_freq", 10_000.0, 0, float))
    keys.ignore("rope_local_base_freq", "rope_parameters says it")
    return _layers(keys, base, windowed, local, everywhere, softcaps=(None, None), qk_norm="head")


def _layers(keys: Keys, base, windowed, local, everywhere, *, softcaps, **attention) -> ModelConfig:
    bias = keys.flag("attention_bias", False)
    attention |= dict(
        qkv_bias=bias,
        out_bias=bias,
        scale=keys.number("query_pre_attn_scalar", 256, 0, float) ** -0.5,
        softcap=_softcap(keys, "attn_logit_softcapping", softcaps[0]),
    )
    window = keys.number("sliding_window", 4096)
    mlp = read_mlp(keys, base.ffw, key="hidden_activation", default=TANH)
    keys.ignore("hidden_act", "hidden_activation says it")
    _bidirectional(keys)
    attns = [base.attn(rope=local if on else everywhere, window=window if on else None, **attention) for on in windowed]
    final = _softcap(keys, "final_logit_softcapping", softcaps[1])
    specs = [LayerSpec(attn=attn, mlp=mlp) for attn in attns]
    return base.config(specs, **_shared(base, norm_placement="both", logit_softcap=final))


def _softcap(keys: Keys, key: str, default: float | None) -> float | None:
    """Absent means the family's default; null means none."""
    return keys.number(key, None if key in keys.raw else default, 0, float)


def _write(config: ModelConfig, model_type: str, architecture: str) -> dict:
    specs = config.layer_specs
    window = next((spec.attn.window for spec in specs if spec.attn.window), None)
    keys = write_base(config, model_type, architecture)
    return keys | {
        "attention_bias": specs[0].attn.qkv_bias,
        "hidden_activation": keys["hidden_act"],
        "query_pre_attn_scalar": _scalar(config),
        "attn_logit_softcapping": specs[0].attn.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if spec.attn.window else "full_attention" for spec in specs],
    }


def _scalar(config: ModelConfig) -> int | float:
    attn = config.layer_specs[0].attn
    scalar = (attn.scale or config.head_dim(attn) ** -0.5) ** -2
    return round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar


def write2(config: ModelConfig) -> dict:
    return _write(config, "gemma2", "Gemma2ForCausalLM")


def write3(config: ModelConfig) -> dict:
    keys = _write(config, "gemma3_text", "Gemma3ForCausalLM")
    for spec in config.layer_specs:
        if spec.attn.rope is not None:
            local = spec.attn.window is not None
            keys |= {"rope_local_base_freq": spec.attn.rope.base} if local else write_rope(spec.attn.rope)
    return keys


def _family(name, architecture, model_type, read, write, layer) -> Family:
    return Family(
        name=name,
        architectures=(architecture,),
        model_types=(model_type,),
        read=read,
        write=write,
        layer=layer,
        top=TOP,
    )


FAMILIES = (
    _family("gemma", "GemmaForCausalLM", "gemma", read1, write1, PROJECTIONS + MLP + PRE_NORMS),
    _family("gemma2", "Gemma2ForCausalLM", "gemma2", read2, write2, PROJECTIONS + MLP + BOTH_NORMS),
    _family("gemma3", "Gemma3ForCausalLM", "gemma3_text", read3, write3, PROJECTIONS + QK_NORM_HEAD + MLP + BOTH_NORMS),
)
