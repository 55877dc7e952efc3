"""Mixtral (arXiv 2401.04088): Mistral with experts; the chosen experts' softmax scores are renormalised."""

from jaxllm.families.base import Family, Map
from jaxllm.families.common import PRE_NORMS, PROJECTIONS, TOP, activation, read_base, read_rope, write_base
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig, MoeSpec

EXPERTS = (
    Map("moe/router", "block_sparse_moe.gate.weight", "E D -> D E"),
    Map("moe/gate", "block_sparse_moe.experts.{e}.w1.weight", "F D -> D F"),
    Map("moe/up", "block_sparse_moe.experts.{e}.w3.weight", "F D -> D F"),
    Map("moe/down", "block_sparse_moe.experts.{e}.w2.weight", "D F -> F D"),
)


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, eps=1e-5, context=131_072, kv_heads=8)
    rope = read_rope(keys, base.context, base=1e6)
    attn = base.attn(rope=rope, window=keys.number("sliding_window", None))
    moe = MoeSpec(
        experts=keys.number("num_local_experts", 8),
        experts_per_token=keys.number("num_experts_per_tok", 2),
        ffw=base.ffw,
        activation=activation(keys),
    )
    return base.config([LayerSpec(attn=attn, moe=moe)] * base.layers)


def write(config: ModelConfig) -> dict:
    spec = config.layer_specs[0]
    return write_base(config, "mixtral", "MixtralForCausalLM") | {
        "sliding_window": spec.attn.window,
        "num_local_experts": spec.moe.experts if spec.moe else 1,
        "num_experts_per_tok": spec.moe.experts_per_token if spec.moe else 1,
    }


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read=read,
    write=write,
    layer=PROJECTIONS + EXPERTS + PRE_NORMS,
    top=TOP,
)
