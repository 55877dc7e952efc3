"""How a matrix stands in the axes of a weight: which are summed over, and the same product on plain matrices.

A weight of attention has three axes, `(embed, heads, head)`; formats and adapters want a matrix, `(O, I)`. A `Form`
goes between the two, so that a weight type is written once, for matrices.

Shapes: I inputs (all summed axes as one), O outputs, E experts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxllm.weights.axes import Axes, sides


@dataclasses.dataclass(frozen=True)
class Form:
    """The axes of one weight, without the leading one over stacked layers."""

    roles: str
    """A letter for each axis: e expert, i summed over, o output."""
    shape: tuple[int, ...]

    @property
    def inputs(self) -> int:
        return self._size("i")

    @property
    def outputs(self) -> int:
        return self._size("o")

    @property
    def experts(self) -> tuple[int, ...]:
        return self.sizes("e")

    def sizes(self, role: str) -> tuple[int, ...]:
        """Of the axes with this role, one by one."""
        return tuple(n for n, r in zip(self.shape, self.roles, strict=True) if r == role)

    def _size(self, role: str) -> int:
        return math.prod(self.sizes(role))

    def matrix(self, w: jax.Array) -> jax.Array:
        """`[E?, O, I]` of the weight in its own axes; E may be the experts of one device."""
        order = [i for role in "eoi" for i, r in enumerate(self.roles) if r == role]
        experts = (w.shape[i] for i in order[: len(self.experts)])
        return w.transpose(order).reshape(*experts, self.outputs, self.inputs)

    def weight(self, w_OI: jax.Array) -> jax.Array:
        """The weight in its own axes of `[E?, O, I]`: the inverse of `matrix`."""
        order = [i for role in "eoi" for i, r in enumerate(self.roles) if r == role]
        wide = w_OI.reshape(*w_OI.shape[:-2], *self.sizes("o"), *self.sizes("i"))
        return wide.transpose(sorted(range(len(order)), key=order.__getitem__))

    def fits(self, equation: str) -> bool:
        """Whether the equation sums over the inputs; compressed latent attention reads `k_up` the other way round."""
        x_axes, w_axes, y_axes = split(equation)
        want = {"i": (True, False), "o": (False, True), "e": (True, True)}
        return all((a in x_axes, a in y_axes) == want[r] for a, r in zip(w_axes, self.roles, strict=True))

    def enter(self, equation: str, x: jax.Array) -> jax.Array:
        """`x` as `[E?, ..., I]`."""
        x_axes, w_axes, _ = split(equation)
        experts, inputs = self.letters(w_axes, "e"), self.letters(w_axes, "i")
        rest = "".join(a for a in x_axes if a not in experts + inputs)
        x = jnp.transpose(x, [x_axes.index(a) for a in experts + rest + inputs])
        return x.reshape(*x.shape[: len(experts + rest)], self.inputs)

    def leave(self, equation: str, y: jax.Array) -> jax.Array:
        """The result in the equation's axes, of `[E?, ..., O]`."""
        x_axes, w_axes, y_axes = split(equation)
        experts, outputs = self.letters(w_axes, "e"), self.letters(w_axes, "o")
        rest = "".join(a for a in x_axes if a not in w_axes)
        y = y.reshape(*y.shape[:-1], *self.sizes("o"))
        return jnp.transpose(y, [(experts + rest + outputs).index(a) for a in y_axes])

    def letters(self, w_axes: str, roles: str) -> str:
        """The equation's names of the axes with one of these roles."""
        return "".join(a for a, r in zip(w_axes, self.roles, strict=True) if r in roles)


def split(equation: str) -> tuple[str, str, str]:
    """`("BTD", "DF", "BTF")` of `"BTD,DF->BTF"`."""
    return tuple(equation.replace("->", ",").split(","))


def form_of(axes: Axes, shape: tuple[int, ...]) -> Form | None:
    """The form of the weight with these logical axes; None for vectors and position tables.

    A table of the vocabulary is an output-major matrix: the head sums over embed, and the embedding looks rows up.
    """
    stack, inputs, outputs = sides(axes)
    if not outputs or None in axes:
        return None
    if axes[inputs[0]] == "vocab":
        inputs, outputs = outputs, inputs
    kept = [i for i, name in enumerate(axes) if name != "layers"]
    roles = "".join("e" if i in stack else "i" if i in inputs else "o" for i in kept)
    return Form(roles, tuple(shape[i] for i in kept))


def matrix_axes(form: Form, axes: Axes) -> tuple[Axes, str | None, str | None]:
    """`(leading, output, input)` logical axes of a weight's matrices: `((layers,), "heads", "embed")` for q.

    Axes in one are split by what splits the first of them.
    """
    lead = tuple(name for name in axes[: len(axes) - len(form.roles)])
    names = axes[len(lead) :]
    first = {role: next((n for n, r in zip(names, form.roles, strict=True) if r == role), None) for role in "eoi"}
    return lead + (first["e"],) * len(form.experts), first["o"], first["i"]
