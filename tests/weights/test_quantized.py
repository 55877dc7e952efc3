"""Quantised weights against NumPy in float64: what they stand for, the products with them, and their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.kernels.experts import grouped_matmul
from jaxllm.weights import quantized
from jaxllm.weights.form import Form
from jaxllm.weights.formats import FORMATS
from jaxllm.weights.quantized import Scales

quantize = jax.jit(
    quantized.quantize, static_argnums=(1, 2), static_argnames=("group", "double", "symmetric", "activations")
)
dense = jax.jit(lambda w: w.dense(jnp.float32))
RNG = np.random.default_rng(0)
#: name: (form, equation, shape of x); the last one reads the inputs of a weight as its outputs.
PRODUCTS = {
    "q": (Form("ioo", (32, 4, 8)), "BTD,DNH->BTNH", (2, 3, 32)),
    "o": (Form("iio", (4, 8, 24)), "BTNH,NHD->BTD", (2, 3, 4, 8)),
    "up": (Form("io", (32, 24)), "BTD,DF->BTF", (2, 3, 32)),
    "head": (Form("oi", (24, 32)), "BTD,VD->BTV", (2, 3, 32)),
    "experts": (Form("eio", (3, 32, 24)), "BECD,EDF->BECF", (2, 3, 5, 32)),
    "k_up, compressed": (Form("ioo", (32, 4, 8)), "BTNH,CNH->BTNC", (2, 3, 4, 8)),
}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def shuffled(w):
    """The same weight with its columns stored in another order."""
    form = w.form
    order = np.stack([RNG.permutation(form.inputs) for _ in range(form.experts[0] if form.experts else 1)])
    order = jnp.asarray(order if form.experts else order[0])
    return dataclasses.replace(w, order=order)


# Rounding errors, in units of a group's scale: half a step of integers, half the widest gap of levels, and of fp8 half
# of its last bit: 2^-4 of the value, or 2^-10 below its smallest normal number.
BOUNDS = {
    "int8": lambda w: 0.5,
    "int4": lambda w: 0.5,
    "nf4": lambda w: 0.152,
    "int2": lambda w: 0.5,
    "fp8": lambda w: np.maximum(np.abs(w) / 16, 2.0**-10),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_within_the_bound_of_its_format(name, double):
    w_OI, form = normal(24, 64) * np.exp(normal(24, 1)), Form("oi", (24, 64))
    w = quantize(jnp.asarray(w_OI), form, name, group=16, double=double)
    groups = w_OI.astype(np.float64).reshape(24, 4, 16)
    scale = np.abs(groups).max(-1) / FORMATS[name].largest
    spread = np.abs(scale - scale.mean()).max(-1, keepdims=True) / 127 / 2 if double else 0
    np.testing.assert_array_less(np.abs(np.asarray(w.scales()) - scale), spread + 1e-6 * scale)
    values = groups / (scale + spread)[..., None]
    error = np.abs(np.float64(dense(w)).reshape(groups.shape) - groups)
    bound = BOUNDS[name](values) * (scale + spread)[..., None] + FORMATS[name].largest * np.reshape(spread, (-1, 1, 1))
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > 0.7 * bound).any()  # the bound is not idle
    assert isinstance(w.scale, Scales) == double


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_zero_of_its_own_uses_the_range_of_a_group_whole(name):
    w_OI, form = normal(8, 32) + 1, Form("oi", (8, 32))
    w = quantize(jnp.asarray(w_OI), form, name, group=16, symmetric=False)
    groups = w_OI.astype(np.float64).reshape(8, 2, 16)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = (high - low) / (254 if name == "int8" else 15)
    error = np.abs(np.float64(dense(w)).reshape(groups.shape) - groups)
    # The zero is a whole code too, which costs another half step at the ends.
    assert (error <= scale[..., None] * 1.001).all()
    assert error.mean() < np.abs(np.asarray(dense(quantize(jnp.asarray(w_OI), form, name, group=16))) - w_OI).mean()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_values(name):
    form, equation, shape = PRODUCTS[name]
    x, ways = normal(*shape), {"double": dict(double=True), "zero": dict(symmetric=False), "order": {}}
    weights = {
        way: quantize(jnp.asarray(normal(*form.shape)), form, "int4", group=8, **how) for way, how in ways.items()
    }
    weights["order"] = shuffled(weights["order"])
    assert all(w.shape == form.shape and w.group == 8 for w in weights.values())
    found, values, half = jax.jit(
        lambda weights, x: (
            {way: w.einsum(equation, x) for way, w in weights.items()},
            {way: w.dense(x.dtype) for way, w in weights.items()},
            weights["order"].einsum(equation, x.astype(jnp.bfloat16)),
        )
    )(weights, x)
    expected = {way: np.einsum(equation, x.astype(np.float64), np.float64(w)) for way, w in values.items()}
    assert tiny.worst(found, expected) < 1e-5
    assert half.dtype == jnp.bfloat16 and tiny.relative(half, expected["order"]) < 0.02


def test_order_says_which_input_a_column_of_codes_belongs_to():
    form = Form("io", (8, 3))
    w = shuffled(quantize(jnp.asarray(normal(8, 3)), form, "int8"))
    stored = np.asarray(w.codes * w.scales())
    np.testing.assert_allclose(np.asarray(dense(w))[np.asarray(w.order)], stored.T, rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_rows_of_a_table(double):
    form = Form("oi", (24, 32))
    w = shuffled(quantize(jnp.asarray(normal(24, 32)), form, "nf4", group=16, double=double))
    ids = jnp.asarray([[3, 0], [23, 3]])
    # Two programs: each may contract a product and a sum into one rounding, or not.
    np.testing.assert_array_max_ulp(np.asarray(w.take(ids, jnp.float32)), np.asarray(dense(w))[np.asarray(ids)], 2)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("block", [1, 4])
def test_experts_take_their_own_rows(block, activations):
    form, sizes = Form("eio", (3, 32, 24)), jnp.asarray([4, 0, 8], jnp.int32)
    w = quantize(jnp.asarray(normal(3, 32, 24)), form, "int8", activations=activations)
    x = jnp.asarray(normal(12, 32))
    expected = grouped_matmul(x, dense(w), sizes, block=block)
    bound = 1e-5 if activations is None or block == 1 else 0.02
    assert tiny.relative(w.grouped_matmul(x, sizes, block=block), expected) < bound


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name, group", [("int8", None), ("int8", 8), ("int4", 16)])
def test_w8a8_is_exact_integer_arithmetic(name, group, rows):
    """Codes of both sides multiplied in int64; only the scales are floats."""
    form = Form("io", (64, 24))
    w = quantize(jnp.asarray(normal(64, 24)), form, name, group=group, activations="int8")
    x = normal(rows, 64) * 10
    step = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(x / step).astype(np.int64).reshape(rows, -1, group or 64)
    ours = np.asarray(FORMATS[name].unpack(w.codes)).astype(np.int64).reshape(24, -1, group or 64)
    sums = np.einsum("mgj,ogj->mog", codes, ours)
    expected = (sums * np.asarray(w.scales(), np.float64)).sum(-1) * step
    found = w.einsum("BD,DF->BF", jnp.asarray(x))
    assert tiny.relative(found, expected) < 1e-6
    assert 1e-4 < tiny.relative(found, x @ np.asarray(dense(w))) < 0.02  # and so it is not the floats'


@pytest.mark.parametrize("activations", [None, "int8"])
def test_gradients_are_those_of_the_values(activations):
    """Of activations and of scales; with integer products as if nothing were rounded."""
    form = Form("ioo", (32, 2, 6))
    w, x = (
        quantize(jnp.asarray(normal(32, 2, 6)), form, "int8", group=8, activations=activations),
        jnp.asarray(normal(5, 32)),
    )
    dy = normal(5, 2, 6)

    def weighed(scale, x):
        return jnp.sum(dy * dataclasses.replace(w, scale=scale).einsum("BD,DNH->BNH", x))

    d_scale, d_x = jax.jit(jax.grad(weighed, (0, 1)))(w.scale, x)
    assert tiny.relative(d_x, np.einsum("BNH,DNH->BD", dy, np.float64(dense(w)))) < 1e-5
    d_w = np.einsum("BNH,BD->NHD", dy, x).reshape(12, 4, 8)
    assert tiny.relative(d_scale, (d_w * np.asarray(w.codes).reshape(12, 4, 8)).sum(-1)) < 1e-5


def test_zeros_stay_zero():
    w = quantize(jnp.zeros((16, 4)), Form("io", (16, 4)), "nf4", group=8, double=True)
    assert not np.asarray(dense(w)).any()
