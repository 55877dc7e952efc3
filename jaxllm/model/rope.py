"""Rotary position embeddings and the ways to stretch them.

Shapes: B batch, T position, N heads, H head dim, R = half of the rotated dimensions.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels.backend import platform
from jaxllm.model.spec import RopeSpec


def frequencies(rope: RopeSpec, head: int, length=None) -> tuple[jax.Array | np.ndarray, float]:
    """Angles per position `f_R` (radians), and the factor on cos and sin.

    `length` (traced, `[B, T]`) matters to dynamic NTK only, which then returns `f_BTR`; LongRoPE returns `f_2R`, for
    short rows and for long ones. Sources: linear, Chen et al. 2023 (arXiv 2306.15595); YaRN, Peng et al. 2023 (arXiv
    2309.00071), sections 3.1 to 3.4 and NTK-aware and dynamic scaling in appendix A; LongRoPE, Ding et al. 2024 (arXiv
    2402.13753), equation 1 and section 3.3; Llama 3.1, the published reference implementation.
    """
    dims = int(head * rope.fraction)
    exponent = np.arange(0, dims, 2) / dims
    plain = rope.base**-exponent
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "ntk":
        return (rope.base * rope.factor ** (dims / (dims - 2))) ** -exponent, 1.0
    if rope.scaling == "dynamic_ntk":
        stretch = jnp.maximum(rope.factor * length[..., None] / rope.original_context - (rope.factor - 1), 1.0)
        return (rope.base * stretch ** (dims / (dims - 2))) ** -exponent, 1.0
    if rope.scaling == "yarn":
        factor = rope.attention_factor
        return _yarn(rope, plain, dims), 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor
    if rope.scaling == "longrope":
        return _longrope(rope, plain)
    if rope.scaling == "llama3":
        return _llama3(rope, plain), 1.0
    return plain, 1.0


def _yarn(rope: RopeSpec, plain, dims: int):
    """Equations 17 to 20: a ramp over the dimensions between interpolated and untouched frequencies."""

    def dim_of(turns):  # the dimension that makes this many turns in the original context
        return dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _longrope(rope: RopeSpec, plain):
    """Each wavelength by its own factor, searched for; those for long rows would harm short ones (section 3.3)."""
    factor = rope.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    return plain / np.array([rope.short_factors, rope.long_factors], np.float64), factor


def _llama3(rope: RopeSpec, plain):
    """Long wavelengths are interpolated, short ones kept, and those between blended."""
    turns = rope.original_context * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return plain * blend + plain / rope.factor * (1 - blend)


def tables(rope: RopeSpec, head: int, positions_BT: jax.Array, length_BT=None) -> tuple[jax.Array, jax.Array]:
    """`cos_BTR, sin_BTR` in float32.

    With dynamic NTK and LongRoPE a token's angles depend on how long its document is; that is how they are defined,
    and what `length_BT` says (or `[B, 1]`; see `lengths`).
    """
    found, factor = frequencies(rope, head, length_BT)
    if rope.scaling == "dynamic_ntk":
        angle_BTR = positions_BT[..., None].astype(jnp.float32) * found.astype(jnp.float32)
    elif rope.scaling == "longrope":
        short_BTR, long_BTR = (angles(f_R, positions_BT) for f_R in found)
        angle_BTR = jnp.where((length_BT > rope.original_context)[..., None], long_BTR, short_BTR)
    else:
        angle_BTR = angles(found, positions_BT)
    return jnp.cos(angle_BTR) * factor, jnp.sin(angle_BTR) * factor


def lengths(positions_BT, segments_BT):
    """The length of each token's document: one more than the position of its last token."""
    if segments_BT is None:
        return jnp.max(positions_BT, axis=1, keepdims=True) + 1
    ends_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    T = positions_BT.shape[1]
    last_BT = jax.lax.cummin(jnp.where(ends_BT, jnp.arange(T), T), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, last_BT, axis=1) + 1


def angles(frequency_R: np.ndarray, positions_BT: jax.Array) -> jax.Array:
    """position * frequency in radians, from -pi to pi, for positions up to 2^24.

    A float32 product is wrong by position * 6e-8 (0.002 rad at 32,768), so turns are counted in integers: 2^32 to a
    turn, which wrap around by themselves, and 8 bits more for what they leave out. What is left is position * 3e-12
    from rounding the frequency and 4e-7 from rounding the result.
    """
    turns = np.mod(frequency_R / (2 * np.pi), 1.0)
    fixed = np.round(turns * 2.0**40).astype(np.uint64)
    high_R, low_R = (jnp.asarray(x, jnp.uint32) for x in (fixed >> np.uint64(8), fixed & np.uint64(255)))
    position_BT1 = positions_BT[..., None].astype(jnp.uint32)
    wrapped_BTR = position_BT1 * high_R + (position_BT1 * low_R >> 8)
    return jax.lax.bitcast_convert_type(wrapped_BTR, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates dimensions i and i + R by the angles (the halves layout of Hugging Face), the rest pass; in float32."""
    R = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    if platform() == "tpu":
        return _rotated_whole(x_BTNH, cos, sin)
    a, b, rest = x_BTNH[..., :R], x_BTNH[..., R : 2 * R], x_BTNH[..., 2 * R :]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _rotated_whole(x_BTNH, cos_BT1R, sin_BT1R):
    """`rotate` without taking heads apart: on TPU, halves of 64 lanes are copied, padded to 128, and joined again.

    The swap of the halves is a product with a permutation, exact in any dtype, which the compiler fuses: with queries
    of 64 heads of 128 it takes a seventh off the cycles of projection and rotation, forward and backward.
    """
    H, R = x_BTNH.shape[-1], cos_BT1R.shape[-1]
    rest = [(0, 0)] * 3 + [(0, H - 2 * R)]
    cos = jnp.pad(jnp.concatenate([cos_BT1R, cos_BT1R], axis=-1), rest, constant_values=1)
    sin = jnp.pad(jnp.concatenate([-sin_BT1R, sin_BT1R], axis=-1), rest)
    swap = np.zeros((H, H), np.float32)
    swap[np.arange(R) + R, np.arange(R)] = swap[np.arange(R), np.arange(R) + R] = 1
    swapped = jnp.einsum("BTNH,HJ->BTNJ", x_BTNH, swap.astype(x_BTNH.dtype), precision="highest")
    return (x_BTNH * cos + swapped * sin).astype(x_BTNH.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes per head, geometric from 2^(-8/n); for other counts the odd ones of twice the power (ALiBi, section 3)."""

    def powers(n):
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    return np.array((powers(below) + powers(2 * below)[::2])[:heads], np.float32)


def sinusoids(positions_BT: jax.Array, embed: int) -> jax.Array:
    """Fixed absolute positions `[B, T, embed]` (Vaswani et al. 2017, section 3.5; sines, then cosines)."""
    rates = 10_000.0 ** (-np.arange(0, embed, 2) / embed)
    angle = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :embed]
