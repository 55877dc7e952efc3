"""Matrices of codes as other software stores them, in our terms: what published layouts are read into and made of.

A line of a family's table says how a stored matrix splits and reorders into our weights. Its rows are outputs, so
codes, scales and zeros go the same way; columns have to stay where they are, since groups of them share a scale.

Shapes: O outputs, I inputs, G groups.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.families.base import to_ours, to_theirs
from jaxllm.hf.factors import Lines, lines_of
from jaxllm.hf.places import Place
from jaxllm.weights.form import Form
from jaxllm.weights.formats import get_format


@dataclasses.dataclass(frozen=True)
class Codes:
    """A matrix of codes in host memory; a value is `(code - zero) * scale`."""

    codes: np.ndarray
    """int8 or fp8 `[O, I]`, not packed; integers are signed."""
    scale: np.ndarray
    """float32 `[O, G]`"""
    zero: np.ndarray | None = None
    """float32 `[O, G]`"""
    order: np.ndarray | None = None
    """int32 `[I]`: the input that each column belongs to."""

    def values(self, format: str) -> np.ndarray:
        """float32 `[O, I]`"""
        values = np.asarray(get_format(format).decode(self.codes, np.float32)).reshape(*self.scale.shape, -1)
        if self.zero is not None:
            values = values - self.zero[..., None]
        values = (values * self.scale[..., None]).reshape(self.codes.shape)
        return values if self.order is None else values[:, np.argsort(self.order)]


@dataclasses.dataclass(frozen=True)
class Coded:
    """What is known of a stored matrix of codes before it is read."""

    name: str
    format: str
    outputs: int
    inputs: int
    groups: int
    read: Callable[[], Codes]
    symmetric: bool = True
    ordered: bool = False
    activations: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def map(self) -> np.ndarray:
        """The floats that it stands for, `[O, I]`."""
        return self.read().values(self.format)


def lines_for(place: Place, forms: Mapping[str, Form], rope: int) -> Lines:
    """How the sides of a stored matrix become those of our weights, of one layer and one expert.

    Raises SettingsError for a tensor that is no such matrix, or whose columns are stored in another order.
    """
    alone = {}
    for path in place.paths.values():
        kept = [(r, n) for r, n in zip(forms[path].roles, forms[path].shape, strict=True) if r != "e"]
        alone[path] = Form("".join(r for r, _ in kept), tuple(n for _, n in kept))
    lines = lines_of(place, alone, rope)
    for path, form in lines.forms.items():
        columns = np.arange(form.inputs)
        ours = to_ours(lines.a[path], columns[None], {path: (*form.sizes("i"), 1)}, rope)[path]
        if not np.array_equal(ours.ravel(), columns):
            raise SettingsError(
                f"{place.name} has its inputs in another order than {place.paths[path]}, and groups of them share a "
                "scale; use the model's weights in bfloat16"
            )
    return lines


def split(lines: Lines, theirs: Codes) -> dict[str, Codes]:
    """The codes of each of our weights, out of those of one stored matrix."""

    def rows(x_OX):
        shapes = {path: (x_OX.shape[1], *form.sizes("o")) for path, form in lines.forms.items()}
        found = to_ours(lines.b, x_OX, shapes, lines.rope)
        return {path: x.reshape(x_OX.shape[1], -1).T for path, x in found.items()}

    codes, scale = rows(theirs.codes), rows(theirs.scale)
    zero = dict.fromkeys(codes) if theirs.zero is None else rows(theirs.zero)
    return {path: Codes(codes[path], scale[path], zero[path], theirs.order) for path in codes}


def join(lines: Lines, ours: Mapping[str, Codes], name: str) -> Codes:
    """The stored matrix of our weights: the inverse of `split`. Raises SettingsError where they do not go together."""
    alike = {(x.scale.shape[1], x.zero is None, None if x.order is None else x.order.tobytes()) for x in ours.values()}
    if len(alike) > 1:
        raise SettingsError(
            f"{name} holds {', '.join(ours)}, which are quantised in different ways; quantise them alike"
        )

    def rows(what):
        parts = {path: getattr(codes, what) for path, codes in ours.items()}
        wide = {path: x.T.reshape(x.shape[1], *lines.forms[path].sizes("o")) for path, x in parts.items()}
        return to_theirs(lines.b, wide, lines.rope)

    first = next(iter(ours.values()))
    return Codes(rows("codes"), rows("scale"), None if first.zero is None else rows("zero"), first.order)
