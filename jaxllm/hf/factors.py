"""Low-rank factors of a published tensor and those of our weights, by the line of the family's table that maps it.

An adapter adds B A to a stored tensor: A is (R, inputs), B is (outputs, R), however the tensor itself is stored. A line
of the table reorders and splits either side of a matrix, so it reorders and splits one factor each.

Shapes: I inputs, O outputs, R rank.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.families.base import Map, stored_shape, to_ours, to_theirs
from jaxllm.hf.places import Place
from jaxllm.weights.form import Form


@dataclasses.dataclass(frozen=True)
class Factors:
    """An adapter of one matrix."""

    a: np.ndarray
    """`[I, R]` of ours, `[R, I]` of a published one."""
    b: np.ndarray
    """`[R, O]` of ours, `[O, R]` of a published one."""
    magnitude: np.ndarray | None
    """`[O]`, of DoRA."""
    scale: float


@dataclasses.dataclass(frozen=True)
class Lines:
    """The line of a table for each factor of a tensor."""

    a: dict[str, Map]
    """By the path of each weight; they have one A in common there."""
    b: Map
    magnitude: Map
    forms: dict[str, Form]
    rope: int

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the published A and B."""
        path, line = next(iter(self.a.items()))
        b = {p: (rank, *form.sizes("o")) for p, form in self.forms.items()}
        return stored_shape(line, {path: (*self.forms[path].sizes("i"), rank)}), stored_shape(self.b, b)


def lines_of(place: Place, forms: Mapping[str, Form], rope: int) -> Lines:
    """The lines of one stored tensor. Raises SettingsError for one whose sides are not one group of axes each."""
    m, mine = place.map, {path: forms[whole] for path, whole in place.paths.items()}
    a, bs, vectors, join = {}, [], [], 0
    for path, flat, stored, here in m.parts:
        inputs, outputs = (mine[path].letters("".join(here), role) for role in "io")
        groups = re.findall(r"\([^)]*\)|\S+", stored)
        sides = {"".join(sorted(re.findall(r"[A-Z]", group))): group for group in groups}
        try:
            left, right = sides["".join(sorted(inputs))], sides["".join(sorted(outputs))]
        except KeyError:
            left = right = ""
        if len(groups) != 2 or not left or flat[m.join] in inputs and len(m.parts) > 1:
            raise SettingsError(
                f"{place.name} ({stored}) is not one matrix of outputs by inputs, so that no published layout holds "
                "adapters or codes of it; leave it out"
            )
        a[path] = Map(path, m.theirs, f"r {left} -> {' '.join(inputs)} r", halves=m.halves)
        bs.append(f"{right} r -> r {' '.join(outputs)}")
        vectors.append(f"{right} -> {' '.join(outputs)}")
        join = re.findall(r"\w", right).index(flat[m.join]) if len(m.parts) > 1 else 0
    paths = tuple(mine)
    b = Map(paths, m.theirs, tuple(bs), join=join, halves=m.halves)
    return Lines(a, b, dataclasses.replace(b, axes=tuple(vectors)), mine, rope)


def to_peft(lines: Lines, ours: Mapping[str, Factors | None], name: str) -> Factors:
    """The published adapter that computes what ours together do.

    Weights that are stored as one tensor have an A each here: there they are one above the other, and B is
    block-diagonal. Raises SettingsError where DoRA is over some of them only.
    """
    found = {path: factors for path, factors in ours.items() if factors is not None}
    first = next(iter(found.values()))
    dora = [factors is not None and factors.magnitude is not None for factors in ours.values()]
    if any(dora) and not all(dora):
        raise SettingsError(f"{name} holds {', '.join(ours)}, and only some of them have a DoRA adapter; merge first")
    shared = len(found) > 1 and all(np.array_equal(first.a, factors.a) for factors in found.values())
    ranks = {path: factors.a.shape[1] for path, factors in found.items()}
    rank = first.a.shape[1] if shared else sum(ranks.values())
    rows, bs, start = [], {}, 0
    for path, form in lines.forms.items():
        whole = np.zeros((rank, form.outputs), np.float32)
        if (factors := found.get(path)) is not None:
            whole[start : start + ranks[path]] = factors.b * (factors.scale / first.scale)
            wide = factors.a.reshape(*form.sizes("i"), ranks[path])
            rows.append(to_theirs(lines.a[path], {path: wide}, lines.rope))
            start += 0 if shared else ranks[path]
        bs[path] = whole.reshape(rank, *form.sizes("o"))
    magnitude = None
    if all(dora):
        wide = {path: factors.magnitude.reshape(lines.forms[path].sizes("o")) for path, factors in found.items()}
        magnitude = to_theirs(lines.magnitude, wide, lines.rope)
    a = rows[0] if shared else np.concatenate(rows)
    return Factors(a, to_theirs(lines.b, bs, lines.rope), magnitude, first.scale)


def from_peft(lines: Lines, theirs: Factors) -> dict[str, Factors]:
    """Our adapters that compute what a published one does; weights that are stored as one tensor each get its A."""
    rank, out = theirs.a.shape[0], {}
    bs = to_ours(lines.b, theirs.b, {p: (rank, *form.sizes("o")) for p, form in lines.forms.items()}, lines.rope)
    vectors = dict.fromkeys(lines.forms)
    if theirs.magnitude is not None:
        shapes = {p: form.sizes("o") for p, form in lines.forms.items()}
        vectors = to_ours(lines.magnitude, theirs.magnitude, shapes, lines.rope)
    for path, form in lines.forms.items():
        a = to_ours(lines.a[path], theirs.a, {path: (*form.sizes("i"), rank)}, lines.rope)[path]
        magnitude = None if vectors[path] is None else vectors[path].reshape(form.outputs)
        parts = a.reshape(form.inputs, rank), bs[path].reshape(rank, form.outputs)
        out[path] = Factors(*parts, magnitude, theirs.scale)
    return out
