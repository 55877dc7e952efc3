"""Experts on loan: a device with little to do computes part of a hot expert's rows, with its weights for this once.

Within `jax.shard_map`, over one mesh axis. All devices know how many rows each has for each expert, and each works out
the same loans. The rows of an expert have one order, by sender, then by place there; its owner keeps the first of them,
and borrowers take ranges of the rest. Nothing is dropped: where no loan helps, rows stay with the owner.

Shapes: W devices, E experts, L = E / W experts of a device, S slots of a device for borrowed ones, V = L + S.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.kernels import exchange
from jaxllm.kernels.backend import platform

#: Experts that a device can borrow at a time. Of 60 random loads each of ten kinds (Zipf, log-normal, two or three
#: experts that take all) on six meshes of 4 to 64 devices, two left the heaviest device 1.17 times the fair share at
#: most, and 1.0625 times of most kinds; one left 1.36, and 2.4 where all experts of two devices were hot.
SLOTS = 2
#: A device with a 16th more than its fair share lends.
SLACK = 16
#: Rows that a device computes in the time that an expert travels: 2 FLOPs a row and 2 bytes for each weight, so FLOP/s
#: over bytes/s of one side of the torus: 2,000 on v5e, 2,300 on v5p, 4,600 on v6e; with NVLink 2,200 on H100 and 2,500
#: on B200 (`chips.py`). On CPU a copy in memory, for tests.
WORTH = {"cpu": 4, "tpu": 2500, "gpu": 2200}


class Loans(NamedTuple):
    """Who computes which rows: `own_E[e]` first rows of an expert with its owner, and [low, high) with borrowers."""

    own_E: jax.Array
    expert_WS: jax.Array
    """The expert in each slot of each device; any one where the range is empty."""
    low_WS: jax.Array
    high_WS: jax.Array

    def rows_W(self) -> jax.Array:
        """Rows that each device computes."""
        W = self.expert_WS.shape[0]
        return jnp.sum(self.own_E.reshape(W, -1), axis=1) + jnp.sum(self.high_WS - self.low_WS, axis=1)

    def most(self) -> jax.Array:
        """Loans of the device that lends most."""
        W, L = self.expert_WS.shape[0], self.own_E.shape[0] // self.expert_WS.shape[0]
        owner_WS = jnp.where(self.high_WS > self.low_WS, self.expert_WS // L, W)
        return jnp.max(jnp.bincount(owner_WS.reshape(-1), length=W + 1)[:W])


def no_loans(rows_E: jax.Array, devices: int, slots: int) -> Loans:
    """Every row with the owner of its expert."""
    return Loans(rows_E, *(jnp.zeros((devices, slots), rows_E.dtype) for _ in range(3)))


def assign(rows_E: jax.Array, devices: int, slots: int, worth: int = 0) -> Loans:
    """Loans that leave no device much more than its fair share of the rows, if slots suffice.

    With few slots some stay half empty, and more is left with lenders than need be: then all may take a 16th of the
    fair share more, and again, until that is enough. Integers alone, so that every device finds the same.

    worth: rows beyond the share for which nobody lends.
    """
    fair = -(-jnp.sum(rows_E) // devices)
    slack = jnp.maximum(fair // SLACK, worth)

    def heaviest(loans):
        return jnp.max(loans.rows_W())

    def uneven(state):
        tries, best = state
        return (heaviest(best) - fair > tries * fair // SLACK + slack) & (tries < SLACK)

    def another(state):
        tries, best = state
        found = _greedy(rows_E, fair + tries * fair // SLACK, slack, devices, slots)
        better = heaviest(found) < heaviest(best)
        return tries + 1, Loans(*(jnp.where(better, a, b) for a, b in zip(found, best, strict=True)))

    return jax.lax.while_loop(uneven, another, (jnp.int32(0), no_loans(rows_E, devices, slots)))[1]


def _greedy(rows_E, share, slack, devices: int, slots: int) -> Loans:
    """While a device has more than `share` and `slack`: rows of its fullest expert go to the device with most room.

    A borrower fills up to the share and no further, and a lender keeps at least that.
    """

    def parties(loans, used_W):
        rows_W = loans.rows_W()
        room_W = jnp.where(used_W < slots, share - rows_W, 0)
        return rows_W, room_W, jnp.argmax(rows_W), jnp.argmax(room_W)

    def unfair(state):
        rows_W, room_W, heavy, light = parties(*state)
        return (rows_W[heavy] - share > slack) & (room_W[light] > 0)

    def lend(state):
        loans, used_W = state
        rows_W, room_W, heavy, light = parties(*state)
        of_heavy_E = jnp.arange(len(rows_E)) // (len(rows_E) // devices) == heavy
        expert = jnp.argmax(jnp.where(of_heavy_E, loans.own_E, -1))
        high = loans.own_E[expert]
        low = high - jnp.minimum(jnp.minimum(rows_W[heavy] - share, room_W[light]), high)
        place = light, used_W[light]
        made = Loans(
            loans.own_E.at[expert].set(low),
            loans.expert_WS.at[place].set(expert.astype(rows_E.dtype)),
            loans.low_WS.at[place].set(low),
            loans.high_WS.at[place].set(high),
        )
        return made, used_W.at[light].add(1)

    return jax.lax.while_loop(unfair, lend, (no_loans(rows_E, devices, slots), jnp.zeros(devices, jnp.int32)))[0]


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """Brings the experts on loan to the devices that borrow them."""

    axis: str
    made: jax.Array
    """Whether there are any; the same on all devices, of this axis and of others, since weights travel only then."""
    loans: Loans

    def widen(self, weight: Any, dtype) -> Any:
        """The experts of this device, `[L, ...]`, with those that it borrows behind them, `[V, ...]`.

        Any weight type whose arrays lead with the axis over experts; a plain array in `dtype`. Raises UserError for
        another.
        """
        if isinstance(weight, jax.Array):
            return self._wide(weight.astype(dtype))
        leaves, treedef = jax.tree.flatten(weight)
        names = jax.tree.leaves(_names(weight), is_leaf=lambda x: isinstance(x, tuple))
        for name in names:
            if isinstance(name, tuple) and name[:1] != ("expert",):
                raise UserError(
                    f"kernels.experts=lend: {type(weight).__name__} has an array that is not one expert after another; "
                    "set kernels.experts=wait"
                )
        pairs = zip(leaves, names, strict=True)  # what has no axes is of this call, such as the key of a dropout
        return treedef.unflatten(self._wide(leaf) if isinstance(name, tuple) else leaf for leaf, name in pairs)

    def _wide(self, x_L):
        S = self.loans.expert_WS.shape[1]
        nothing = lambda x_L: jnp.zeros((S, *x_L.shape[1:]), x_L.dtype)  # noqa: E731
        lent = lambda x_L: _travel(self.axis, x_L.shape[0], x_L, self.loans)  # noqa: E731
        return jnp.concatenate([x_L, jax.lax.cond(self.made, lent, nothing, x_L)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(axis: str, held: int, x_L, loans: Loans):
    """`x_S`, what is borrowed here, of the arrays of the `held` experts of each device.

    The derivative in the words of JAX would be wrong: an expert that is lent twice must sum what comes back.
    """
    owner_WS, index_WS = _places(loans, held)
    return exchange.to_slots(axis, owner_WS, index_WS).out(x_L, owner_WS.shape[1])


def _places(loans: Loans, held: int):
    """`(owner, its place there)` of the expert in each slot; the owner is W where nothing is borrowed."""
    lent_WS = loans.high_WS > loans.low_WS
    return jnp.where(lent_WS, loans.expert_WS // held, lent_WS.shape[0]), loans.expert_WS % held


def _travel_back(axis, held, loans: Loans, dx_S):
    if not jnp.issubdtype(dx_S.dtype, jnp.floating):  # codes of a quantised weight
        return None, None
    owner_WS, index_WS = _places(loans, held)
    W, S = owner_WS.shape
    apart = exchange.to_slots(axis, owner_WS, jnp.arange(W * S, dtype=jnp.int32).reshape(W, S))
    came_N = apart.back(dx_S, W * S)  # zeros, but for slots that hold what is lent from here
    of_NL = jax.nn.one_hot(index_WS.reshape(-1), held, dtype=dx_S.dtype)
    exact = dict(precision="highest", preferred_element_type=jnp.float32)
    return jnp.einsum("NL,N...->L...", of_NL, came_N, **exact).astype(dx_S.dtype), None


_travel.defvjp(lambda axis, held, x_L, loans: (_travel(axis, held, x_L, loans), loans), _travel_back)


def _names(weight):
    """The logical axes of each array of a weight of another type than an array."""
    if not hasattr(weight, "axes"):
        raise UserError(f"kernels.experts=lend: {type(weight).__name__} cannot be lent; set kernels.experts=wait")
    return weight.axes(("expert", "embed", "ffw"))


def plan(counts_E: jax.Array, axis: str, block: int, everywhere: tuple[str, ...]):
    """`(exchange, sizes_V, borrowed)`: as `exchange.plan`, with the experts that this device borrows behind its own.

    everywhere: all mesh axes over which the code at hand sees the part of one device.
    """
    W, L = jax.lax.axis_size(axis), counts_E.shape[0] // jax.lax.axis_size(axis)
    S = slots(counts_E.shape[0], L)
    counts_WE = jax.lax.all_gather(counts_E, axis)
    rows_E = jnp.sum(counts_WE, axis=0)
    worth = WORTH[platform()]
    before, after = no_loans(rows_E, W, S), assign(rows_E, W, S, worth)
    pays = jnp.max(before.rows_W()) - jnp.max(after.rows_W()) > worth * after.most()
    loans = Loans(*(jnp.where(pays, a, b) for a, b in zip(after, before, strict=True)))
    made = jax.lax.pmax(pays.astype(jnp.int32), everywhere) > 0
    return *exchange.laid_out(axis, *shares(counts_WE, loans), block), Borrowed(axis, made, loans)


def slots(experts: int, held: int) -> int:
    """Slots for borrowed experts on a device that holds so many of them."""
    return min(SLOTS, experts - held)


def shares(counts_WE: jax.Array, loans: Loans) -> tuple[jax.Array, jax.Array]:
    """`(first, counts)`, each `[W, W V]`: where each device's slice for each place begins among its rows.

    Places go by device: those of its own experts, then its slots. A slice is what a device's rows for an expert and the
    range of the place have in common.
    """
    W, S = loans.expert_WS.shape
    own_WL = loans.own_E.reshape(W, -1)
    experts_WL = jnp.arange(loans.own_E.shape[0], dtype=own_WL.dtype).reshape(W, -1)
    places = lambda own_WL, slot_WS: jnp.concatenate([own_WL, slot_WS], axis=1).reshape(-1)  # noqa: E731
    expert_P = places(experts_WL, loans.expert_WS)
    low_P, high_P = places(jnp.zeros_like(own_WL), loans.low_WS), places(own_WL, loans.high_WS)
    before_WP = (jnp.cumsum(counts_WE, axis=0) - counts_WE)[:, expert_P]
    counts_WP = counts_WE[:, expert_P]
    low_WP, high_WP = (jnp.clip(x_P - before_WP, 0, counts_WP) for x_P in (low_P, high_P))
    first_WP = (jnp.cumsum(counts_WE, axis=1) - counts_WE)[:, expert_P]
    return first_WP + low_WP, high_WP - low_WP
