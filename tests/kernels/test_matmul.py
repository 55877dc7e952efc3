"""The product with its own gradient is `jnp.einsum` in value, gradient and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.matmul import einsum

SIZES = dict(B=2, T=3, D=4, N=2, K=2, H=5, F=6, V=7, E=3, C=2)


def draw(axes, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal([SIZES[a] for a in axes]), dtype)


def pullback(f, equation, dtype):
    x_axes, w_axes = equation.split("->")[0].split(",")
    x, w = draw(x_axes, 0, dtype), draw(w_axes, 1, dtype)
    y, pull = jax.vjp(f, x, w)
    return y, *pull(draw(equation.split("->")[1], 2, y.dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "equation", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTF,FD->BTD", "BTD,VD->BTV", "BECD,EDF->BECF", "BTD,NDH->BNTH"]
)
def test_value_and_gradients_are_those_of_einsum(equation, dtype):
    ours = pullback(lambda x, w: einsum(equation, x, w, jnp.float32), equation, dtype)
    plain = pullback(lambda x, w: jnp.einsum(equation, x, w, preferred_element_type=jnp.float32), equation, dtype)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(np.float32(mine), np.float32(theirs), rtol=tolerance, atol=tolerance)


def test_the_compiled_gradient_copies_no_cotangent():
    """What the file is for: on CPU no `dy` is written transposed, `[F, rows]`."""
    B, T, D, F = 4, 64, 16, 48

    def loss(w, x):
        return jnp.sum(jnp.tanh(einsum("BTD,DF->BTF", x, w)) ** 2)

    shapes = jax.ShapeDtypeStruct((D, F), jnp.float32), jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert f"f32[{B * T},{F}]" in text and f"f32[{F},{B * T}]" not in text
