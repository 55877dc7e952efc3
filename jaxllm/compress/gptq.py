"""GPTQ: columns are rounded one after another, and each error is made up for by the columns that are still to come.

Frantar et al. 2022, arXiv 2210.17323. For W `[O, I]` and calibration inputs X `[M, I]` it lowers
|(W - Q) X^T|^2 = tr((W - Q) H (W - Q)^T) with H = X^T X: algorithm 1, with the Cholesky factor of section 3.3.

Shapes: O outputs, I inputs, G groups, J inputs of a group, K inputs of a block, E experts.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.weights.form import Form
from jaxllm.weights.formats import Format, get_format
from jaxllm.weights.quantized import Quantized, Scales, fit

#: Share of the mean of H's diagonal that is added to the diagonal (section 4, "1 % of the average diagonal value").
DAMP = 0.01
#: Most inputs of a block: errors within one are made up for column by column, and in those after it all at once.
BLOCK = 128


def gptq(
    w: jax.Array,
    form: Form,
    gram_II: jax.Array,
    format: str,
    *,
    group: int,
    double: bool = False,
    symmetric: bool = True,
    ordered: bool = False,
    activations: str | None = None,
) -> Quantized:
    """A weight in its own axes, without a stack, quantised by GPTQ.

    Args:
      gram_II: `[E?, I, I]`: X^T X of what reached it. An expert that nothing reached is rounded to nearest.
      group: inputs that share a scale, which fits the columns as they are when their turn comes. Scales in 8 bits, and
        one for all inputs, fit those of before the first column.
      ordered: inputs with the largest activations first (act_order); groups go by that order.
    """
    order = None
    gram = np.asarray(gram_II, np.float64)
    w_OI = form.matrix(w).astype(jnp.float32)
    if ordered:
        order = np.argsort(-np.diagonal(gram, axis1=-2, axis2=-1), axis=-1, kind="stable")
        gram = np.take_along_axis(np.take_along_axis(gram, order[..., None], -2), order[..., None, :], -1)
        w_OI = jnp.take_along_axis(w_OI, jnp.asarray(order)[..., None, :], axis=-1)
    factor_II = jnp.asarray(inverse_factor(gram), jnp.float32)
    codes, scale, zero = _solve(w_OI, factor_II, get_format(format), group, double, symmetric)
    order = None if order is None else jnp.asarray(order, jnp.int32)
    return Quantized(codes, scale, zero, order, format, form, activations)


def inverse_factor(gram_II: np.ndarray) -> np.ndarray:
    """U, upper triangular with H^-1 = U^T U for the damped H, in float64."""
    n = gram_II.shape[-1]
    mean = np.trace(gram_II, axis1=-2, axis2=-1)[..., None, None] / n
    damped = np.where(mean > 0, gram_II + DAMP * mean * np.eye(n), np.eye(n))
    # H = R R^T with R upper triangular is the Cholesky factor of H turned around; then H^-1 = R^-T R^-1.
    turned = np.linalg.cholesky(damped[..., ::-1, ::-1])[..., ::-1, ::-1]
    return np.triu(np.linalg.inv(turned))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _solve(w_OI, factor_II, kind: Format, group: int, double: bool, symmetric: bool):
    """`(codes, scales, zeros)` as `Quantized` holds them."""
    one = functools.partial(_matrix, kind=kind, group=group, symmetric=symmetric)
    scale = zero = None
    if double or group == w_OI.shape[-1]:
        scale, zero = fit(kind, w_OI.reshape(*w_OI.shape[:-1], -1, group), symmetric)
        scale = Scales.of(scale) if double else scale
    used = scale() if double else scale
    codes, found, zeros = (
        jax.vmap(one)(w_OI, factor_II, used, zero) if w_OI.ndim > 2 else one(w_OI, factor_II, used, zero)
    )
    return kind.pack(codes), found if scale is None else scale, zeros if scale is None else zero


def _matrix(w_OI, factor_II, scale_OG, zero_OG, *, kind: Format, group: int, symmetric: bool):
    """`(codes_OI, scale_OG, zero_OG)` of one matrix; scales that are given stay."""
    inputs = w_OI.shape[-1]
    width = group if scale_OG is None else math.gcd(group, BLOCK)

    def block(w_IO, start):
        w_KO = jax.lax.dynamic_slice_in_dim(w_IO, start, width)
        rows_KI = jax.lax.dynamic_slice_in_dim(factor_II, start, width)
        if scale_OG is None:
            scale_O, zero_O = fit(kind, w_KO.T, symmetric)
        else:
            scale_O = scale_OG[:, start // group]
            zero_O = None if zero_OG is None else zero_OG[:, start // group]
        own_KK = jax.lax.dynamic_slice_in_dim(rows_KI, start, width, axis=1)
        codes_KO, errors_KO = _block(w_KO, own_KK, scale_O, zero_O, kind)
        return w_IO - jnp.einsum("ki,ko->io", rows_KI, errors_KO, precision="highest"), (codes_KO, scale_O, zero_O)

    _, (codes, scale_GO, zero_GO) = jax.lax.scan(block, w_OI.T, jnp.arange(0, inputs, width))
    return codes.reshape(inputs, -1).T, scale_GO.T, None if zero_GO is None else zero_GO.T


def _block(w_KO, factor_KK, scale_O, zero_O, kind: Format):
    """`(codes_KO, errors_KO)`; errors are in units of the factor's diagonal."""
    step_O, zero_O = jnp.where(scale_O == 0, 1, scale_O), 0 if zero_O is None else zero_O

    def column(w_KO, k):
        code_O = kind.encode(w_KO[k] / step_O + zero_O)
        value_O = (kind.decode(code_O, jnp.float32) - zero_O) * scale_O
        error_O = (w_KO[k] - value_O) / factor_KK[k, k]
        return w_KO - factor_KK[k][:, None] * error_O, (code_O, error_O)

    return jax.lax.scan(column, w_KO, jnp.arange(w_KO.shape[0]))[1]
