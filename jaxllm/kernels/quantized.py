"""Products of float activations with quantised matrices: integer dots, and dots with values made on the way.

Shapes: M rows, I inputs, O outputs, G groups of inputs with a scale each, J inputs of a group, E experts.
"""

import jax
import jax.numpy as jnp

from jaxllm.kernels.backend import platform


def quantize_rows(x_MI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(codes_MI, scale_M1)`: each row in int8 by its largest magnitude, in float32."""
    x_MI = x_MI.astype(jnp.float32)
    scale_M1 = jnp.max(jnp.abs(x_MI), axis=-1, keepdims=True) / 127
    codes_MI = jnp.round(x_MI / jnp.where(scale_M1 == 0, 1, scale_M1)).astype(jnp.int8)
    return codes_MI, scale_M1


def int8_matmul(x_MI: jax.Array, codes_OI: jax.Array, scale_OG: jax.Array) -> jax.Array:
    """`x W^T` in float32 with both sides in int8 and sums in int32; x is quantised row by row.

    Any leading axes of x but experts; codes may be `[E, O, I]` with x `[E, ..., I]`. With one scale for each output
    the scales are taken out of the sum, else each group is summed by itself.
    """
    lead, inputs = x_MI.shape[:-1], x_MI.shape[-1]
    experts = codes_OI.ndim - 2
    x_MI = x_MI.reshape(*lead[:experts], -1, inputs)
    rows = x_MI.shape[-2]
    if rows == 1 and platform() == "cpu":
        # For a single row XLA widens the whole matrix to int32 first: 20 times slower than two rows.
        x_MI = jnp.concatenate([x_MI, jnp.zeros_like(x_MI)], axis=-2)
    codes_MI, scale_M1 = quantize_rows(x_MI)
    if scale_OG.shape[-1] == 1:
        y_MO = _dot(codes_MI, codes_OI).astype(jnp.float32) * scale_OG.swapaxes(-1, -2)
    else:
        y_MO = _grouped_dot(codes_MI, codes_OI, scale_OG)
    y_MO = (y_MO * scale_M1)[..., :rows, :]
    return y_MO.reshape(*lead, codes_OI.shape[-2])


def _dot(x, w):
    return jnp.einsum("...mi,...oi->...mo", x, w, preferred_element_type=jnp.int32)


def _grouped_dot(codes_MI, codes_OI, scale_OG):
    groups = scale_OG.shape[-1]
    x_MGJ, w_OGJ = (c.reshape(*c.shape[:-1], groups, -1) for c in (codes_MI, codes_OI))
    y_GMO = jnp.einsum("...mgj,...ogj->...gmo", x_MGJ, w_OGJ, preferred_element_type=jnp.int32)
    return jnp.einsum("...gmo,...og->...mo", y_GMO.astype(jnp.float32), scale_OG)
