"""GPTQ against its algorithm in float64, and against rounding to nearest, on inputs that are correlated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compress.gptq import DAMP, gptq, inverse_factor
from jaxllm.weights.form import Form
from jaxllm.weights.quantized import quantize

FORM = Form("io", (48, 20))
dense = jax.jit(lambda w: w.dense(jnp.float32))


def layer(seed=0, experts=()):
    """`(weights [I, O], X^T X)` of inputs of which a few directions hold most."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((*experts, 48, 48)) * np.exp(-np.arange(48) / 6)[:, None]
    x = rng.standard_normal((*experts, 400, 48)) @ mix + 0.1 * rng.standard_normal((*experts, 400, 48))
    return jnp.asarray(rng.standard_normal((*experts, 48, 20)), jnp.float32), np.swapaxes(x, -1, -2) @ x


def loss(w, quantized, gram):
    """|(Q - W) X^T|^2 in float64."""
    d_OI = np.swapaxes(np.float64(dense(quantized)) - np.float64(w), -1, -2)
    return np.sum((d_OI @ gram) * d_OI, axis=(-2, -1))


def by_elimination(w_IO, gram, group):
    """Algorithm 1 as equations 2 and 3 of the paper have it: the inverse of H shrinks by each column, no Cholesky."""
    w_OI, codes = np.float64(w_IO).T.copy(), np.zeros((20, 48))
    inverse = np.linalg.inv(gram + DAMP * np.trace(gram) / 48 * np.eye(48))
    for i in range(48):
        if i % group == 0:
            scale_O = np.abs(w_OI[:, i : i + group]).max(1) / 7
        codes[:, i] = np.clip(np.round(w_OI[:, i] / scale_O), -8, 7)
        error_O = (w_OI[:, i] - codes[:, i] * scale_O) / inverse[i, i]
        w_OI[:, i:] -= error_O[:, None] * inverse[i, i:]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("group", [16, 48])
def test_codes_are_those_of_the_algorithm(group):
    w, gram = layer()
    found = gptq(w, FORM, gram, "int4", group=group)
    codes = np.asarray(dense(found)).T.reshape(20, -1, group) / np.asarray(found.scales())[..., None]
    # Float32 may round a value that lies in the middle the other way.
    assert np.mean(np.rint(codes.reshape(20, 48)) != by_elimination(w, gram, group)) < 0.01


def test_the_factor_is_that_of_the_damped_inverse():
    _, gram = layer()
    factor = inverse_factor(gram)
    damped = gram + DAMP * np.trace(gram) / 48 * np.eye(48)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(48), atol=1e-8)
    assert not np.tril(factor, -1).any()


@pytest.mark.parametrize(
    "name, options, share",
    [
        ("int4", {}, 0.5),
        ("int4", {"ordered": True}, 0.5),
        ("int4", {"symmetric": False}, 0.5),
        ("nf4", {"double": True}, 0.5),
        ("int8", {"group": 48}, 0.5),
        ("int2", {}, 0.6),
        ("fp8", {}, 0.6),
    ],
)
def test_it_loses_less_than_rounding_to_nearest(name, options, share):
    """And would not without H: the loss of rounding is then the same."""
    w, gram = layer(1)
    options = {"group": 16} | options
    plain = {key: value for key, value in options.items() if key != "ordered"}
    nearest = loss(w, quantize(w, FORM, name, **plain), gram)
    assert loss(w, gptq(w, FORM, gram, name, **options), gram) < share * nearest
    blind = gptq(w, FORM, np.eye(48), name, **options)
    np.testing.assert_allclose(dense(blind), dense(quantize(w, FORM, name, **plain)), rtol=1e-5)


def test_order_begins_with_the_largest_inputs_and_is_stored():
    w, gram = layer(2)
    found = gptq(w, FORM, gram, "int8", group=16, ordered=True)
    assert (np.diff(np.diagonal(gram)[np.asarray(found.order)]) <= 0).all()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 48)), jnp.float32)
    np.testing.assert_allclose(found.einsum("BD,DF->BF", x), x @ dense(found), rtol=1e-4, atol=1e-4)


def test_each_expert_goes_by_its_own_inputs_and_one_that_nothing_reached_is_rounded_to_nearest():
    form = Form("eio", (3, 48, 20))
    w, gram = layer(3, (3,))
    gram[1] = 0
    for options in ({}, {"double": True}):
        found, nearest = (
            gptq(w, form, gram, "int4", group=16, **options),
            quantize(w, form, "int4", group=16, **options),
        )
        np.testing.assert_allclose(dense(found)[1], dense(nearest)[1], rtol=1e-5)
        assert (loss(w, found, gram)[[0, 2]] < 0.5 * loss(w, nearest, gram)[[0, 2]]).all()
