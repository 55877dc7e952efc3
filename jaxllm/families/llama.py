"""Llama 2, 3, 3.1, 3.2 and 3.3 (arXiv 2302.13971, 2307.09288, 2407.21783), SmolLM2, and their like."""

from jaxllm.families.base import Family
from jaxllm.families.common import MLP, PRE_NORMS, PROJECTIONS, TOP, read_base, read_mlp, read_rope, write_base
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys)
    bias = keys.flag("attention_bias", False)
    attn = base.attn(rope=read_rope(keys, base.context), qkv_bias=bias, out_bias=bias)
    mlp = read_mlp(keys, base.ffw, bias=keys.flag("mlp_bias", False))
    for key in ("rope_interleaved", "is_llama_config"):  # written by SmolLM2's training code
        keys.expect(key, False, key == "is_llama_config")
    return base.config([LayerSpec(attn=attn, mlp=mlp)] * base.layers)


def write(config: ModelConfig) -> dict:
    spec = config.layer_specs[-1]
    return write_base(config, "llama", "LlamaForCausalLM") | {
        "attention_bias": spec.attn.qkv_bias,
        "mlp_bias": bool(spec.mlp and spec.mlp.bias),
    }


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read=read,
    write=write,
    layer=PROJECTIONS + MLP + PRE_NORMS,
    top=TOP,
)
