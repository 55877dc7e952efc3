"""Quantised weights: codes of a few bits, a scale for each group of inputs, and the products with them.

Shapes: O outputs, I inputs, G groups, J inputs of a group (I = G J), P packed bytes (I codes), E experts. A stack of
layers has one more leading axis, which the scan over layers takes off.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.kernels import weight_only
from jaxllm.kernels.backend import alone, platform
from jaxllm.kernels.experts import grouped_matmul
from jaxllm.kernels.quantized import int8_matmul
from jaxllm.weights.axes import Axes
from jaxllm.weights.form import Form, matrix_axes
from jaxllm.weights.formats import Format, get_format

STATIC = dict(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales in 8 bits: `mean + step * codes` (double quantisation, arXiv 2305.14314, section 3).

    The paper has a step for each 256 scales; here each output has one, so that shards of a matrix are independent.
    """

    codes: jax.Array
    """int8 `[E?, O, G]`"""
    step: jax.Array
    """float32 `[E?, O, 1]`"""
    mean: jax.Array
    """float32 `[E?, 1, 1]`: of the whole matrix."""

    @classmethod
    def of(cls, scale_OG: jax.Array) -> "Scales":
        mean = jnp.mean(scale_OG, axis=(-2, -1), keepdims=True)
        step = jnp.max(jnp.abs(scale_OG - mean), axis=-1, keepdims=True) / 127
        codes = jnp.round((scale_OG - mean) / jnp.where(step == 0, 1, step)).astype(jnp.int8)
        return cls(codes, step, mean)

    def __call__(self) -> jax.Array:
        return self.mean + self.step * self.codes.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix of codes; stored output-major, which both the packing and fast integer products want."""

    codes: jax.Array
    """int8, fp8 or packed uint8 `[E?, O, P]`."""
    scale: jax.Array | Scales
    """float32 `[E?, O, G]`"""
    zero: jax.Array | None
    """float32 `[E?, O, G]`: the code that stands for 0; None for 0 itself. Only imported weights have one."""
    order: jax.Array | None
    """int32 `[E?, I]`: the input that each column of codes belongs to; None for their own order."""
    format: str = dataclasses.field(**STATIC)
    form: Form = dataclasses.field(**STATIC)
    activations: str | None = dataclasses.field(default=None, **STATIC)
    """int8 takes integer products with activations quantised row by row; None products with floats."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        return (*self.codes.shape[: self.codes.ndim - 2 - len(self.form.experts)], *self.form.shape)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        scale = self.scale.codes if isinstance(self.scale, Scales) else self.scale
        return self.form.inputs // scale.shape[-1]

    def scales(self) -> jax.Array:
        """float32 `[E?, O, G]`"""
        return self.scale() if isinstance(self.scale, Scales) else self.scale

    def matrix(self, dtype) -> jax.Array:
        """The values, `[E?, O, I]`."""
        return _ordered(self._values(dtype), self.order)

    def dense(self, dtype) -> jax.Array:
        """The weight that this stands for, as an array in its own axes; no stack."""
        return self.form.weight(self.matrix(dtype))

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        if not self.form.fits(equation):
            return jnp.einsum(equation, x, self.dense(x.dtype), preferred_element_type=dtype)
        y = self.product(self.form.enter(equation, x))
        return self.form.leave(equation, y.astype(dtype or x.dtype))

    def product(self, x: jax.Array) -> jax.Array:
        """`x W^T` for x `[E?, ..., I]`."""
        if self.order is not None:
            x = jnp.take_along_axis(x, _like(self.order, x), axis=-1)
        return _integer_product(x, self) if self.activations == "int8" else _float_product(x, self)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        if self.activations == "int8" and block > 1:
            return _integer_blocks(x_MD, self, sizes_E, block)
        w_EDF = jnp.swapaxes(self.matrix(x_MD.dtype), -1, -2)
        return grouped_matmul(x_MD, w_EDF, sizes_E, block=block)

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See `seam.take`."""
        scale = self.scale
        if isinstance(scale, Scales):
            scale = Scales(scale.codes[ids], scale.step[ids], scale.mean[0])()
        else:
            scale = scale[ids]
        zero = None if self.zero is None else self.zero[ids]
        order = None if self.order is None else self.order[None]
        return _ordered(_values(get_format(self.format), self.codes[ids], scale, zero, dtype), order)

    def _values(self, dtype) -> jax.Array:
        return _values(get_format(self.format), self.codes, self.scales(), self.zero, dtype)

    def axes(self, axes: Axes) -> "Quantized":
        """The logical axes of each array, by those of the weight."""
        lead, outputs, inputs = matrix_axes(self.form, axes)
        scale = (*lead, outputs, None)
        if isinstance(self.scale, Scales):
            scale = Scales(scale, (*lead, outputs, None), (*lead, None, None))
        zero = None if self.zero is None else (*lead, outputs, None)
        order = None if self.order is None else (*lead, None)
        return dataclasses.replace(self, codes=(*lead, outputs, inputs), scale=scale, zero=zero, order=order)


def quantize(
    w: jax.Array,
    form: Form,
    format: str | Format,
    *,
    group: int | None = None,
    double: bool = False,
    symmetric: bool = True,
    activations: str | None = None,
) -> Quantized:
    """The weight rounded to nearest, scaled by the largest magnitude of each group of inputs.

    Args:
      w: in its own axes, without a stack (use `jax.vmap` for one).
      group: inputs that share a scale; None for all inputs of an output.
      double: the scales in 8 bits, too.
      symmetric: whether 0 is the code 0; else each group has a zero of its own, and its range is used whole.
    """
    kind = get_format(format) if isinstance(format, str) else format
    w_OI = form.matrix(w).astype(jnp.float32)
    scale_OG, zero_OG = fit(kind, w_OI.reshape(*w_OI.shape[:-1], -1, group or form.inputs), symmetric)
    if double:
        scale_OG = Scales.of(scale_OG)
    return encode(w_OI, scale_OG, zero_OG, form, format, activations=activations)


def fit(kind: Format, w_OGJ: jax.Array, symmetric: bool = True) -> tuple[jax.Array, jax.Array | None]:
    """`(scale_OG, zero_OG)` with which the largest weights of each group are just in range; the zero is a code."""
    if symmetric:
        return jnp.max(jnp.abs(w_OGJ), axis=-1) / kind.largest, None
    low, high = (jnp.minimum(jnp.min(w_OGJ, axis=-1), 0), jnp.maximum(jnp.max(w_OGJ, axis=-1), 0))
    scale_OG = (high - low) / (2 * kind.largest + (kind.bits < 8))
    return scale_OG, jnp.round(kind.largest - high / jnp.where(scale_OG == 0, 1, scale_OG))


def encode(w_OI, scale_OG, zero_OG, form: Form, format: str | Format, *, activations=None) -> Quantized:
    """The nearest codes of a matrix, `[E?, O, I]`, under given scales (an array, or `Scales`) and zeros (or None)."""
    kind = get_format(format) if isinstance(format, str) else format
    used = scale_OG() if isinstance(scale_OG, Scales) else scale_OG
    values = w_OI.reshape(*used.shape, -1) / jnp.where(used == 0, 1, used)[..., None]
    if zero_OG is not None:
        values = values + zero_OG[..., None]
    codes = kind.pack(kind.encode(values).reshape(w_OI.shape))
    return Quantized(
        codes, scale_OG, zero_OG, None, format if isinstance(format, str) else kind.name, form, activations
    )


def _values(kind: Format, codes, scale, zero, dtype):
    """Values of packed codes `[..., P]` under scales `[..., G]`."""
    values = kind.decode(kind.unpack(codes), dtype)
    grouped = values.reshape(*scale.shape, -1)
    if zero is not None:
        grouped = grouped - zero[..., None].astype(dtype)
    return (grouped * scale[..., None].astype(dtype)).reshape(values.shape)


def _ordered(values, order):
    """Columns put back where `order` says they belong."""
    if order is None:
        return values
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(values, _like(back, values), axis=-1)


def _like(order, x):
    """`[E?, I]` with axes of size 1, as many as x has between."""
    return order.reshape(*order.shape[:-1], *[1] * (x.ndim - order.ndim), order.shape[-1])


def _float_product(x, w: Quantized):
    if _by_kernel(x, w):
        return _kernel_product(x, w)
    # Recomputed in the backward pass: what is kept for it is the codes, not the values.
    return jax.checkpoint(_plain_product)(x, w)


def _plain_product(x, w: Quantized):
    return jnp.einsum(_equation(w), x, w._values(x.dtype))


def _by_kernel(x, w: Quantized) -> bool:
    """Whether to take the Pallas kernel: on TPU, but for codes of a byte with one scale an output, which XLA decodes
    on the way to the product by itself (`docs/benchmarks.md`)."""
    kind, groups = get_format(w.format), w.form.inputs // w.group
    if platform() != "tpu" or kind.dtype is not None or not alone():
        return False
    coded = kind.per_byte > 1 or groups > 1 or w.zero is not None
    return coded and weight_only.fits(x, w.codes, groups, weight_only.Coding(kind.bits, kind.levels))


@jax.custom_vjp
def _kernel_product(x, w: Quantized):
    y_MO = _kernel(weight_only.product, x, w)
    return y_MO.reshape(*x.shape[:-1], -1)


def _kernel_backward(saved, dy):
    x, w = saved
    dx = _kernel(weight_only.product_back, dy, w).reshape(x.shape)
    (dw,) = jax.vjp(lambda w: _plain_product(x, w), w)[1](dy)  # of scales; seldom asked for, and then left out
    return dx, dw


def _kernel(product, x, w: Quantized):
    kind = get_format(w.format)
    coding = weight_only.Coding(kind.bits, kind.levels)
    return product(x.reshape(-1, x.shape[-1]), w.codes, w.scales(), w.zero, coding, interpret=platform() == "cpu")


_kernel_product.defvjp(lambda x, w: (_kernel_product(x, w), (x, w)), _kernel_backward)


def _equation(w: Quantized) -> str:
    return "e...i,eoi->e...o" if w.form.experts else "...i,oi->...o"


@jax.custom_vjp
def _integer_product(x, w: Quantized):
    kind = get_format(w.format)
    return int8_matmul(x, kind.unpack(w.codes), w.scales())


def _integer_backward(saved, dy):
    """As if nothing were rounded (the straight-through estimator, arXiv 1308.3432)."""
    _, pull = jax.vjp(lambda x, w: _float_product(x, w).astype(jnp.float32), *saved)
    return pull(dy)


_integer_product.defvjp(lambda x, w: (_integer_product(x, w), (x, w)), _integer_backward)


def _integer_blocks(x_MD, w: Quantized, sizes_E, block: int):
    """As `kernels.experts.grouped_matmul` by blocks, in integers."""
    ends_E = jnp.cumsum(sizes_E)
    starts_C = jnp.arange(x_MD.shape[0] // block) * block
    expert_C = jnp.minimum(jnp.searchsorted(ends_E, starts_C, side="right"), sizes_E.shape[0] - 1)
    chosen = jax.tree.map(lambda leaf: leaf[expert_C], dataclasses.replace(w, scale=w.scales()))
    return chosen.product(x_MD.reshape(-1, block, x_MD.shape[-1])).reshape(x_MD.shape[0], -1)
