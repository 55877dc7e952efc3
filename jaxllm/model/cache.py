"""The key-value cache of one sequence batch: it goes into the model and comes out; nothing is mutated.

Shapes: B batch, K kv heads, S slots, H head dim, T new tokens. Heads come before slots because attention then reads
memory in order (5 times faster on CPU than slots before heads).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.kernels.quantized import quantize_rows
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
    k_scale_BKS: jax.Array | None = None
    """float32 where keys and values are int8: what each head's entry at each slot is multiplied by."""
    v_scale_BKS: jax.Array | None = None
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

        def put(held, scale_BKS, new_BTKH):
            if new_BTKH is None:
                return None, None
            if scale_BKS is not None:
                new_BTKH, scale_BTK1 = quantize_rows(new_BTKH)
                scale_BKS = scale_BKS.at[row_B1, :, slot_BT].set(scale_BTK1[..., 0], mode="drop")
            return held.at[row_B1, :, slot_BT].set(new_BTKH.astype(held.dtype), mode="drop"), scale_BKS

        positions_BS = self.positions_BS.at[row_B1, slot_BT].set(positions_BT, mode="drop")
        k_BKSH, k_scale_BKS = put(self.k_BKSH, self.k_scale_BKS, k_BTKH)
        v_BKSH, v_scale_BKS = put(self.v_BKSH, self.v_scale_BKS, v_BTKH)
        return LayerCache(k_BKSH, v_BKSH, positions_BS, k_scale_BKS, v_scale_BKS, self.chunk)

    def read(self, dtype) -> tuple[jax.Array, jax.Array | None]:
        """`(k_BKSH, v_BKSH)` as they were written, or as int8 keeps them."""
        pairs = ((self.k_BKSH, self.k_scale_BKS), (self.v_BKSH, self.v_scale_BKS))
        return tuple(x if scale is None else (x * scale[..., None]).astype(dtype) for x, scale in pairs)


Cache = tuple[LayerCache, ...]


def make_cache(
    config: ModelConfig, batch: int, slots: int, chunk: int | None = None, *, stored: str = "float"
) -> Cache:
    """An empty cache for `batch` sequences of up to `slots` tokens, one entry a layer.

    `stored`: float keeps entries in the compute dtype; int8 keeps each head's entry at each slot in 8 bits, with a
    scale of its own.

    `chunk` promises that no call of the model brings more tokens at once. A layer with a sliding window then has slots
    for its window and a chunk only, and uses them again; by default it has all.
    """

    def layer(attn: AttnSpec) -> LayerCache:
        here = _slots(attn, slots, chunk)
        nowhere = jnp.full((batch, here), -1, jnp.int32)
        longest = chunk if here < slots else None
        if attn.latent is not None:
            shapes = [(batch, 1, here, attn.latent.kv_rank + attn.latent.rope_head)]
        else:
            shapes = [(batch, attn.kv_heads or attn.heads, here, config.head_dim(attn))] * 2
        held = [jnp.zeros(shape, jnp.int8 if stored == "int8" else config.dtype) for shape in shapes]
        scales = [jnp.zeros(shape[:3]) if stored == "int8" else None for shape in shapes]
        held, scales = ([*pair, None][:2] for pair in (held, scales))
        return LayerCache(*held, nowhere, *scales, longest, empty=True)

    return tuple(layer(spec.attn) for spec in config.layer_specs)


def _slots(attn: AttnSpec, slots: int, chunk: int | None) -> int:
    """Slots of a layer: the first query of a chunk still sees its window when the last one's key has been written."""
    if attn.window is None or chunk is None:
        return slots
    return min(slots, -(-(attn.window + chunk - 1) // 8) * 8)
