"""Phi-3 and Phi-4-mini (arXiv 2404.14219): Llama with joined projections, a window, and LongRoPE (arXiv 2402.13753)."""

from jaxllm.families.base import Family, Map
from jaxllm.families.common import PRE_NORMS, PROJECTIONS, TOP, read_base, read_mlp, read_rope, write_base
from jaxllm.families.keys import Keys
from jaxllm.model.spec import LayerSpec, ModelConfig


def read(keys: Keys) -> ModelConfig:
    base = read_base(keys, eps=1e-5, context=4096)
    rope = read_rope(keys, base.context)
    keys.number("original_max_position_embeddings", base.context)  # read by LongRoPE; means nothing without it
    keys.expect("attention_bias", False)
    attn = base.attn(rope=rope, window=keys.number("sliding_window", None))
    return base.config([LayerSpec(attn=attn, mlp=read_mlp(keys, base.ffw))] * base.layers)


def write(config: ModelConfig) -> dict:
    attn = config.layer_specs[0].attn
    keys = write_base(config, "phi3", "Phi3ForCausalLM") | {"sliding_window": attn.window, "pad_token_id": 0}
    scaling = keys.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "longrope":
        keys["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return keys


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read=read,
    write=write,
    layer=(
        Map(
            ("attn/q", "attn/k", "attn/v"),
            "self_attn.qkv_proj.weight",
            ("(N H) D -> D N H", "(K H) D -> D K H", "(K H) D -> D K H"),
        ),
        PROJECTIONS[3],
        Map(("mlp/gate", "mlp/up"), "mlp.gate_up_proj.weight", ("F D -> D F",) * 2),
        Map("mlp/down", "mlp.down_proj.weight", "D F -> F D"),
        *PRE_NORMS,
    ),
    top=TOP,
)
