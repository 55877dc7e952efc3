"""Pruned weights: some values are zero, and stay so while the others train.

Shapes: O outputs, I inputs, E experts. A stack of layers has one more leading axis, which the scan over layers takes
off.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.weights import seam
from jaxllm.weights.axes import Axes
from jaxllm.weights.form import Form


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """An array in its own axes, and which of its values count.

    Every use goes through the mask, so that no gradient reaches a pruned value, and no optimizer brings one back: Muon,
    which mixes the gradients of a matrix, moves what lies under the mask, and nobody sees it.
    """

    values: jax.Array
    mask: jax.Array
    """uint8: a bit for each value, 8 to a byte along the last axis; 1 keeps it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self, dtype) -> jax.Array:
        """The weight with its zeros, as an array in its own axes."""
        keep = jnp.unpackbits(self.mask, axis=-1, count=self.shape[-1])
        return jnp.where(keep == 1, self.values, 0).astype(dtype)

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        return seam.einsum(equation, x, self.dense(x.dtype), dtype=dtype)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        return seam.grouped_matmul(x_MD, self.dense(x_MD.dtype), sizes_E, block=block)

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See `seam.take`."""
        return Pruned(self.values[ids], self.mask[ids]).dense(dtype)

    def axes(self, axes: Axes) -> "Pruned":
        """The logical axes of each array, by those of the weight."""
        return Pruned(axes, axes)


def prune(w: jax.Array, form: Form, score_OI: jax.Array, *, zeros: int, group: int) -> Pruned:
    """The weight without the `zeros` lowest scores among each `group` inputs of an output; of equal ones the first go.

    Args:
      w: in its own axes, without a stack (use `jax.vmap` for one).
      score_OI: `[E?, O, I]`
    """
    grouped = score_OI.reshape(*score_OI.shape[:-1], -1, group)
    rank = jnp.argsort(jnp.argsort(grouped, axis=-1), axis=-1)
    keep = form.weight((rank >= zeros).reshape(score_OI.shape))
    return Pruned(jnp.where(keep, w, 0), jnp.packbits(keep, axis=-1))


def scores(w: jax.Array, form: Form, squares_I: jax.Array | None = None) -> jax.Array:
    """float32 `[E?, O, I]`: |W|, or Wanda's |W| |x| (Sun et al. 2023, arXiv 2306.11695, equation 1).

    `squares_I`: `[E?, I]`, the squared norm of each input over all tokens; an expert that none reached goes by |W|.
    """
    size_OI = jnp.abs(form.matrix(w).astype(jnp.float32))
    if squares_I is None:
        return size_OI
    norm_I = jnp.sqrt(squares_I)
    reached = jnp.any(norm_I > 0, axis=-1, keepdims=True)
    return size_OI * jnp.where(reached, norm_I, 1)[..., None, :]
