"""AWQ: a layer with scaled weights computes the same, and loses less when it is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule, RoundToNearest, quantize_plan
from jaxllm.compress.awq import pairs, rescale, search
from jaxllm.compress.calibrate import Stats, layer_of
from jaxllm.model.change import forms
from jaxllm.weights.form import Form
from jaxllm.weights.quantized import quantize

LATENT = {"heads": 4, "head": 8, "latent": {"kv_rank": 16, "q_rank": 24, "rope_head": 4, "v_head": 8}}
#: name: (a model of one layer, the sources that are scaled down)
LAYERS = {
    "llama": (tiny.config(layers=1), ["attn_norm/scale", "attn/v", "mlp_norm/scale", "mlp/up"]),
    "biases": (
        tiny.config({"qkv_bias": True, "qk_norm": "head"}, {"bias": True}, layers=1, norm="layer"),
        ["attn_norm/scale", "attn/v", "mlp_norm/scale", "mlp/up"],
    ),
    "gelu": (
        tiny.config({"kv_heads": 4}, {"activation": "gelu"}, layers=1, norm="layer"),
        ["attn_norm/scale", "attn/v", "mlp_norm/scale"],
    ),
    "gemma": (
        tiny.config(mlp={"activation": "geglu_tanh"}, layers=1, norm="rms_unit_offset", norm_placement="both"),
        ["attn_norm/scale", "attn/v", "mlp_norm/scale", "mlp/up"],
    ),
    "post": (tiny.config({"qk_norm": "all"}, layers=1, norm_placement="post"), ["attn/v", "mlp/up"]),
    "experts": (
        tiny.config(layers=1, moe={"shared_ffw": 16, "bias": True, "router_bias": True}),
        ["attn_norm/scale", "attn/v", "mlp_norm/scale", "moe/up", "moe/shared/up"],
    ),
    "clamped": (
        tiny.config(layers=1, moe={"activation": "swiglu_clamped"}),
        ["attn_norm/scale", "attn/v", "mlp_norm/scale"],
    ),
    "latent": (
        tiny.config(layers=1, pattern=[{"attn": LATENT, "mlp": {"ffw": 48}}]),
        ["attn_norm/scale", "attn/q_norm", "attn/kv_norm", "attn/v_up", "mlp_norm/scale", "mlp/up"],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_scaled_layer_computes_the_same(name):
    """With statistics in which a few inputs are large, so that every source is scaled."""
    config, sources = LAYERS[name]
    model = tiny.one_device(config)
    assert [pair.source for pair in pairs(config, config.pattern[0])] == sources
    plan = quantize_plan(model, QuantizeConfig(rules=(QuantizeRule(format="int4", group=8, method="awq"),)))
    of = {path.removeprefix("layers/0/"): form for path, form in forms(model).items() if path.startswith("layers/0/")}
    steps = {path: plan(f"layers/0/{path}", form) for path, form in of.items() if form is not None}
    rng, stats = np.random.default_rng(0), {}
    for path, step in steps.items():
        size = np.where(np.arange(step.form.inputs) % 7 == 3, 20.0, 1.0) * np.ones((*step.form.experts, 1))
        gram = jnp.asarray(size[..., None] ** 2 * np.eye(step.form.inputs), jnp.float32)
        stats[path] = Stats(gram, jnp.asarray(size), jnp.asarray(size)[..., None, :])
    weights = layer_of(tiny.weights(model), model.layers[0])
    flat = tree.flatten(weights)
    new = rescale(flat, stats, steps, of, config, config.pattern[0])
    scaled = {path for path in flat if tiny.relative(new[path], flat[path]) > 1e-3}
    readers = {path for pair in pairs(config, config.pattern[0]) for path in pair.readers}
    assert readers | set(sources) <= scaled
    assert {path: w.shape for path, w in new.items()} == {path: w.shape for path, w in flat.items()}
    x = jnp.asarray(rng.standard_normal((2, 8, 32)), jnp.float32)
    where = dict(positions_BT=jnp.broadcast_to(jnp.arange(8), (2, 8)))
    run = jax.jit(lambda weights: model.layer("layers", "0", weights, x, **where) - x)
    assert tiny.relative(run(tree.map_with_path(lambda path, _: new[path], weights)), run(weights)) < 1e-4


def test_the_search_loses_less_than_rounding_to_nearest_where_a_few_inputs_are_large():
    rng, form = np.random.default_rng(0), Form("io", (32, 24))
    w = jnp.asarray(rng.standard_normal((32, 24)), jnp.float32)
    x = rng.standard_normal((200, 32)) * np.where(np.arange(32) % 16 == 3, 30, 1)
    gram, step = x.T @ x, RoundToNearest(form, "int4", 16, False, True, False, None, "awq")

    def loss(s):
        rounded = np.float64(quantize(w * s[:, None], form, "int4", group=16).dense(jnp.float32)) / s[:, None]
        return np.sum(((rounded - np.float64(w)).T @ gram) * (rounded - np.float64(w)).T)

    stats = Stats(jnp.asarray(gram, jnp.float32), jnp.abs(x).sum(0), jnp.asarray(x, jnp.float32))
    s = np.float64(search(stats.size_I, [w], [stats], (step,)))
    assert loss(s) < 0.4 * loss(np.ones(32))
    assert s[3] > 2 * s[4] and s[19] > 2 * s[4]
    flat = search(jnp.ones(32), [w], [stats], (step,))
    np.testing.assert_allclose(flat, 1, rtol=1e-6)  # nothing to go by, and nothing scaled


def test_with_integer_activations_the_search_evens_them_out():
    """Against the integer product itself; int8 weights alone would leave everything as it is, or nearly."""
    rng, form = np.random.default_rng(0), Form("io", (64, 24))
    w = jnp.asarray(rng.standard_normal((64, 24)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((256, 64)) * np.where(np.arange(64) == 3, 200, 1), jnp.float32)
    stats = Stats(x.T @ x, jnp.abs(x).sum(0), x[::4])
    exact = np.float64(x) @ np.float64(w)

    def loss(s):
        rounded = quantize(w * s[:, None], form, "int8", activations="int8")
        return np.sum((np.float64(rounded.einsum("MI,IO->MO", x / s)) - exact) ** 2)

    step = RoundToNearest(form, "int8", None, False, True, False, "int8", "awq")
    s = search(jnp.max(jnp.abs(x), axis=0), [w], [stats], (step,))
    assert loss(s) < 0.05 * loss(jnp.ones(64))
