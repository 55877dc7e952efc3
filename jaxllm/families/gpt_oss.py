"""GPT-OSS (arXiv 2508.10925): attention sinks, alternating windows, biases everywhere, clamped SwiGLU experts."""

from jaxllm.families.base import Family, Map
from jaxllm.families.common import PRE_NORMS, PROJECTIONS, TOP, layer_types, read_base, read_rope, write_base
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig, MoeSpec


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, eps=1e-5, context=131_072, kv_heads=8, head=64)
    windowed = layer_types(keys, base.layers, [i % 2 == 0 for i in range(base.layers)])
    window, rope = keys.number("sliding_window", 128), read_rope(keys, base.context, base=150_000.0)
    keys.ignore("initial_context_length", "rope_scaling says it")
    keys.expect("hidden_act", "silu")
    keys.expect("swiglu_alpha", 1.702)
    keys.expect("swiglu_limit", 7.0)
    keys.expect("experts_per_token", keys.get("num_experts_per_tok", 4))  # another name of the same number
    bias = keys.flag("attention_bias", True)
    shared = dict(rope=rope, sinks=True, qkv_bias=bias, out_bias=bias)
    moe = MoeSpec(
        experts=keys.number("num_local_experts", 128),
        experts_per_token=keys.number("num_experts_per_tok", 4),
        ffw=base.ffw,
        activation="swiglu_clamped",
        bias=True,
        router_bias=True,
    )
    attns = [base.attn(window=window if on else None, **shared) for on in windowed]
    return base.config([LayerSpec(attn=attn, moe=moe) for attn in attns])


def write(config: ModelConfig) -> dict:
    specs = config.layer_specs
    window = next((spec.attn.window for spec in specs if spec.attn.window), 128)
    moe = specs[0].moe
    return write_base(config, "gpt_oss", "GptOssForCausalLM") | {
        "hidden_act": "silu",
        "attention_bias": specs[0].attn.qkv_bias,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if spec.attn.window else "full_attention" for spec in specs],
        "num_local_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.experts_per_token if moe else 1,
    }


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    read=read,
    write=write,
    layer=(
        *PROJECTIONS,
        *PRE_NORMS,
        Map("attn/sinks", "self_attn.sinks", "N"),
        Map("moe/router", "mlp.router.weight", "E D -> D E"),
        Map("moe/router_bias", "mlp.router.bias", "E"),
        # Gate and up alternate: columns g0 u0 g1 u1 ...
        Map(("moe/gate", "moe/up"), "mlp.experts.gate_up_proj", ("E D (F 1) -> E D F",) * 2, join=3),
        Map(("moe/gate_bias", "moe/up_bias"), "mlp.experts.gate_up_proj_bias", ("E (F 1) -> E F",) * 2, join=2),
        Map("moe/down", "mlp.experts.down_proj", "E F D"),
        Map("moe/down_bias", "mlp.experts.down_proj_bias", "E D"),
    ),
    top=TOP,
)
