"""Where the arrays of an optimizer's state live: where their weight does."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec


def owner_of(path: str, weights: Mapping[str, jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct | None:
    """The weight whose path stands somewhere in the path of a state's array, the longest one; None for none."""
    inside = [name for name in weights if f"/{name}/" in f"/{path}/"]
    return weights[max(inside, key=len)] if inside else None


def like(weight: jax.ShapeDtypeStruct, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array of this shape in the state of `weight` (with its sharding).

    An axis of the state is one of the weight's, or neighbouring ones flattened into one; the weight's order is kept,
    some may be missing. So all of a moment is found again, and the rows and columns of Adafactor: for a weight
    (layers, embed, heads, head), which is split by `(None, fsdp, tensor, None)`, the row moments (layers, embed) are
    split by `(None, fsdp)` and the column moments (layers, heads * head) by `(None, tensor)`.
    """
    split = (*weight.sharding.spec, *[None] * len(weight.shape))[: len(weight.shape)]
    spec, start = [], 0
    for size in shape:
        first, last = _group(weight.shape, start, size)
        # Blocks of a flattened axis are blocks of its first one; what splits a later one would cut across them.
        spec.append(split[first] if last > first and not any(split[first + 1 : last]) else None)
        start = max(start, last)
    return NamedSharding(weight.sharding.mesh, PartitionSpec(*spec))


def _group(sizes: Sequence[int], start: int, size: int) -> tuple[int, int]:
    """`(first, last)` of the first run of axes from `start` on that has `size` entries; an empty run for none."""
    for first in range(start, len(sizes)):
        for last in range(first + 1, len(sizes) + 1):
            if math.prod(sizes[first:last]) == size:
                return first, last
    return 0, 0
