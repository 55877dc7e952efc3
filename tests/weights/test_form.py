"""Forms: the same product in a weight's own axes and on plain matrices, for every equation of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.weights.form import Form, form_of, matrix_axes

SIZES = dict(zip("BTDNHFVECR", (2, 5, 6, 3, 4, 7, 11, 2, 3, 5), strict=True))
#: logical axes of a weight, and the equation that the model takes it through.
WEIGHTS = {
    "q": (("embed", "heads", "head"), "BTD,DNH->BTNH"),
    "o": (("heads", "head", "embed"), "BTNH,NHD->BTD"),
    "up": (("embed", "ffw"), "BTD,DF->BTF"),
    "head": (("vocab", "embed"), "BTD,VD->BTV"),
    "expert": (("expert", "embed", "ffw"), "BECD,EDF->BECF"),
    "k_up": (("rank", "heads", "head"), "BTR,RNH->BTNH"),
}


def sized(letters: str, seed: int) -> jax.Array:
    shape = [SIZES[letter] for letter in letters]
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.fast
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_form_gives_the_equation_on_matrices(name):
    axes, equation = WEIGHTS[name]
    x_axes, w_axes, _ = equation.replace("->", ",").split(",")
    x, w = sized(x_axes, 0), sized(w_axes, 1)
    form = form_of(axes, w.shape)
    w_OI = form.matrix(w)
    assert w_OI.shape == (*form.experts, form.outputs, form.inputs)
    assert tiny.bit_equal(form.weight(w_OI), w)
    entered = form.enter(equation, x)
    product = jnp.einsum("e...i,eoi->e...o" if form.experts else "...i,oi->...o", entered, w_OI)
    assert form.fits(equation)
    assert tiny.relative(form.leave(equation, product), jnp.einsum(equation, x, w)) < 1e-6
    stacked = form_of(("layers", *axes), (9, *w.shape))
    assert stacked == form, "a stack has the form of its layers"


@pytest.mark.fast
def test_an_equation_that_sums_over_outputs_does_not_fit():
    """Compressed latent attention takes k_up into the queries, and v_up head by head."""
    form = form_of(("rank", "heads", "head"), (5, 3, 4))
    assert not form.fits("BTNH,RNH->BTNR")
    assert not form.fits("BTNR,RNH->BTNH")


@pytest.mark.fast
def test_vectors_have_no_form_and_logical_axes_follow_the_matrix():
    assert form_of(("layers", "heads", "head"), (2, 3, 4)) is None
    assert form_of((None, "embed"), (9, 4)) is None, "positions"
    assert form_of(("embed", None), (4, 3)) is None, "the router"
    axes = ("layers", "expert", "embed", "ffw")
    assert matrix_axes(Form("eio", (2, 6, 7)), axes) == (("layers", "expert"), "ffw", "embed")
    assert matrix_axes(Form("oi", (11, 6)), ("vocab", "embed")) == ((), "vocab", "embed")
    assert matrix_axes(Form("iio", (3, 4, 6)), ("layers", "heads", "head", "embed")) == (("layers",), "embed", "heads")
