"""Calibrated quantisation of whole models: what the plan describes, and nearer to the model than rounding is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule, quantize_plan
from jaxllm.compress.calibrate import Flow, layer_of
from jaxllm.compress.quantize import errors_of, needed_tokens, quantize_calibrated
from jaxllm.errors import SettingsError
from jaxllm.model.build import build
from jaxllm.model.change import change, changed, weights_of
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.weights.quantized import Quantized

TEXT = tiny.packed(np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 48)), np.ones((8, 48)))
CONFIG = tiny.config(prefix=[tiny.layer()], layers=3, moe={}, vocab_multiple=8)


def config_of(*rules, **options):
    return QuantizeConfig(rules=tuple(QuantizeRule(**rule) for rule in rules), **options)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, pytest.param({"fsdp": 4, "expert": 2}, marks=pytest.mark.slow)])
def test_methods_by_rule_give_what_the_plan_describes(mesh, monkeypatch):
    """GPTQ in order, AWQ and rounding in one model, on one device and on eight."""
    model = build(CONFIG, make_sharding(ParallelConfig(**mesh))) if mesh else tiny.one_device(CONFIG)
    params = tiny.weights(model)
    rules = (
        dict(pattern="embed,head", format="int8"),
        dict(pattern="layers/**/attn/*", format="int4", group=8, method="awq", double=True),
        dict(pattern="prefix/0/mlp/gate", format="int8"),
        dict(pattern="layers/**", format="int4", group=8, method="gptq", ordered=True),
    )
    config, said, passed = config_of(*rules), [], []
    advance = Flow.advance
    monkeypatch.setattr(Flow, "advance", lambda *args: (passed.append(args[1:]), advance(*args)))
    new, errors = quantize_calibrated(model, params, config, [TEXT], said.append)
    assert [where for where, _ in passed] == model.layers
    for where, weights in passed:  # the text reaches a layer through those before it as they will be
        assert tiny.bit_equal(weights, layer_of(new, where))
    after = changed(model, quantize_plan(model, config))
    assert jax.tree.structure(new) == jax.tree.structure(after.abstract)
    for found, expected in zip(jax.tree.leaves(new), jax.tree.leaves(after.abstract), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)
    quantised = {path: w for path, w in weights_of(new).items() if isinstance(w, Quantized)}
    assert set(errors) == set(quantised) and said[-1] == "layer 3 of 3"
    assert all(len(values) == (2 if path.startswith("layers") else 1) for path, values in errors.items())
    assert not tiny.bit_equal(new["layers"]["0"]["attn_norm"], params["layers"]["0"]["attn_norm"])
    assert tiny.bit_equal(new["norm"], params["norm"])


def correlated(path, w):
    """Embeddings in a few directions, so that what reaches a weight is correlated."""
    if path != "embed":
        return w
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((w.shape[0], 4)) @ rng.standard_normal((4, w.shape[1])) / 2, jnp.float32)


def outliers(path, w):
    """Some activations are large, and meet small weights; the model computes the same."""
    scale = np.where(np.arange(32) % 11 == 3, 8, 1).astype(np.float32)
    if path.endswith(("attn_norm/scale", "mlp_norm/scale")):
        return w * scale
    reads = path.endswith(("/q", "/k", "/v", "/gate", "/up"))
    return w / scale.reshape(32, *[1] * (w.ndim - 2)) if reads else w


@pytest.mark.slow
@pytest.mark.parametrize("method, make, share", [("gptq", correlated, 0.7), ("awq", outliers, 0.7)])
def test_logits_are_nearer_to_those_of_the_model_than_with_rounding(method, make, share):
    model, rule = tiny.one_device(tiny.config(layers=2)), dict(format="int4", group=16)
    params = tree.map_with_path(make, tiny.weights(model))
    nearest = change(model, quantize_plan(model, config_of(rule)), params)
    new, _ = quantize_calibrated(model, params, config_of(rule | {"method": method}), [TEXT])
    run = jax.jit(lambda params: model.logits(params, TEXT.tokens_BT, **tiny.where(TEXT)))
    expected = np.asarray(run(params))
    assert np.linalg.norm(run(new) - expected) < share * np.linalg.norm(run(nearest) - expected)


def test_errors_of_rounding_are_those_of_the_weights():
    model = tiny.one_device(tiny.config(layers=2, tied=True))
    params = tiny.weights(model)
    new = change(model, quantize_plan(model, config_of(dict(pattern="embed,**/up", format="int4", group=16))), params)
    errors = errors_of(params, new)
    assert {path: len(values) for path, values in errors.items()} == {"embed": 1, "layers/0/mlp/up": 2}
    up = new["layers"]["0"]["mlp"]["up"]
    for layer, error in enumerate(errors["layers/0/mlp/up"]):
        w = np.float64(params["layers"]["0"]["mlp"]["up"][layer])
        q = np.float64(jax.tree.map(lambda x, i=layer: x[i], up).dense(jnp.float32))
        np.testing.assert_allclose(error, np.linalg.norm(q - w) / np.linalg.norm(w), rtol=1e-4)


def test_what_cannot_be_calibrated_says_so():
    model = tiny.one_device(tiny.config(layers=2))
    params = tiny.weights(model)
    gptq = config_of(dict(format="int4", group=8, method="gptq"))
    assert needed_tokens(model, gptq) == 48 and needed_tokens(model, config_of(dict(format="int8"))) == 0
    with pytest.raises(SettingsError, match="layers/0/attn/k: method=gptq needs calibration text: use jaxllm quantize"):
        change(model, quantize_plan(model, gptq), params)
    with pytest.raises(SettingsError, match="head: rows of a table.*method=nearest"):
        quantize_calibrated(model, params, config_of(dict(pattern="head", format="int8", method="gptq")), [TEXT])
    eight = config_of(dict(pattern="head", format="int8"))
    half, rounded = (f(model, quantize_plan(model, eight), *x) for f, x in ((changed, ()), (change, (params,))))
    with pytest.raises(SettingsError, match="head is no plain array"):
        quantize_calibrated(half, rounded, gptq, [TEXT])
