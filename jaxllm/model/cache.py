"""The key-value cache of one sequence batch: it goes into the model and comes out; nothing is mutated.

Shapes: B batch, K kv heads, S slots, H head dim, T new tokens. Heads come before slots because attention then reads
memory in order (5 times faster on CPU than slots before heads).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.model.spec import AttnSpec, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; a slot that holds nothing has position -1.

    Latent attention keeps what keys and values are made from as one key head, and no values.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array | None
    positions_BS: jax.Array
    chunk: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    """Set where slots are used again, under a sliding window: the most tokens that one write may hold."""
    empty: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """As `make_cache` gives it: what comes attends to itself alone, and positions ascend. Written once, it is not."""

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array | None, positions_BT: jax.Array) -> "LayerCache":
        """The cache with these entries at the slots of their positions; a position of -1 (padding) is dropped.

        Raises UserError for more tokens than the cache was made for: their first ones would lose keys of theirs.
        """
        slots, tokens = self.positions_BS.shape[1], positions_BT.shape[1]
        if self.chunk is not None and tokens > self.chunk:
            raise UserError(f"{tokens} tokens at once into a cache made with chunk={self.chunk}; give make_cache more")
        slot_BT = positions_BT if self.chunk is None else positions_BT % slots
        slot_BT = jnp.where(positions_BT < 0, slots, slot_BT)
        row_B1 = jnp.arange(positions_BT.shape[0])[:, None]

        def put(held_BKSH, new_BTKH):
            if new_BTKH is None:
                return None
            return held_BKSH.at[row_B1, :, slot_BT].set(new_BTKH.astype(held_BKSH.dtype), mode="drop")

        positions_BS = self.positions_BS.at[row_B1, slot_BT].set(positions_BT, mode="drop")
        return LayerCache(put(self.k_BKSH, k_BTKH), put(self.v_BKSH, v_BTKH), positions_BS, self.chunk)


Cache = tuple[LayerCache, ...]


def make_cache(config: ModelConfig, batch: int, slots: int, chunk: int | None = None) -> Cache:
    """An empty cache for `batch` sequences of up to `slots` tokens, one entry a layer, in the compute dtype.

    `chunk` promises that no call of the model brings more tokens at once. A layer with a sliding window then has slots
    for its window and a chunk only, and uses them again; by default it has all.
    """

    def layer(attn: AttnSpec) -> LayerCache:
        here = _slots(attn, slots, chunk)
        nowhere = jnp.full((batch, here), -1, jnp.int32)
        longest = chunk if here < slots else None
        if attn.latent is not None:
            shape = (batch, 1, here, attn.latent.kv_rank + attn.latent.rope_head)
            return LayerCache(jnp.zeros(shape, config.dtype), None, nowhere, longest, empty=True)
        shape = (batch, attn.kv_heads or attn.heads, here, config.head_dim(attn))
        return LayerCache(*(jnp.zeros(shape, config.dtype) for _ in "kv"), nowhere, longest, empty=True)

    return tuple(layer(spec.attn) for spec in config.layer_specs)


def _slots(attn: AttnSpec, slots: int, chunk: int | None) -> int:
    """Slots of a layer: the first query of a chunk still sees its window when the last one's key has been written."""
    if attn.window is None or chunk is None:
        return slots
    return min(slots, -(-(attn.window + chunk - 1) // 8) * 8)
