"""Rows that travel to the devices of their experts, and back: a ragged all-to-all over one mesh axis.

Within `jax.shard_map`. Rows lie expert-major on both sides; a device sends one slice to each expert, and an expert's
slices lie one after another where it lives. Nothing is dropped: what comes in has room for every row of every device.

Shapes: R rows of a device, M rows laid out by expert where they are computed, D features, E experts in all, W devices,
L = E / W experts of a device, N = W L slices that come in.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.kernels.backend import platform


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where each slice begins and how long it is, on the sending and on the receiving side."""

    axis: str
    first_E: jax.Array
    """Where the rows for each expert begin among those of this device."""
    counts_E: jax.Array
    there_E: jax.Array
    """Where they will begin on the device of that expert."""
    from_N: jax.Array
    """Where each slice that comes in began on the device that sent it; N goes by sender, then by expert."""
    counts_N: jax.Array
    here_N: jax.Array
    """Where it begins here."""

    def out(self, x_RD: jax.Array, rows: int) -> jax.Array:
        """`x_MD`: what all devices send to the experts here, M = `rows`; zeros between."""
        slices = self.first_E, self.counts_E, self.there_E, self.counts_N
        return _ragged(self.axis, x_RD, rows, slices, (self.from_N, self.here_N))

    def back(self, y_MD: jax.Array, rows: int) -> jax.Array:
        """`y_RD`, each row where `out` took it from, R = `rows`."""
        slices = self.here_N, self.counts_N, self.from_N, self.counts_E
        return _ragged(self.axis, y_MD, rows, slices, (self.there_E, self.first_E))


def plan(counts_E: jax.Array, axis: str, block: int) -> tuple[Exchange, jax.Array]:
    """`(exchange, sizes_L)` for a device that has so many rows for each expert, and the sizes of its own experts.

    Sizes are padded to whole blocks of rows (`kernels.experts`).
    """
    counts_WE = jax.lax.all_gather(counts_E, axis)
    return laid_out(axis, jnp.cumsum(counts_WE, axis=1) - counts_WE, counts_WE, block)


def laid_out(axis: str, first_WE: jax.Array, counts_WE: jax.Array, block: int) -> tuple[Exchange, jax.Array]:
    """`plan` for slices that begin at `first_WE` among the rows of each device, so many rows each."""
    W, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    L = counts_WE.shape[1] // W
    sizes_E = -(-jnp.sum(counts_WE, axis=0) // block) * block
    sizes_WL = sizes_E.reshape(W, L)
    starts_E = (jnp.cumsum(sizes_WL, axis=1) - sizes_WL).reshape(-1)
    before_WE = jnp.cumsum(counts_WE, axis=0) - counts_WE
    return _between(axis, me, L, first_WE, counts_WE, starts_E + before_WE), sizes_WL[me]


def to_slots(axis: str, owner_WS: jax.Array, index_WS: jax.Array) -> Exchange:
    """Brings the row at `index` of the device `owner` to each slot of each device; nothing where the owner is W."""
    W, S = owner_WS.shape
    counts_WN = (owner_WS.reshape(-1) == jnp.arange(W)[:, None]).astype(jnp.int32)
    slot_N = jnp.arange(W * S, dtype=jnp.int32) % S
    first_WN, there_WN = (jnp.broadcast_to(x_N, (W, W * S)) for x_N in (index_WS.reshape(-1), slot_N))
    return _between(axis, jax.lax.axis_index(axis), S, first_WN, counts_WN, there_WN)


def _between(axis: str, me, L: int, first_WE, counts_WE, there_WE) -> Exchange:
    """What device `me` sends and receives, of all that all devices do."""
    mine = lambda x_WE: jax.lax.dynamic_slice_in_dim(x_WE, me * L, L, axis=1).reshape(-1)  # noqa: E731
    return Exchange(
        axis,
        first_E=first_WE[me],
        counts_E=counts_WE[me],
        there_E=there_WE[me],
        from_N=mine(first_WE),
        counts_N=mine(counts_WE),
        here_N=mine(there_WE),
    )


def _ragged(axis: str, x, rows: int, slices, incoming):
    """`slices`: where each begins, its rows, where it goes, the rows of those that come in; `incoming`: where those
    began and where they come to. The last two say nothing new, and are what a plain gather needs."""
    starts, sizes, goes, sizes_in = slices
    if platform() == "cpu":  # XLA has no ragged all-to-all there
        return _by_gather(axis, x, rows, *incoming, sizes_in)
    out = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    return jax.lax.ragged_all_to_all(x, out, starts, sizes, goes, sizes_in, axis_name=axis)


def _by_gather(axis: str, x_RD, rows: int, from_N, here_N, sizes_N):
    """The same with all rows of all devices in memory."""
    x_WRD = jax.lax.all_gather(x_RD, axis)
    offset_MN = jnp.arange(rows)[:, None] - here_N
    inside_MN = (offset_MN >= 0) & (offset_MN < sizes_N)
    sender_N = jnp.arange(len(here_N)) // (len(here_N) // x_WRD.shape[0])
    row_MN = sender_N * x_RD.shape[0] + from_N + offset_MN
    row_M = jnp.sum(jnp.where(inside_MN, row_MN, 0), axis=1)  # a row is in one slice at most
    row_M = jnp.where(jnp.any(inside_MN, axis=1), row_M, x_WRD.shape[0] * x_WRD.shape[1])
    flat = x_WRD.reshape(-1, *x_RD.shape[1:])
    return jnp.take(flat, row_M, axis=0, mode="fill", fill_value=0)
