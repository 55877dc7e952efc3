"""Weights that train as floats and are used rounded: what they compute, and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.adapt.changes import Change, after
from jaxllm.errors import SettingsError
from jaxllm.model.change import change
from jaxllm.weights.form import Form
from jaxllm.weights.rounded import Rounded

BATCH = tiny.batch()
FORM = Form("io", (16, 6))


def made(model, params, *changes):
    """`(model, params)` after the changes."""
    for one in changes:
        params, model = change(model, one.plan(model), params), after(model, (one,))
    return model, params


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("config", [tiny.DENSE, tiny.MOE], ids=["dense", "moe"])
def test_what_is_trained_is_what_will_be_stored(config, activations):
    model = tiny.one_device(config, unroll=0)
    qat = {"rules": [{"format": "int8", "pattern": "**"}], "activations": activations}
    trained = made(model, tiny.weights(model), Change(qat=qat))
    stored = made(*trained, Change(store=True))
    shapes = jax.tree.structure(after(model, (Change(quantize=qat),)).abstract)
    assert jax.tree.structure(stored[1]) == shapes, "as if quantised after training"
    one, two = (
        jax.jit(m.logits)(p, BATCH.tokens_BT, **tiny.where(BATCH))[..., : tiny.VOCAB] for m, p in (trained, stored)
    )
    assert tiny.relative(one, two) < 1e-5


@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_gradient_is_that_of_the_products_as_if_nothing_were_rounded(activations):
    """d(weight) = x^T dy on the float x; d(x) = dy W^T; the result itself is of rounded numbers."""
    rng = np.random.default_rng(0)
    w, x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 6), (3, 16), (3, 6)))
    weight = Rounded(jnp.asarray(w), FORM, "int4", 8, True, activations)
    y, pull = jax.vjp(lambda x, weight: weight.einsum("BD,DF->BF", x), jnp.asarray(x), weight)
    dx, d_weight = pull(jnp.asarray(dy))
    used = np.asarray(weight.quantized().dense(jnp.float32))
    assert 0.02 < tiny.relative(used, w) < 0.2
    assert tiny.relative(y, x @ used) < (0.02 if activations else 1e-6)
    assert tiny.relative(dx, dy @ (w if activations else used).T) < 1e-6
    assert tiny.relative(d_weight.float, x.T @ dy) < 1e-6


def test_only_rounding_to_nearest_is_trained_for():
    model = tiny.one_device(tiny.DENSE)
    for rule in ({"format": "nf4", "group": 8, "double": True}, {"format": "int4", "group": 8, "method": "gptq"}):
        with pytest.raises(SettingsError, match="weights in training are rounded to nearest"):
            after(model, (Change(qat={"rules": [rule]}),))
    with pytest.raises(SettingsError, match="no weight was trained for a number format"):
        after(model, (Change(store=True),))
