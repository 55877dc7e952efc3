"""The one seam between the model and its weights: `einsum`, `grouped_matmul` and `take`.

A weight is an array, or a registered dataclass that brings its own `einsum`, `grouped_matmul` and `take` methods
(a quantised matrix, an adapter over one). The model calls these three functions only, so a new weight type is one
file and no edit to the model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kernels import matmul
from jaxllm.kernels.backend import platform
from jaxllm.kernels.experts import grouped_matmul as dense_grouped_matmul

Weight = Any  # jax.Array, or a registered dataclass with the three methods below


def unwrap(weight) -> Weight:
    """The value in an nnx.Variable, or the weight itself."""
    return weight.get_value() if hasattr(weight, "get_value") else weight


def einsum(equation: str, x: jax.Array, weight, *, dtype=None) -> jax.Array:
    """`jnp.einsum(equation, x, weight)` for any weight type, computed in `x.dtype`, given in `dtype`."""
    weight = unwrap(weight)
    if not isinstance(weight, jax.Array):
        return weight.einsum(equation, x, dtype=dtype)
    if platform() == "cpu":
        return matmul.einsum(equation, x, weight.astype(x.dtype), dtype)
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=dtype)


def grouped_matmul(x_MD: jax.Array, weight, sizes_E: jax.Array, *, block: int) -> jax.Array:
    """Each expert's rows of `x_MD` times its own matrix; rows are laid out as `kernels.experts` says."""
    weight = unwrap(weight)
    if not isinstance(weight, jax.Array):
        return weight.grouped_matmul(x_MD, sizes_E, block=block)
    return dense_grouped_matmul(x_MD, weight.astype(x_MD.dtype), sizes_E, block=block)


def take(weight, ids: jax.Array, dtype) -> jax.Array:
    """Rows `ids` of a table, in `dtype`."""
    weight = unwrap(weight)
    if not isinstance(weight, jax.Array):
        return weight.take(ids, dtype)
    return weight[ids].astype(dtype)
