"""Grouped matrix multiplication for mixture-of-experts layers.

Rows come expert-major: first the rows of expert 0, then those of expert 1, and so on. Each expert's share is padded
with zero rows to a multiple of `block`, so that with block > 1 a block of rows belongs to exactly one expert.

Shapes: M rows (padded), D input, F output, E experts, C blocks, R rows of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxllm.kernels.backend import alone, platform

#: Rows that the TPU kernel computes at a time.
TILE = 512
#: Blocks that one trip of the loop on CPU computes.
TRIP = 2


def rows_needed(rows: int, experts: int, block: int) -> int:
    """A static bound on the padded rows: every expert can waste at most `block - 1` of them; whole trips."""
    if block == 1:
        return -(-rows // TILE) * TILE if platform() == "tpu" else rows
    blocks = -(-rows // block) + min(experts, rows)
    return -(-blocks // TRIP) * TRIP * block


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: 1 where `ragged_dot` is compiled well, else near an expert's fair share, at most 256.

    On CPU XLA computes `ragged_dot` as a masked dense product over all experts (measured 2.2 times slower at 8
    experts); products of blocks of 256 rows take 1.3 times the dense layer, part of it for rows that are padding.
    """
    if platform() != "cpu":
        return 1
    share = max(1, rows // experts)
    return min(256, max(8, 1 << (share - 1).bit_length()))


def owners(sizes_E: jax.Array, rows: int, block: int = 1) -> jax.Array:
    """The expert of each block of rows; the last one for those past the sum of `sizes_E`."""
    starts_C = jnp.arange(rows // block) * block
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes_E), starts_C, side="right"), sizes_E.shape[0] - 1)


def grouped_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
    """`y_MF`: rows of expert e times `w_EDF[e]`; `sizes_E` counts each expert's rows, padding included.

    Rows past the sum of `sizes_E` give what nobody reads, but nothing that is not finite, and their gradient is 0: the
    gradients of biases and adapters are sums over all rows.
    """
    if block == 1:
        if platform() == "tpu" and alone():
            return _on_tpu(x_MD, w_EDF, sizes_E)
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)  # the compiler can split it over the tensor axis
    return _by_blocks(x_MD, w_EDF, sizes_E, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_blocks(x_MD, w_EDF, sizes_E, block: int):
    """A loop over the blocks that hold rows, a few at a time, each with the weights of its expert.

    On CPU one batched product over all blocks gathers weights anew for each and computes the padding too: forward and
    backward of a layer of 8 experts take 1.1 times as long with jax 0.12 and 1.4 times with 0.10.
    """
    trips, at_once, expert_C = _trips(x_MD.shape[0], sizes_E, block)

    def trip(i, y_MF):
        part = i * at_once * block, at_once * block
        x_CRD = jax.lax.dynamic_slice_in_dim(x_MD, *part).reshape(at_once, block, -1)
        experts = jax.lax.dynamic_slice_in_dim(expert_C, i * at_once, at_once)
        y_CRF = jnp.einsum("CRD,CDF->CRF", x_CRD, jnp.take(w_EDF, experts, axis=0, mode="clip"))
        return jax.lax.dynamic_update_slice_in_dim(y_MF, y_CRF.reshape(-1, y_CRF.shape[-1]), part[0], 0)

    empty = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), jnp.result_type(x_MD, w_EDF))
    return jax.lax.fori_loop(0, trips, trip, empty)


def _trips(rows: int, sizes_E, block: int):
    """`(trips, blocks of a trip, expert of each block)`."""
    at_once = math.gcd(rows // block, TRIP)
    needed = -(-(jnp.sum(sizes_E) // block) // at_once)
    # The bound always holds; a plan reads it, where it could not know how often a loop runs that ends by its data.
    return jnp.minimum(needed, rows // block // at_once), at_once, owners(sizes_E, rows, block)


def _save(x_MD, w_EDF, sizes_E, block):
    return _by_blocks(x_MD, w_EDF, sizes_E, block), (x_MD, w_EDF, sizes_E)


def _backward(block, saved, dy_MF):
    x_MD, w_EDF, sizes_E = saved
    trips, at_once, expert_C = _trips(x_MD.shape[0], sizes_E, block)

    def trip(i, gradients):
        dx_MD, dw_EDF = gradients
        part = i * at_once * block, at_once * block
        x_CRD, dy_CRF = (jax.lax.dynamic_slice_in_dim(a, *part).reshape(at_once, block, -1) for a in (x_MD, dy_MF))
        experts = jax.lax.dynamic_slice_in_dim(expert_C, i * at_once, at_once)
        w_CDF = jnp.take(w_EDF, experts, axis=0, mode="clip")
        dx_CRD = jnp.einsum("CRF,CDF->CRD", dy_CRF, w_CDF).astype(dx_MD.dtype)
        dx_MD = jax.lax.dynamic_update_slice_in_dim(dx_MD, dx_CRD.reshape(-1, dx_CRD.shape[-1]), part[0], 0)
        dw_CDF = jnp.einsum("CRD,CRF->CDF", x_CRD, dy_CRF, preferred_element_type=jnp.float32)
        return dx_MD, dw_EDF.at[experts].add(dw_CDF)

    empty = jnp.zeros_like(x_MD), jnp.zeros(w_EDF.shape, jnp.float32)
    dx_MD, dw_EDF = jax.lax.fori_loop(0, trips, trip, empty)
    return dx_MD, dw_EDF.astype(w_EDF.dtype), None


_by_blocks.defvjp(_save, _backward)


def _on_tpu(x_MD, w_EDF, sizes_E):
    # Tiles of 1024 x 1024 in float32 take 20 MB of VMEM in the gradient of the weights; 16 MB are there on TPU v5p.
    side = min(1024 if x_MD.dtype.itemsize < 4 else 512, max(128, *w_EDF.shape[1:]))
    return _by_tiles(x_MD, w_EDF, sizes_E, (TILE, side, side))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_tiles(x_MD, w_EDF, sizes_E, tiles: tuple[int, int, int]):
    """The Pallas kernels that come with JAX (MegaBlocks, arXiv 2211.15841).

    They skip what lies past the last group and leave it unwritten, which may be NaN; here it becomes 0.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    y_MF = gmm(x_MD, w_EDF, sizes_E, x_MD.dtype, tiles, interpret=platform() == "cpu")
    return _of_groups(y_MF, sizes_E)


def _of_groups(y_MF, sizes_E):
    return jnp.where(jnp.arange(y_MF.shape[0])[:, None] < jnp.sum(sizes_E), y_MF, 0)


def _save_tiles(x_MD, w_EDF, sizes_E, tiles):
    return _by_tiles(x_MD, w_EDF, sizes_E, tiles), (x_MD, w_EDF, sizes_E)


def _backward_tiles(tiles, saved, dy_MF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    (x_MD, w_EDF, sizes_E), interpret = saved, platform() == "cpu"
    dx_MD = gmm(dy_MF, w_EDF, sizes_E, x_MD.dtype, tiles, transpose_rhs=True, interpret=interpret)
    dw_EDF = tgmm(x_MD.swapaxes(0, 1), dy_MF, sizes_E, w_EDF.dtype, tiles, interpret=interpret)
    return _of_groups(dx_MD, sizes_E), dw_EDF, None


_by_tiles.defvjp(_save_tiles, _backward_tiles)
