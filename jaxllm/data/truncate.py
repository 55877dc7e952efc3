"""What happens to a document that is longer than the row it has to stand in."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxllm.data.store import TokenStore
from jaxllm.errors import DataError

Truncate = Literal["right", "left", "drop", "error"]
DONE = {"right": "cut at the end", "left": "cut at the start", "drop": "left out"}


@dataclass(frozen=True)
class Kept:
    """What is left of the documents of a store in rows of some length."""

    documents: np.ndarray
    """numbers of those that are left"""
    first: np.ndarray
    """first pair, of each document"""
    counts: np.ndarray
    """pairs kept, of each document"""
    targets: int
    """tokens that an epoch learns"""
    over: int
    """documents longer than a row"""
    lost: int
    """tokens that no row holds"""
    silent: int
    """conversations that are left out, since all that is learnt was cut off"""


def keep(store: TokenStore, length: int, truncate: Truncate) -> Kept:
    """Cuts what is longer than `length` pairs. Raises DataError with `truncate="error"`, and where nothing is left."""
    pairs, targets = store.lengths - 1, np.array(store.targets)
    over = np.flatnonzero(pairs > length)
    if over.size and truncate == "error":
        raise DataError(_too_long(store, length, over))
    counts = np.minimum(pairs, length)
    first = pairs - counts if truncate == "left" else np.zeros_like(pairs)
    targets[over] = counts[over]
    for i in over if store.chat else ():
        targets[i] = np.count_nonzero(store.learnt(i, first[i] + 1, first[i] + counts[i] + 1))
    left = np.ones(store.documents, bool)
    left[over] = truncate != "drop"
    silent = left & (targets == 0) & store.chat
    left &= ~silent
    if not left.any():
        raise DataError(f"source {store.name}: rows of {length} hold none of its conversations; raise train.seq_len")
    lost = int(pairs.sum() - counts[left].sum())
    return Kept(np.flatnonzero(left), first, counts, int(targets[left].sum()), len(over), lost, int(silent.sum()))


def news(store: TokenStore, length: int, truncate: Truncate, kept: Kept) -> str:
    """One line on what is lost, empty where nothing is."""
    if not kept.over:
        return ""
    kind = "conversations" if store.chat else "documents"
    line = (
        f"{kept.over:,} of {store.documents:,} {kind} are longer than {length} and are {DONE[truncate]}; "
        f"{kept.lost:,} tokens unused, {int(store.targets.sum()) - kept.targets:,} of them to learn"
    )
    verb = "has nothing to learn left and is" if kept.silent == 1 else "have nothing to learn left and are"
    return line + (f"; {kept.silent:,} {verb} left out" if kept.silent else "")


def _too_long(store: TokenStore, length: int, over: np.ndarray) -> str:
    longest = int(store.lengths.max()) - 1
    return (
        f"source {store.name}: {len(over):,} of {store.documents:,} documents are longer than a row of {length} "
        f"(document {over[0]} first; the longest has {longest + 1:,} tokens); set train.seq_len={longest}, or "
        "data.truncate to right, left or drop"
    )
