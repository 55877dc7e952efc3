"""What most families share: the keys of a Llama-like config.json, RoPE in both of its spellings, and weight names."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import SettingsError
from jaxllm.families.base import Map
from jaxllm.families.keys import Keys
from jaxllm.model.spec import AttnSpec, LayerSpec, MlpSpec, ModelConfig, RopeSpec, fold

GATED = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
}

PROJECTIONS = (
    Map("attn/q", "self_attn.q_proj.weight", "(N H) D -> D N H"),
    Map("attn/k", "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Map("attn/v", "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Map("attn/o", "self_attn.o_proj.weight", "D (N H) -> N H D"),
    Map("attn/q_bias", "self_attn.q_proj.bias", "(N H) -> N H"),
    Map("attn/k_bias", "self_attn.k_proj.bias", "(K H) -> K H"),
    Map("attn/v_bias", "self_attn.v_proj.bias", "(K H) -> K H"),
    Map("attn/o_bias", "self_attn.o_proj.bias", "D"),
)
QK_NORM_HEAD = (
    Map("attn/q_norm", "self_attn.q_norm.weight", "H"),
    Map("attn/k_norm", "self_attn.k_norm.weight", "H"),
)
QK_NORM_ALL = (
    Map("attn/q_norm", "self_attn.q_norm.weight", "(N H) -> N H"),
    Map("attn/k_norm", "self_attn.k_norm.weight", "(K H) -> K H"),
)
MLP = (
    Map("mlp/gate", "mlp.gate_proj.weight", "F D -> D F"),
    Map("mlp/up", "mlp.up_proj.weight", "F D -> D F"),
    Map("mlp/down", "mlp.down_proj.weight", "D F -> F D"),
    Map("mlp/gate_bias", "mlp.gate_proj.bias", "F"),
    Map("mlp/up_bias", "mlp.up_proj.bias", "F"),
    Map("mlp/down_bias", "mlp.down_proj.bias", "D"),
)
EXPERTS = (
    Map("moe/router", "mlp.gate.weight", "E D -> D E"),
    Map("moe/gate", "mlp.experts.{e}.gate_proj.weight", "F D -> D F"),
    Map("moe/up", "mlp.experts.{e}.up_proj.weight", "F D -> D F"),
    Map("moe/down", "mlp.experts.{e}.down_proj.weight", "D F -> F D"),
)
PRE_NORMS = (
    Map("attn_norm/scale", "input_layernorm.weight", "D"),
    Map("mlp_norm/scale", "post_attention_layernorm.weight", "D"),
)
POST_NORMS = (
    Map("attn_post_norm/scale", "post_attention_layernorm.weight", "D"),
    Map("mlp_post_norm/scale", "post_feedforward_layernorm.weight", "D"),
)
TOP = (
    Map("embed", "embed_tokens.weight", "V D"),
    Map("norm/scale", "norm.weight", "D"),
    Map("head", "/lm_head.weight", "V D"),
)


@dataclasses.dataclass(frozen=True)
class Base:
    """The keys that every Llama-like config.json has."""

    vocab: int
    embed: int
    layers: int
    context: int
    ffw: int
    heads: int
    kv_heads: int
    head: int
    eps: float
    tied: bool

    def attn(self, **more) -> AttnSpec:
        return AttnSpec(heads=self.heads, kv_heads=self.kv_heads, head=self.head, **more)

    def config(self, specs: Sequence[LayerSpec], **more) -> ModelConfig:
        """The model with one spec for each layer."""
        prefix, pattern = fold(specs)
        shared = dict(vocab=self.vocab, embed=self.embed, layers=self.layers, context=self.context)
        shared |= dict(norm_eps=self.eps, tied=self.tied, prefix=prefix, pattern=pattern)
        return ModelConfig(**(shared | more))


def read_base(keys: Keys, *, eps=1e-6, tied=False, context=2048, kv_heads: int | None = None, head=None) -> Base:
    """The shared keys; arguments are the family's defaults for keys that config.json leaves out."""
    embed, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    if "head_dim" not in keys and head is None and embed % heads:
        raise SettingsError(f"{keys.where}: hidden_size={embed} does not divide by num_attention_heads={heads}")
    return Base(
        vocab=keys.number("vocab_size"),
        embed=embed,
        layers=keys.number("num_hidden_layers"),
        context=keys.number("max_position_embeddings", context),
        ffw=keys.number("intermediate_size"),
        heads=heads,
        kv_heads=keys.number("num_key_value_heads", kv_heads or heads),
        head=keys.number("head_dim", head or embed // heads),
        eps=keys.number("rms_norm_eps", eps, 0, float),
        tied=keys.flag("tie_word_embeddings", tied),
    )


def read_mlp(keys: Keys, ffw: int, *, key="hidden_act", default="silu", bias=False) -> MlpSpec:
    return MlpSpec(ffw=ffw, activation=activation(keys, key, default), bias=bias)


def activation(keys: Keys, key="hidden_act", default="silu") -> str:
    keys.expect(key, *GATED)
    return GATED[keys.get(key, default)]


def layer_types(keys: Keys, layers: int, default: Sequence[bool]) -> list[bool]:
    """Whether each layer has a sliding window: from `layer_types`, else the family's rule."""
    if "layer_types" not in keys:
        return list(default)
    given = keys.get("layer_types")
    known = {"sliding_attention": True, "full_attention": False}
    bad = [kind for kind in given if kind not in known]
    if bad or len(given) != layers:
        what = f"{bad[0]!r} (known: {', '.join(known)})" if bad else f"{len(given)} entries for {layers} layers"
        raise SettingsError(f"{keys.where}: layer_types has {what}")
    return [known[kind] for kind in given]


def read_rope(keys: Keys, context: int, *, base=10_000.0, kind: str | None = None) -> RopeSpec:
    """RoPE as transformers 4 writes it (`rope_theta` and `rope_scaling`) or as 5 does (`rope_parameters`).

    `kind`: the layer type whose entry of `rope_parameters` is meant, in families that have several.
    Raises SettingsError for a scaling, or a key of one, that is not known.
    """
    if "rope_parameters" in keys:
        rope = keys.section("rope_parameters")
        if kind is not None and kind in rope:
            rope = rope.section(kind)
        base = rope.number("rope_theta", keys.number("rope_theta", base, 0, float), 0, float)
    else:
        base = keys.number("rope_theta", base, 0, float)
        rope = keys.section("rope_scaling") if "rope_scaling" in keys else Keys({}, keys.where)
    fraction = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0, 0, float), 0, float)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    rope.ignore("type", "the old name of rope_type")
    if scaling not in SCALINGS:
        raise SettingsError(f"{rope.where}: rope_type={scaling!r} is not known; known: {', '.join(SCALINGS)}")
    more = SCALINGS[scaling](keys, rope, context)
    rope.finish()
    return RopeSpec(base=base, fraction=fraction, **more)


def _plain(keys: Keys, rope: Keys, context: int) -> dict[str, Any]:
    return {}


def _linear(keys, rope, context):
    return dict(scaling="linear", factor=rope.number("factor", kind=float))


def _dynamic(keys, rope, context):
    rope.ignore("original_max_position_embeddings", "transformers reads max_position_embeddings here")
    return dict(scaling="dynamic_ntk", factor=rope.number("factor", kind=float), original_context=context)


def _original(keys, rope, context) -> tuple[int, float]:
    """Context before scaling, and the factor: its own key, or the ratio of the two contexts."""
    top = keys.number("original_max_position_embeddings", context)
    original = rope.number("original_max_position_embeddings", top)
    return original, rope.number("factor", context / original, 0, float)


def _yarn(keys, rope, context):
    original, factor = _original(keys, rope, context)
    mscale, all_dim = (rope.number(key, 0.0, 0, float) for key in ("mscale", "mscale_all_dim"))
    given = rope.number("attention_factor", None, 0, float)
    if given is None and mscale and all_dim:
        given = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return dict(
        scaling="yarn",
        factor=factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0, 0, float),
        beta_slow=rope.number("beta_slow", 1.0, 0, float),
        attention_factor=given,
        truncate=rope.flag("truncate", True),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 m ln(s) + 1 (YaRN, arXiv 2309.00071, equation 22, with DeepSeek-V2's m)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3(keys, rope, context):
    original, factor = _original(keys, rope, context)
    low, high = (rope.number(key, None, 0, float) for key in ("low_freq_factor", "high_freq_factor"))
    if low is None or high is None:
        raise SettingsError(f"{rope.where}: rope_type=llama3 needs low_freq_factor and high_freq_factor")
    return dict(scaling="llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high)


def _longrope(keys, rope, context):
    original, factor = _original(keys, rope, context)
    short, long = (tuple(map(float, rope.get(key))) for key in ("short_factor", "long_factor"))
    given = rope.number("attention_factor", None, 0, float)
    return dict(
        scaling="longrope",
        factor=max(factor, 1.0) if given is None else 1.0,  # it only says what the attention factor is by default
        original_context=original,
        short_factors=short,
        long_factors=long,
        attention_factor=given,
    )


SCALINGS = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,
}


def write_base(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The shared keys of config.json. What it cannot say is found when the result is read back."""
    spec = config.layer_specs[-1]
    attn, part = spec.attn, spec.mlp or spec.moe
    keys = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads or attn.heads,
        "head_dim": config.head_dim(attn),
        "intermediate_size": part.ffw,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu"}.get(part.activation, "gelu_pytorch_tanh"),
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    }
    ropes = [s.attn.rope for s in config.layer_specs if s.attn.rope is not None]
    return keys | (write_rope(ropes[0]) if ropes else {})


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every reader of config.json knows."""
    names = {
        "linear": ("factor",),
        "dynamic_ntk": ("factor",),
        "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
        "longrope": ("original_context", "short_factors", "long_factors", "attention_factor", "factor"),
    }
    theirs = {
        "original_context": "original_max_position_embeddings",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
    }
    keys: dict[str, Any] = {"rope_theta": rope.base}
    if rope.fraction != 1:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.scaling in names:
        kind = {"dynamic_ntk": "dynamic"}.get(rope.scaling, rope.scaling)
        values = {theirs.get(name, name): getattr(rope, name) for name in names[rope.scaling]}
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
        keys["rope_scaling"] = {"rope_type": kind} | values
    return keys
