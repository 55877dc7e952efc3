"""Mistral (arXiv 2310.06825): Llama with a sliding window and, in later models, a head dimension of its own."""

from jaxllm.families.base import Family
from jaxllm.families.common import MLP, PRE_NORMS, PROJECTIONS, TOP, read_base, read_mlp, read_rope, write_base
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, context=131_072, kv_heads=8)
    window = keys.number("sliding_window", None if "sliding_window" in keys.raw else 4096)
    attn = base.attn(rope=read_rope(keys, base.context), window=window)
    return base.config([LayerSpec(attn=attn, mlp=read_mlp(keys, base.ffw))] * base.layers)


def write(config: ModelConfig) -> dict:
    window = config.layer_specs[0].attn.window
    return write_base(config, "mistral", "MistralForCausalLM") | {"sliding_window": window}


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read=read,
    write=write,
    layer=PROJECTIONS + MLP + PRE_NORMS,
    top=TOP,
)
