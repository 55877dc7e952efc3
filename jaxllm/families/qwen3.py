"""Qwen3 (arXiv 2505.09388): RMSNorm of each query and key head."""

from jaxllm.families.base import Family
from jaxllm.families.common import MLP, PRE_NORMS, PROJECTIONS, QK_NORM_HEAD, TOP, read_base, write_base
from jaxllm.families.keys import Keys
from jaxllm.families.qwen2 import layers_of, write_layers
from jaxllm.model.spec import ModelConfig


def read(keys: Keys) -> ModelConfig:
    base, bias = read_base(keys, context=32_768, head=128), keys.flag("attention_bias", False)
    return layers_of(keys, base, qk_norm="head", qkv_bias=bias, out_bias=bias)


def write(config: ModelConfig) -> dict:
    bias = {"attention_bias": config.layer_specs[0].attn.qkv_bias}
    return write_base(config, "qwen3", "Qwen3ForCausalLM") | write_layers(config) | bias


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read=read,
    write=write,
    layer=PROJECTIONS + QK_NORM_HEAD + MLP + PRE_NORMS,
    top=TOP,
)
