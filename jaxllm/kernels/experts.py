"""Grouped matrix multiplication for mixture-of-experts layers.

Rows come expert-major: first the rows of expert 0, then those of expert 1, and so on. Each expert's share is padded
with zero rows to a multiple of `block`, so that with block > 1 a block of rows belongs to exactly one expert.

Shapes: M rows (padded), D input, F output, E experts, C blocks, R rows of a block.
"""

import jax
import jax.numpy as jnp

from jaxllm.kernels.backend import alone, platform

#: Rows that the TPU kernel computes at a time.
TILE = 512


def rows_needed(rows: int, experts: int, block: int) -> int:
    """A static bound on the padded rows: every expert can waste at most `block - 1` of them."""
    if block == 1:
        return -(-rows // TILE) * TILE if platform() == "tpu" else rows
    return -(-rows // block) * block + min(experts, rows) * block


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: 1 where `ragged_dot` is compiled well, else near an expert's fair share, at most 256.

    On CPU XLA computes `ragged_dot` as a masked dense product over all experts (measured 2.2 times slower at 8
    experts), and a batched product over blocks of 256 rows is within 10 % of the dense layer.
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

    Rows past the sum of `sizes_E` give garbage; nobody reads them.
    """
    if block == 1:
        if platform() == "tpu" and alone():
            return _on_tpu(x_MD, w_EDF, sizes_E)
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)  # the compiler can split it over the tensor axis
    x_CRD = x_MD.reshape(-1, block, x_MD.shape[-1])
    expert_C = owners(sizes_E, x_MD.shape[0], block)
    y_CRF = jnp.einsum("CRD,CDF->CRF", x_CRD, w_EDF[expert_C])
    return y_CRF.reshape(-1, w_EDF.shape[-1])


def _on_tpu(x_MD, w_EDF, sizes_E):
    """The Pallas kernel that comes with JAX (MegaBlocks, arXiv 2211.15841): tiles past the last group are skipped."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    side = min(1024, max(128, *w_EDF.shape[1:]))
    return ops.gmm(x_MD, w_EDF, sizes_E, x_MD.dtype, (TILE, side, side))
