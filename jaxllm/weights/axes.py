"""Which weights are matrices, and which of their axes are inputs and outputs: read off the logical axis names."""

import math
from typing import NamedTuple

import jax

Axes = tuple[str | None, ...]

#: Sides whose rows are looked up or scored one by one: embedding and head; router; positions and others unnamed.
_TABLE_AXES = {"vocab", "expert", None}


class Sides(NamedTuple):
    """Positions of the axes of one weight: the stacking ones (they lead), then the two sides of each matrix.

    A vector has no outputs.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def fans(self, weight: jax.Array) -> tuple[int, int]:
        """Sizes of the two sides."""
        return tuple(math.prod(weight.shape[i] for i in side) for side in self[1:])


def sides(axes: Axes) -> Sides:
    """The sides of the weight with these logical axes.

    `layers` stacks; `expert` stacks where it leads (an expert's weight) and is an output where it ends (the router).
    A `head` axis belongs to the axis before it, so (heads, head) is one side: q (embed, heads, head) has the input
    embed, o (heads, head, embed) has the inputs heads and head, and a bias (heads, head) is a vector.
    """
    stack, groups = (), []
    for i, name in enumerate(axes):
        if not groups and name in ("layers", "expert"):
            stack += (i,)
        elif groups and name == "head":
            groups[-1] += (i,)
        else:
            groups.append((i,))
    assert len(groups) <= 2, f"axes {axes} have {len(groups)} sides"
    return Sides(stack, *groups, *[()] * (2 - len(groups)))


def is_matrix(axes: Axes) -> bool:
    """Whether weight decay acts on a weight with these axes."""
    return bool(sides(axes).outputs)


def is_linear_map(axes: Axes) -> bool:
    """Whether Muon takes the weight: a matrix that is neither embedding, head, positions nor router."""
    _, inputs, outputs = sides(axes)
    return is_matrix(axes) and not _TABLE_AXES.intersection(axes[i] for i in inputs + outputs)
