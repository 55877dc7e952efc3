"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, group-limited routing."""

from jaxllm.families.base import Family, Map
from jaxllm.families.common import (
    EXPERTS,
    MLP,
    PRE_NORMS,
    PROJECTIONS,
    TOP,
    activation,
    read_base,
    read_mlp,
    read_rope,
    write_base,
    yarn_mscale,
)
from jaxllm.families.keys import Keys
from jaxllm.model.spec import AttnSpec, LatentSpec, LayerSpec, ModelConfig, MoeSpec


def read2(keys: Keys) -> ModelConfig:
    method = keys.get("topk_method", "greedy")
    keys.expect("topk_method", "greedy", "group_limited_greedy")
    keys.expect("scoring_func", "softmax")
    keys.expect("norm_topk_prob", False)
    groups = _groups(keys, "max") if method == "group_limited_greedy" else {}
    if not groups:
        keys.ignore("n_group", "topk_method=greedy has no groups")
        keys.ignore("topk_group", "topk_method=greedy has no groups")
    return _read(keys, groups, renormalize=False)


def read3(keys: Keys) -> ModelConfig:
    keys.expect("topk_method", "noaux_tc")
    keys.expect("scoring_func", "sigmoid")
    renormalize = keys.flag("norm_topk_prob", True)
    more = dict(score="sigmoid", balance="bias", renormalize=renormalize)
    keys.ignore("num_nextn_predict_layers", "its layers predict a second token and are not part of the decoder")
    return _read(keys, _groups(keys, "top2"), **more)


def _groups(keys: Keys, score: str) -> dict:
    groups, chosen = keys.number("n_group", 1), keys.number("topk_group", 1)
    return dict(groups=groups, groups_per_token=chosen, group_score=score) if groups > 1 else {}


def _read(keys: Keys, groups: dict, **routing) -> ModelConfig:
    nope, rope_head = keys.number("qk_nope_head_dim"), keys.number("qk_rope_head_dim")
    keys.ignore("head_dim", "qk_nope_head_dim and qk_rope_head_dim say it")
    keys.ignore("qk_head_dim", "qk_nope_head_dim and qk_rope_head_dim say it")
    base = read_base(keys, context=2048, head=nope)
    keys.expect("num_key_value_heads", base.heads)
    keys.expect("rope_interleave", True)
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    keys.expect("moe_layer_freq", 1)
    keys.expect("ep_size", 1)
    latent = LatentSpec(
        kv_rank=keys.number("kv_lora_rank"),
        q_rank=keys.number("q_lora_rank", None),
        rope_head=rope_head,
        v_head=keys.number("v_head_dim"),
    )
    rope = read_rope(keys, base.context)
    attn = AttnSpec(heads=base.heads, head=nope, rope=rope, latent=latent, scale=_scale(keys, rope, nope + rope_head))
    ffw = keys.number("moe_intermediate_size")
    moe = MoeSpec(
        experts=keys.number("n_routed_experts"),
        experts_per_token=keys.number("num_experts_per_tok"),
        ffw=ffw,
        activation=activation(keys),
        shared_ffw=ffw * keys.number("n_shared_experts", 0, 0),
        scale=keys.number("routed_scaling_factor", 1.0, 0, float),
        **groups,
        **routing,
    )
    dense = keys.number("first_k_dense_replace", 0, 0)
    first, rest = LayerSpec(attn=attn, mlp=read_mlp(keys, base.ffw)), LayerSpec(attn=attn, moe=moe)
    return base.config([first if i < dense else rest for i in range(base.layers)])


def _scale(keys: Keys, rope, dims: int) -> float | None:
    """YaRN's temperature acts on the logits here: scale * mscale ** 2 (published reference implementation)."""
    key = next((key for key in ("rope_parameters", "rope_scaling") if key in keys), None)
    all_dim = keys.raw[key].get("mscale_all_dim", 0) if key else 0
    if rope.scaling != "yarn" or not all_dim:
        return None
    return dims**-0.5 * yarn_mscale(rope.factor, all_dim) ** 2


def _write(config: ModelConfig, model_type: str, architecture: str) -> dict:
    specs, attn = config.layer_specs, config.layer_specs[0].attn
    moe = next((spec.moe for spec in specs if spec.moe), None)
    if attn.latent is None or moe is None:
        return {}
    dense = next((spec.mlp.ffw for spec in specs if spec.mlp), moe.ffw)
    keys = write_base(config, model_type, architecture) | {
        "num_key_value_heads": attn.heads,
        "intermediate_size": dense,
        "qk_nope_head_dim": config.head_dim(attn),
        "qk_rope_head_dim": attn.latent.rope_head,
        "v_head_dim": attn.latent.v_head,
        "kv_lora_rank": attn.latent.kv_rank,
        "q_lora_rank": attn.latent.q_rank,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffw,
        "n_shared_experts": moe.shared_ffw // moe.ffw or None,
        "routed_scaling_factor": moe.scale,
        "first_k_dense_replace": sum(spec.mlp is not None for spec in specs),
        "norm_topk_prob": moe.renormalize,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
    }
    keys.pop("head_dim")
    if attn.scale is not None and "rope_scaling" in keys:  # the mscale_all_dim that gives this scale
        dims = config.head_dim(attn) + attn.latent.rope_head
        all_dim = ((attn.scale * dims**0.5) ** 0.5 - 1) / (yarn_mscale(attn.rope.factor, 1.0) - 1)
        keys["rope_scaling"]["mscale_all_dim"] = round(all_dim, 6)
    return keys


def write2(config: ModelConfig) -> dict:
    keys = _write(config, "deepseek_v2", "DeepseekV2ForCausalLM")
    if keys:
        keys["topk_method"] = "group_limited_greedy" if keys["n_group"] > 1 else "greedy"
    return keys


def write3(config: ModelConfig) -> dict:
    keys = _write(config, "deepseek_v3", "DeepseekV3ForCausalLM")
    return keys | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} if keys else {}


# Rotated dimensions are stored in pairs; ours are in halves.
LATENT = (
    Map("attn/q", "self_attn.q_proj.weight", "(N H) D -> D N H", halves="H"),
    Map("attn/q_down", "self_attn.q_a_proj.weight", "Q D -> D Q"),
    Map("attn/q_norm", "self_attn.q_a_layernorm.weight", "Q"),
    Map("attn/q_up", "self_attn.q_b_proj.weight", "(N H) Q -> Q N H", halves="H"),
    Map(
        ("attn/kv_down", "attn/k_rope"),
        "self_attn.kv_a_proj_with_mqa.weight",
        ("C D -> D C", "R D -> D R"),
        halves="R",
    ),
    Map("attn/kv_norm", "self_attn.kv_a_layernorm.weight", "C"),
    Map(("attn/k_up", "attn/v_up"), "self_attn.kv_b_proj.weight", ("(N H) C -> C N H", "(N W) C -> C N W"), join=1),
    PROJECTIONS[3],
)
SHARED = tuple(
    Map(f"moe/shared/{name}", f"mlp.shared_experts.{name}_proj.weight", axes)
    for name, axes in (("gate", "F D -> D F"), ("up", "F D -> D F"), ("down", "D F -> F D"))
)
BIAS = (Map("moe/bias", "mlp.gate.e_score_correction_bias", "E"),)


def _family(name, architecture, read, write, layer) -> Family:
    return Family(
        name=name,
        architectures=(architecture,),
        model_types=(name,),
        read=read,
        write=write,
        layer=layer,
        top=TOP,
        beyond=True,
    )


FAMILIES = (
    _family("deepseek_v2", "DeepseekV2ForCausalLM", read2, write2, LATENT + MLP + EXPERTS + SHARED + PRE_NORMS),
    _family("deepseek_v3", "DeepseekV3ForCausalLM", read3, write3, LATENT + MLP + EXPERTS + SHARED + BIAS + PRE_NORMS),
)
