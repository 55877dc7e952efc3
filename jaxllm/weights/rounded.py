"""Weights that train as floats and are used rounded: quantisation-aware training, and training with int8 products.

The forward pass computes what the quantised model will; the backward pass is that of the floats, as if nothing were
rounded (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).

Shapes: I inputs, O outputs. A stack of layers has one more leading axis, which the scan over layers takes off.
"""

import dataclasses

import jax

from jaxllm.weights import seam
from jaxllm.weights.axes import Axes
from jaxllm.weights.form import Form
from jaxllm.weights.quantized import Quantized, quantize

STATIC = dict(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A float weight in its own axes, rounded to nearest wherever it is used."""

    float: jax.Array
    form: Form = dataclasses.field(**STATIC)
    format: str = dataclasses.field(**STATIC)
    group: int = dataclasses.field(**STATIC)
    symmetric: bool = dataclasses.field(default=True, **STATIC)
    activations: str | None = dataclasses.field(default=None, **STATIC)
    """int8 quantises activations row by row too, and takes integer products forward; None products with floats."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.float.shape

    def quantized(self) -> Quantized:
        """What the weight will be stored as; no stack."""
        options = dict(group=self.group, symmetric=self.symmetric, activations=self.activations)
        return quantize(jax.lax.stop_gradient(self.float), self.form, self.format, **options)

    def dense(self, dtype) -> jax.Array:
        """The rounded weight as an array in its own axes, with the gradient of the float one; no stack."""
        rounded = self.quantized().dense(self.float.dtype)
        return (self.float + jax.lax.stop_gradient(rounded - self.float)).astype(dtype)

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        if self.activations is None or not self.form.fits(equation):
            return seam.einsum(equation, x, self.dense(x.dtype), dtype=dtype)
        return _einsum(equation, dtype, x, self)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        if self.activations is None:
            return seam.grouped_matmul(x_MD, self.dense(x_MD.dtype), sizes_E, block=block)
        return _grouped_matmul(block, x_MD, self, sizes_E)

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See `seam.take`."""
        return seam.take(self.dense(dtype), ids, dtype)

    def axes(self, axes: Axes) -> "Rounded":
        """The logical axes of each array, by those of the weight."""
        return dataclasses.replace(self, float=axes)


def _through(forward, plain):
    """`forward` with the gradient of `plain`; both take static arguments first, then x and the weight."""
    function = jax.custom_vjp(forward, nondiff_argnums=(0, 1))
    function.defvjp(
        lambda *args: (forward(*args), args[2:]),
        lambda first, second, saved, dy: jax.vjp(lambda x, w: plain(first, second, x, w), *saved)[1](dy),
    )
    return function


_einsum = _through(
    lambda equation, dtype, x, w: w.quantized().einsum(equation, x, dtype=dtype),
    lambda equation, dtype, x, w: seam.einsum(equation, x, w.float, dtype=dtype),
)


def _grouped_matmul(block: int, x_MD, w: Rounded, sizes_E):
    @jax.custom_vjp
    def product(x, w, sizes):
        return w.quantized().grouped_matmul(x, sizes, block=block)

    def backward(saved, dy):
        x, w, sizes = saved
        _, pull = jax.vjp(lambda x, w: seam.grouped_matmul(x, w.float, sizes, block=block), x, w)
        return *pull(dy), None

    product.defvjp(lambda *args: (product(*args), args), backward)
    return product(x_MD, w, sizes_E)
