"""Pruned weights: which values become zero, what is computed with the others, and what gradient they get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.weights import seam
from jaxllm.weights.form import form_of
from jaxllm.weights.pruned import Pruned, prune, scores

#: Axes, shape and equation of a weight; the last axis is not always whole bytes of the mask.
WEIGHTS = {
    "q": (("embed", "heads", "head"), (16, 2, 6), "BTD,DNH->BTNH"),
    "o": (("heads", "head", "embed"), (2, 6, 16), "BTNH,NHD->BTD"),
    "down": (("ffw", "embed"), (12, 10), "BTF,FD->BTD"),
    "expert": (("expert", "embed", "ffw"), (3, 16, 12), "BECD,EDF->BECF"),
    "head": (("vocab", "embed"), (9, 16), "BTD,VD->BTV"),
    "k_up": (("rank", "heads", "head"), (12, 2, 6), "BTNH,RNH->BTNR"),  # reads it the other way round
}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.fast
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("zeros, group", [(3, None), (2, 4), (1, 4)])
def test_the_lowest_scores_of_each_output_become_zero(name, zeros, group):
    """As many in each row or each group, by |W| |x| in NumPy, and the others stay as they are to the bit."""
    axes, shape, _ = WEIGHTS[name]
    w, form = drawn(*shape), form_of(axes, shape)
    norms = 0.1 + np.abs(drawn(*form.experts, form.inputs, seed=1))
    found = np.asarray(
        prune(jnp.asarray(w), form, scores(w, form, norms**2), zeros=zeros, group=group or form.inputs).dense(
            jnp.float32
        )
    )
    inputs = [i for i, role in enumerate(form.roles) if role == "i"]
    experts = len(form.experts)
    rows, kept = (np.moveaxis(x, inputs, range(-len(inputs), 0)) for x in (np.abs(w), found))
    rows, kept = (x.reshape(*x.shape[: x.ndim - len(inputs)], -1) for x in (rows, kept))
    by = rows * norms.reshape(*norms.shape[:experts], *[1] * (rows.ndim - experts - 1), -1)
    by, kept = (x.reshape(*x.shape[:-1], -1, group or form.inputs) for x in (by, kept))
    assert ((kept == 0).sum(-1) == zeros).all()
    threshold = np.sort(by, axis=-1)[..., zeros - 1 : zeros]
    np.testing.assert_array_equal(kept == 0, by <= threshold)
    np.testing.assert_array_equal(found[found != 0], w[found != 0])


@pytest.mark.fast
def test_equal_scores_and_experts_that_nothing_reaches():
    """Of equal scores exactly as many go; an expert without a token goes by magnitude, not by the order of inputs."""
    w, form = jnp.ones((8, 3)), form_of(("embed", "ffw"), (8, 3))
    assert ((np.asarray(prune(w, form, scores(w, form), zeros=4, group=8).dense(jnp.float32)) == 0).sum(0) == 4).all()
    w, form = drawn(2, 8, 3), form_of(("expert", "embed", "ffw"), (2, 8, 3))
    squares = np.stack([np.arange(1.0, 9.0), np.zeros(8)])
    by_text, by_size = np.asarray(scores(w, form, squares)), np.asarray(scores(w, form))
    np.testing.assert_array_equal(by_text[1], by_size[1])
    np.testing.assert_allclose(by_text[0], by_size[0] * np.sqrt(squares[0]), rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_and_gradients_are_those_of_the_array_with_zeros(name):
    axes, shape, equation = WEIGHTS[name]
    w, keep = jnp.asarray(drawn(*shape)), drawn(*shape, seed=1) > 0
    sizes = dict(zip(equation.split(",")[1].split("->")[0], shape, strict=True)) | {"B": 2, "T": 3, "C": 5}
    x = jnp.asarray(drawn(*(sizes[letter] for letter in equation.split(",")[0]), seed=2))
    weight = Pruned(w, jnp.packbits(keep, axis=-1))  # what lies under the mask is not zero here, as Muon leaves it
    dense = jnp.where(keep, w, 0)

    def gradients(product, w):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(jnp.asarray(drawn(*y.shape, seed=3)))

    y, dx, d_values = gradients(lambda x, v: Pruned(v, weight.mask).einsum(equation, x), w)
    expected = gradients(lambda x, w: jnp.einsum(equation, x, w), dense)
    assert tiny.worst((y, dx), expected[:2]) < 1e-5
    assert tiny.relative(d_values, np.where(keep, expected[2], 0)) < 1e-5
    assert not np.asarray(d_values)[~keep].any()
    assert tiny.bit_equal(np.asarray(weight.dense(jnp.float32)), np.asarray(dense))


@pytest.mark.fast
def test_lookups_and_experts_go_through_the_mask():
    table, keep = jnp.asarray(drawn(9, 12)), drawn(9, 12, seed=1) > 0
    ids = jnp.array([[3, 0], [8, 3]])
    rows = seam.take(Pruned(table, jnp.packbits(keep, axis=-1)), ids, jnp.float32)
    assert tiny.bit_equal(np.asarray(rows), np.where(keep, table, 0)[np.asarray(ids)])
    w, keep, x = drawn(2, 6, 5), drawn(2, 6, 5, seed=1) > 0, drawn(8, 6, seed=2)
    weight = Pruned(jnp.asarray(w), jnp.packbits(keep, axis=-1))
    y = seam.grouped_matmul(jnp.asarray(x), weight, jnp.array([4, 4]), block=4)
    expected = np.concatenate([x[:4] @ np.where(keep, w, 0)[0], x[4:] @ np.where(keep, w, 0)[1]])
    assert tiny.relative(y, expected) < 1e-5
