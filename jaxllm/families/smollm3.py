"""SmolLM3: Llama in which some layers have no RoPE (NoPE, arXiv 2501.18795)."""

from jaxllm.errors import SettingsError
from jaxllm.families.base import Family
from jaxllm.families.common import (
    MLP,
    PRE_NORMS,
    PROJECTIONS,
    TOP,
    layer_types,
    read_base,
    read_mlp,
    read_rope,
    write_base,
)
from jaxllm.families.keys import Keys
from jaxllm.families.qwen2 import write_layers
from jaxllm.model.spec import LayerSpec, ModelConfig


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, tied=True, context=32_768, kv_heads=4)
    bias, every = keys.flag("attention_bias", False), keys.number("no_rope_layer_interval", 4)
    rotated = keys.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(base.layers)])  # 1 has RoPE
    if len(rotated) != base.layers:
        raise SettingsError(f"{keys.where}: no_rope_layers has {len(rotated)} entries for {base.layers} layers")
    on, size = keys.flag("use_sliding_window", False), keys.number("sliding_window", None)
    windowed = layer_types(keys, base.layers, [on and not rope for rope in rotated])
    keys.ignore("max_window_layers", "layer_types says it")
    rope = read_rope(keys, base.context, base=2e6)
    mlp = read_mlp(keys, base.ffw, bias=keys.flag("mlp_bias", False))
    specs = [
        LayerSpec(
            attn=base.attn(rope=rope if r else None, window=size if on and w else None, qkv_bias=bias, out_bias=bias),
            mlp=mlp,
        )
        for r, w in zip(rotated, windowed, strict=True)
    ]
    return base.config(specs)


def write(config: ModelConfig) -> dict:
    specs = config.layer_specs
    keys = write_base(config, "smollm3", "SmolLM3ForCausalLM") | write_layers(config)
    keys.pop("max_window_layers", None)
    return keys | {
        "attention_bias": specs[0].attn.qkv_bias,
        "mlp_bias": bool(specs[0].mlp and specs[0].mlp.bias),
        "no_rope_layers": [int(spec.attn.rope is not None) for spec in specs],
    }


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    read=read,
    write=write,
    layer=PROJECTIONS + MLP + PRE_NORMS,
    top=TOP,
)
