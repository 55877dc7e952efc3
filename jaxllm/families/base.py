"""What a model family is: how its config.json reads as our settings, and which of its tensors is which of our weights.

Families are data. `Map` says where a weight is stored and in which order of axes; nothing else converts weights, and
the same line serves reading and writing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.families.keys import Keys
from jaxllm.model.spec import ModelConfig


@dataclasses.dataclass(frozen=True)
class Map:
    """One stored tensor and the weight (or the weights, joined) of ours that it holds.

    `axes` reads "stored -> ours", a letter for each axis, with axes that are stored as one in brackets:
    "(N H) D -> D N H" is a matrix of heads * head dim by embed there, and three axes here. Where `ours` names several
    weights, each has its own `axes`, and they are joined along axis `join` before brackets are closed:
    "(N H) D" and "(K H) D" joined along axis 0 are [(N + K) * H, D]. A literal 1 is an axis of that size.

    `{e}` in `theirs` counts experts, our weight's first axis E, one stored tensor each.
    `halves` names an axis whose last `rope_head` entries are stored in pairs (x0 y0 x1 y1 ...), where ours come in
    halves (x0 x1 ... y0 y1 ...): the two ways to write rotary positions.
    """

    ours: str | tuple[str, ...]
    theirs: str
    axes: str | tuple[str, ...] = ""
    join: int = 0
    halves: str = ""
    plus: float = 0.0
    """What is stored is our weight plus this (GGUF stores 1 + w for some norms)."""

    @property
    def parts(self) -> tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...]:
        """`(our path, stored axes, how they are bracketed, our axes)` of each weight."""
        paths = (self.ours,) if isinstance(self.ours, str) else self.ours
        given = (self.axes,) if isinstance(self.axes, str) else self.axes
        out = []
        for path, text in zip(paths, given, strict=True):
            stored, _, here = text.partition("->")
            flat = tuple(stored.replace("(", " ").replace(")", " ").split())
            out.append((path, flat, stored.strip(), tuple(here.split()) or flat))
        return tuple(out)


@dataclasses.dataclass(frozen=True)
class Family:
    """A published model family; see `docs/extending.md` for one made step by step."""

    name: str
    architectures: tuple[str, ...]
    """Names in config.json's `architectures`."""
    model_types: tuple[str, ...]
    """Names in config.json's `model_type`."""
    read: Callable[[Keys], ModelConfig]
    """config.json to settings; every key is used, ignored with a reason, or refused."""
    write: Callable[[ModelConfig], dict]
    """Settings to config.json; what reads back as other settings cannot be written (checked by whoever calls)."""
    layer: tuple[Map, ...]
    """The weights of one layer; names without the prefix."""
    top: tuple[Map, ...]
    """Embedding, last norm, head."""
    base: str = "model."
    """What all names but those written with a leading slash begin with; folders of the bare decoder leave it out."""
    prefix: str = "layers.{i}."
    """What names of a layer's tensors begin with, after `base`."""
    unused: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns (of fnmatch) of stored tensors that hold nothing we need."""
    beyond: bool = False
    """Whether a folder may hold layers after the last one of the decoder (multi-token prediction)."""


def bind(part, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each letter, from our weight's shape."""
    path, _, _, here = part
    assert len(here) == len(shape), f"{path}: axes {here} for shape {shape}"
    return {"1": 1} | dict(zip(here, shape, strict=True))


def stored_shape(m: Map, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the stored tensor for our weights' shapes (of one layer and one expert)."""
    total: list[int] = []
    for i, part in enumerate(m.parts):
        sizes = bind(part, shapes[part[0]])
        lengths = [sizes[letter] for letter in part[1]]
        total = lengths if i == 0 else total
        if i:
            assert all(a == b for j, (a, b) in enumerate(zip(total, lengths, strict=True)) if j != m.join), m
            total[m.join] += lengths[m.join]
    return _close(m.parts[0][2], total)


def _close(stored: str, lengths: list[int]) -> tuple[int, ...]:
    """Sizes with bracketed axes multiplied: "(N H) D" of 4, 8, 32 is (32, 32)."""
    out, left, inside = [], list(lengths), None
    for token in stored.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            out, inside = [*out, math.prod(inside)], None
        elif inside is None:
            out.append(left.pop(0))
        else:
            inside.append(left.pop(0))
    return tuple(out)


def to_ours(m: Map, stored: np.ndarray, shapes: Mapping[str, tuple[int, ...]], rope: int = 0) -> dict[str, np.ndarray]:
    """`{our path: array}` of one stored tensor; views of it wherever that is possible, so that only what is used is
    read from disk. `shapes`: of our weights; `rope`: how many entries of the axis `halves` rotate (0: all).
    """
    out, start = {}, 0
    views = [[bind(p, shapes[p[0]])[letter] for letter in p[1]] for p in m.parts]
    whole = list(views[0])
    whole[m.join] = sum(view[m.join] for view in views)
    opened = stored.reshape(whole)
    for (path, letters, _, here), view in zip(m.parts, views, strict=True):
        piece = opened[(slice(None),) * m.join + (slice(start, start + view[m.join]),)]
        start += view[m.join]
        if m.halves in letters:
            piece = np.take(piece, _to_halves(piece.shape[letters.index(m.halves)], rope), letters.index(m.halves))
        if m.plus:
            piece = piece.astype(np.float32) - np.float32(m.plus)
        piece = piece.reshape([n for n, letter in zip(view, letters, strict=True) if letter != "1"])
        letters = [letter for letter in letters if letter != "1"]
        out[path] = piece.transpose([letters.index(letter) for letter in here])
    return out


def to_theirs(m: Map, ours: Mapping[str, np.ndarray], rope: int = 0) -> np.ndarray:
    """The stored tensor of our weights: the inverse of `to_ours`."""
    pieces = []
    for path, letters, _, here in m.parts:
        kept = [letter for letter in letters if letter != "1"]
        piece = ours[path].transpose([here.index(letter) for letter in kept])
        sizes = bind((path, letters, "", here), ours[path].shape)
        piece = piece.reshape([sizes[letter] for letter in letters])
        if m.plus:
            piece = piece.astype(np.float32) + np.float32(m.plus)
        if m.halves in letters:
            axis = letters.index(m.halves)
            piece = np.take(piece, np.argsort(_to_halves(piece.shape[axis], rope)), axis)
        pieces.append(piece)
    joined = np.concatenate(pieces, axis=m.join)
    return joined.reshape(_close(m.parts[0][2], list(joined.shape)))


def _to_halves(size: int, rope: int) -> np.ndarray:
    """Where each entry in halves order stands in pairs order; the entries before the last `rope` stay."""
    rope = rope or size
    pairs = np.arange(size - rope, size)
    return np.concatenate([np.arange(size - rope), pairs[0::2], pairs[1::2]])
