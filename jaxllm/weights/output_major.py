"""A float weight laid out for decoding on a CPU: outputs first, so that a row of it is what one output reads.

With few rows of activations a product is bound by reading the weight. XLA on CPU reads it in order when it is the
left operand with its contracted axes last (2 to 2.5 times faster than as the right one at 2 to 16 rows).

Shapes: O outputs, I inputs, M rows of activations, E experts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxllm.kernels.experts import grouped_matmul as dense_grouped_matmul

#: Rows of activations up to which the weight goes on the left.
FEW = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputMajor:
    """A matrix `[O, I]` that stands for a weight with axes of its own; made by `output_major`."""

    matrix_OI: jax.Array
    axes: str = dataclasses.field(metadata=dict(static=True))
    """Letters of the weight in the equation that it is used in, such as DNH."""
    outputs: str = dataclasses.field(metadata=dict(static=True))
    """Those that the result keeps, such as NH."""
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    """The weight's own shape."""

    @property
    def dtype(self):
        return self.matrix_OI.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """`jnp.einsum(equation, x, weight)` for the equation that the layout was made for."""
        x_axes, w_axes, y_axes = equation.replace("->", ",").split(",")
        kept = "".join(a for a in w_axes if a in y_axes and a not in x_axes)
        inputs = "".join(a for a in w_axes if a not in kept)
        assert w_axes == self.axes and kept == self.outputs, f"{equation}: laid out as {self.axes}->{self.outputs}"
        rows = "".join(a for a in x_axes if a not in inputs)
        assert x_axes == rows + inputs and y_axes == rows + kept, f"{equation}: rows come first"
        lead, sizes = x.shape[: len(rows)], dict(zip(w_axes, self.shape, strict=True))
        x_MI, matrix_OI = x.reshape(math.prod(lead), -1), self.matrix_OI.astype(x.dtype)
        if x_MI.shape[0] <= FEW:
            y_MO = jnp.einsum("OI,MI->OM", matrix_OI, x_MI, preferred_element_type=dtype).T
        else:
            y_MO = jnp.einsum("MI,OI->MO", x_MI, matrix_OI, preferred_element_type=dtype)
        return y_MO.reshape(*lead, *(sizes[a] for a in kept))

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows of a table, which is output-major as it is."""
        return self.matrix_OI[ids].astype(dtype)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        raise NotImplementedError(f"experts keep their own layout; {dense_grouped_matmul.__name__} multiplies them")


def output_major(weight: jax.Array, axes: str, outputs: str) -> OutputMajor:
    """The weight with its outputs first, copied once."""
    order = [axes.index(a) for a in outputs + "".join(a for a in axes if a not in outputs)]
    rows = math.prod(weight.shape[axes.index(a)] for a in outputs)
    return OutputMajor(weight.transpose(order).reshape(rows, -1), axes, outputs, weight.shape)
