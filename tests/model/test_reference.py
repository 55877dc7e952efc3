"""The model against an independent decoder in float64, over settings that together cover every mechanism."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from model.reference import forward

from jaxllm.config import parse, to_dict
from jaxllm.model.spec import ModelConfig

YARN = {"scaling": "yarn", "factor": 4.0, "original_context": 8, "base": 100.0, "beta_fast": 0.25, "beta_slow": 0.02}
LLAMA3 = {"scaling": "llama3", "factor": 4.0, "original_context": 16, "base": 100.0}
LONG = {
    "scaling": "longrope",
    "factor": 4.0,
    "original_context": 16,
    "fraction": 0.5,
    "short_factors": [1.0, 1.3],
    "long_factors": [1.7, 9.0],
}
LATENT = {"kv_heads": None, "head": 6, "latent": {"kv_rank": 12, "rope_head": 4, "v_head": 5}}
GROUPS = {"experts": 8, "experts_per_token": 3, "groups": 4, "groups_per_token": 2}
CLAMPED = {"activation": "swiglu_clamped", "bias": True, "router_bias": True}
SIGMOID = {"score": "sigmoid", "scale": 2.5, "shared_ffw": 16, "balance": "bias"}

CONFIGS = {
    "plain": tiny.config(),
    "gpt2": tiny.config(
        {"rope": None, "kv_heads": None, "qkv_bias": True, "out_bias": True},
        {"activation": "gelu", "bias": True},
        norm="layer",
        positions="learned",
        tied=True,
        vocab_multiple=8,
    ),
    "gemma2": tiny.config(
        pattern=[
            tiny.layer({"softcap": 2.0, "window": 6}, {"activation": "geglu_tanh"}),
            tiny.layer({"softcap": 2.0, "rope": {"base": 500.0}}, {"activation": "geglu_tanh", "bias": True}),
        ],
        layers=3,
        norm_placement="both",
        embed_scale=5.65,
        logit_softcap=5.0,
        tied=True,
    ),
    "olmo2": tiny.config({"qk_norm": "all", "rope": YARN}, norm_placement="post", norm_eps=1e-2),
    "qwen3": tiny.config({"qk_norm": "head", "kv_heads": 1, "head": 12, "rope": LLAMA3}, layers=3),
    "gpt_oss": tiny.config(
        {"sinks": True, "window": 7, "qkv_bias": True, "out_bias": True, "rope": YARN | {"attention_factor": 1.5}},
        moe={"activation": "swiglu", "experts": 5},
    ),
    "bloom": tiny.config(
        {"alibi": True, "rope": None, "heads": 6, "kv_heads": 3, "head": 8}, {"activation": "relu2"}, norm="layer"
    ),
    "sinusoidal": tiny.config(
        {"rope": None, "kv_heads": 1, "scale": 0.5},
        {"activation": "geglu"},
        positions="sinusoidal",
        vocab_multiple=64,
    ),
    "linear_partial": tiny.config(
        {"rope": {"scaling": "linear", "factor": 3.0, "fraction": 0.5}}, {"activation": "gelu_tanh"}
    ),
    "ntk": tiny.config({"rope": {"scaling": "ntk", "factor": 3.0, "base": 100.0}}),
    "dynamic_ntk": tiny.config(
        {"rope": {"scaling": "dynamic_ntk", "factor": 4.0, "original_context": 8, "base": 100.0}}
    ),
    "deepseek": tiny.config(prefix=[tiny.layer()], layers=3, moe=SIGMOID),
    "olmoe": tiny.config(
        pattern=[tiny.layer(), tiny.layer(moe={"renormalize": False, "experts_per_token": 3})], layers=5
    ),
    "gemma3": tiny.config(
        pattern=[
            tiny.layer({"qk_norm": "head", "window": 6}, {"activation": "geglu_tanh"}),
            tiny.layer({"qk_norm": "all", "rope": {"base": 500.0, "scaling": "linear", "factor": 8.0}}),
        ],
        layers=3,
        norm="rms_unit_offset",
        norm_placement="both",
    ),
    "phi3": tiny.config({"rope": LONG}),
    "gpt_oss_experts": tiny.config(
        {"rope": YARN | {"truncate": False}, "sinks": True}, moe=CLAMPED | {"experts": 5, "shared_ffw": 16}
    ),
    "biases_and_capacity": tiny.config(moe=CLAMPED | {"capacity_factor": 0.6}),
    "deepseek_v2": tiny.config(
        LATENT | {"rope": YARN, "scale": 0.4},
        prefix=[tiny.layer(LATENT | {"rope": YARN})],
        layers=3,
        moe=GROUPS | {"renormalize": False, "group_score": "max"},
    ),
    "deepseek_v3": tiny.config(
        LATENT | {"latent": LATENT["latent"] | {"q_rank": 8, "norm_eps": 0.01}},
        moe=SIGMOID | GROUPS | {"group_score": "top2"},
    ),
    "latent_and_more": tiny.config(
        LATENT | {"rope": None, "alibi": True, "window": 7, "softcap": 2.0, "sinks": True, "out_bias": True},
        norm="rms_unit_offset",
    ),
    "capacity": tiny.config(moe={"capacity_factor": 0.6, "activation": "gelu"}),
}

PATTERN = "pattern.0"
#: A config, and one of its settings with another value: the logits must move.
CHANGES = [
    ("plain", f"{PATTERN}.attn.rope.base", 100.0),
    ("plain", f"{PATTERN}.mlp.activation", "geglu"),
    ("gpt2", "positions", "none"),
    ("gpt2", "positions", "sinusoidal"),
    ("gpt2", "norm", "rms"),
    ("gpt2", f"{PATTERN}.attn.qkv_bias", False),
    ("gpt2", f"{PATTERN}.attn.out_bias", False),
    ("gpt2", f"{PATTERN}.mlp.bias", False),
    ("gpt2", f"{PATTERN}.mlp.activation", "gelu_tanh"),
    ("gpt2", f"{PATTERN}.mlp.activation", "relu2"),
    ("gemma2", f"{PATTERN}.attn.window", None),
    ("gemma2", f"{PATTERN}.attn.window", 7),
    ("gemma2", f"{PATTERN}.attn.softcap", None),
    ("gemma2", f"{PATTERN}.mlp.activation", "geglu"),
    ("gemma2", "pattern.1.attn.rope.base", 10_000.0),
    ("gemma2", "pattern.1.mlp.bias", False),
    ("gemma2", "norm_placement", "pre"),
    ("gemma2", "norm_placement", "post"),
    ("gemma2", "embed_scale", None),
    ("gemma2", "logit_softcap", None),
    ("olmo2", "norm_eps", 1e-6),
    ("olmo2", f"{PATTERN}.attn.qk_norm", None),
    ("olmo2", f"{PATTERN}.attn.rope.beta_fast", 0.1),
    ("olmo2", f"{PATTERN}.attn.rope.beta_slow", 0.1),
    ("olmo2", f"{PATTERN}.attn.rope.factor", 2.0),
    ("qwen3", f"{PATTERN}.attn.qk_norm", None),
    ("qwen3", f"{PATTERN}.attn.rope.factor", 2.0),
    ("qwen3", f"{PATTERN}.attn.rope.original_context", 32),
    ("qwen3", f"{PATTERN}.attn.rope.low_freq_factor", 0.5),
    ("qwen3", f"{PATTERN}.attn.rope.high_freq_factor", 8.0),
    ("gpt_oss", f"{PATTERN}.attn.sinks", False),
    ("gpt_oss", f"{PATTERN}.attn.rope.attention_factor", None),
    ("gpt_oss", f"{PATTERN}.moe.experts_per_token", 1),
    ("bloom", f"{PATTERN}.attn.alibi", False),
    ("sinusoidal", "positions", "none"),
    ("sinusoidal", f"{PATTERN}.attn.scale", None),
    ("linear_partial", f"{PATTERN}.attn.rope.factor", 1.0),
    ("linear_partial", f"{PATTERN}.attn.rope.fraction", 1.0),
    ("ntk", f"{PATTERN}.attn.rope.factor", 1.0),
    ("dynamic_ntk", f"{PATTERN}.attn.rope.factor", 1.0),
    ("deepseek", f"{PATTERN}.moe.balance", "none"),
    ("deepseek", f"{PATTERN}.moe.scale", 1.0),
    ("deepseek", f"{PATTERN}.moe.score", "softmax"),
    ("deepseek", f"{PATTERN}.moe.renormalize", False),
    ("deepseek", f"{PATTERN}.moe.shared_ffw", 0),
    ("olmoe", "pattern.1.moe.renormalize", True),
    ("gemma3", "norm", "rms"),
    ("phi3", f"{PATTERN}.attn.rope.short_factors", [1.0, 2.0]),
    ("phi3", f"{PATTERN}.attn.rope.long_factors", [1.7, 3.0]),
    ("phi3", f"{PATTERN}.attn.rope.original_context", 30),
    ("phi3", f"{PATTERN}.attn.rope.original_context", 9),
    ("phi3", f"{PATTERN}.attn.rope.factor", 1.0),
    ("gpt_oss_experts", f"{PATTERN}.attn.rope.truncate", True),
    ("gpt_oss_experts", f"{PATTERN}.attn.rope.attention_factor", 0.0),
    ("gpt_oss_experts", f"{PATTERN}.moe.activation", "swiglu"),
    ("gpt_oss_experts", f"{PATTERN}.moe.bias", False),
    ("gpt_oss_experts", f"{PATTERN}.moe.router_bias", False),
    ("biases_and_capacity", f"{PATTERN}.moe.bias", False),
    ("biases_and_capacity", f"{PATTERN}.moe.router_bias", False),
    ("deepseek_v2", f"{PATTERN}.attn.scale", None),
    ("deepseek_v2", f"{PATTERN}.attn.rope.factor", 2.0),
    ("deepseek_v2", f"{PATTERN}.moe.groups_per_token", 3),
    ("deepseek_v2", f"{PATTERN}.moe.group_score", "top2"),
    ("deepseek_v3", f"{PATTERN}.attn.rope.base", 100.0),
    ("deepseek_v3", f"{PATTERN}.attn.latent.norm_eps", 1e-6),
    ("deepseek_v3", f"{PATTERN}.moe.groups_per_token", 4),
    ("deepseek_v3", f"{PATTERN}.moe.group_score", "max"),
    ("deepseek_v3", f"{PATTERN}.moe.balance", "none"),
    ("latent_and_more", f"{PATTERN}.attn.window", None),
    ("latent_and_more", f"{PATTERN}.attn.softcap", None),
    ("latent_and_more", f"{PATTERN}.attn.sinks", False),
    ("latent_and_more", f"{PATTERN}.attn.alibi", False),
    ("latent_and_more", f"{PATTERN}.attn.out_bias", False),
    ("latent_and_more", "norm", "rms"),
    ("capacity", f"{PATTERN}.moe.capacity_factor", None),
    ("capacity", f"{PATTERN}.moe.capacity_factor", 0.3),
]


@functools.cache
def rows():
    """One long document, past every original context; then two documents and padding."""
    segments = np.array([[1] * 24, [1] * 10 + [2] * 9 + [0] * 5])
    return tiny.packed(np.random.default_rng(3).integers(0, tiny.VOCAB, segments.shape), segments)


@functools.cache
def computed(name: str):
    """`(weights in float64, logits of the model)`."""
    model = tiny.one_device(CONFIGS[name])
    params = tiny.weights(model)
    logits = jax.jit(model.logits)(params, rows().tokens_BT, **tiny.where(rows()))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params), np.asarray(logits)


def expected(params, config):
    batch = jax.tree.map(np.asarray, rows())
    return forward(params, config, batch.tokens_BT, batch.positions_BT, batch.segments_BT)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_an_independent_decoder(name):
    params, logits = computed(name)
    config, real = CONFIGS[name], np.asarray(rows().segments_BT) > 0
    assert tiny.relative(logits[..., : config.vocab][real], expected(params, config)[real]) < 1e-5
    assert np.all(logits[..., config.vocab :] < -1e29)


@pytest.mark.parametrize("name,path,value", CHANGES, ids=lambda x: str(x).removeprefix("pattern."))
def test_no_setting_is_ignored(name, path, value):
    """With this setting changed the independent decoder disagrees with the model, on the same weights."""
    params, logits = computed(name)
    raw = to_dict(CONFIGS[name])
    *keys, last = path.split(".")
    inner = raw
    for key in keys:
        inner = inner[int(key)] if key.isdigit() else inner[key]
    assert inner[last] != value
    inner[last] = value
    other = expected(params, parse(ModelConfig, raw))
    real = np.asarray(rows().segments_BT) > 0
    assert tiny.relative(logits[..., : tiny.VOCAB][real], other[real]) > 1e-4


@pytest.mark.fast
def test_bfloat16_stays_near_float32():
    params, logits = computed("gemma2")
    model = tiny.one_device(dataclasses.replace(CONFIGS["gemma2"], dtype="bfloat16"))
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    low = jax.jit(model.logits)(params, rows().tokens_BT, **tiny.where(rows()))
    assert low.dtype == np.float32
    assert 1e-5 < tiny.relative(low, logits) < 0.1
