"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values; a window in the upper layers on request."""

from jaxllm.families.base import Family
from jaxllm.families.common import (
    MLP,
    PRE_NORMS,
    PROJECTIONS,
    TOP,
    Base,
    layer_types,
    read_base,
    read_mlp,
    read_rope,
    write_base,
)
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, context=32_768)
    return layers_of(keys, base, qkv_bias=True)


def layers_of(keys: Keys, base: Base, **attention) -> ModelConfig:
    """The layers of Qwen2 and Qwen3: from `max_window_layers` on, attention may have a sliding window."""
    on, size = keys.flag("use_sliding_window", False), keys.number("sliding_window", 4096)
    first = keys.number("max_window_layers", 28, 0)
    windowed = layer_types(keys, base.layers, [on and i >= first for i in range(base.layers)])
    rope, mlp = read_rope(keys, base.context), read_mlp(keys, base.ffw)
    attns = [base.attn(rope=rope, window=size if on and window else None, **attention) for window in windowed]
    return base.config([LayerSpec(attn=attn, mlp=mlp) for attn in attns])


def write_layers(config: ModelConfig) -> dict:
    """The window's keys."""
    windows = [spec.attn.window for spec in config.layer_specs]
    if not any(windows):
        return {"use_sliding_window": False}
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    first = next(i for i, window in enumerate(windows) if window)
    return {
        "use_sliding_window": True,
        "sliding_window": windows[first],
        "max_window_layers": first,
        "layer_types": kinds,
    }


def write(config: ModelConfig) -> dict:
    return write_base(config, "qwen2", "Qwen2ForCausalLM") | write_layers(config)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read=read,
    write=write,
    layer=PROJECTIONS + MLP + PRE_NORMS,
    top=TOP,
)
