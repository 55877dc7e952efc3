"""Products of activations and weights, with a gradient of the weight that CPUs compute fast.

JAX writes that gradient as `dy^T x`, and XLA on CPU then makes a transposed copy of dy, computing once more what made
dy. With `x^T dy` the copy is of x, which the layer's other weights share: 14 % of a training step of a small model.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(equation: str, x: jax.Array, weight: jax.Array, dtype=None) -> jax.Array:
    """`jnp.einsum(equation, x, weight)`, in `dtype` if given. Differentiable in reverse mode only.

    Each letter of an operand is also in the other one or in the result.
    """
    return jnp.einsum(equation, x, weight, preferred_element_type=dtype)


def _save(equation, x, weight, dtype):
    return einsum(equation, x, weight, dtype), (x, weight)


def _backward(equation, dtype, saved, dy):
    x, weight = saved
    x_axes, w_axes, y_axes = equation.replace("->", ",").split(",")
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, weight)
    # The product's own order of axes, such as DV for a head VD. XLA would turn a transpose of it back into dy^T x.
    shared = [a for a in w_axes if a in x_axes and a in y_axes]
    order = "".join(shared + sorted((a for a in w_axes if a not in shared), key=(x_axes + y_axes).index))
    dw = jnp.einsum(f"{x_axes},{y_axes}->{order}", x, dy)
    if order != w_axes:
        dw = jnp.einsum(f"{order}->{w_axes}", jax.lax.optimization_barrier(dw))
    return dx.astype(x.dtype), dw.astype(weight.dtype)


einsum.defvjp(_save, _backward)
