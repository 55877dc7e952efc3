"""Rows of tokens as a pure function of store, length, seed and row number: packed, or one document a row."""

import threading
from typing import NamedTuple

import numpy as np

from jaxllm.data.store import TokenStore, digest
from jaxllm.errors import DataError, SettingsError


class Row(NamedTuple):
    """One row; all arrays have the shape (T,). Padding has mask 0, segment 0, position 0 and the padding id 0."""

    tokens: np.ndarray
    """int32, what the model reads"""
    targets: np.ndarray
    """int32, the next token of the same document"""
    mask: np.ndarray
    """float32, 1 where there is a target"""
    positions: np.ndarray
    """int32, from 0 at the start of each segment"""
    segments: np.ndarray
    """int32, from 1: equal numbers may attend to each other"""


class Rows:
    """The endless rows of one store: `row(r)` belongs to the epoch `r // per_epoch`.

    A document of m tokens gives m-1 pairs of input and target. Packed, the pairs of all documents in the epoch's
    order are one line, cut into rows of T: every token but a document's first is predicted exactly once an epoch.
    The rows are shuffled as well, so that the pieces of a long document do not meet in one batch. Not packed, a
    row is one document, cut at T pairs (`cut` says how much that loses).
    """

    def __init__(self, store: TokenStore, length: int, *, seed: int = 0, pack: bool = True, shuffle: bool = True):
        """`length`: T, pairs in a row. Raises SettingsError for a length below 1, DataError for an empty store."""
        if length < 1:
            raise SettingsError(f"sequence length {length}: must be at least 1")
        if not store.documents:
            raise DataError(f"source {store.name}: no documents")
        self.store, self.length, self.seed, self.pack, self.shuffle = store, length, seed, pack, shuffle
        self.pairs = store.lengths - 1
        self.per_epoch = -(-int(self.pairs.sum()) // length) if pack else store.documents
        self._orders: dict[int, _Order] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Hash of all that a row depends on."""
        return digest([self.store.fingerprint, self.length, self.seed, self.pack, self.shuffle])

    @property
    def cut(self) -> tuple[int, int]:
        """`(documents, tokens)` that an epoch leaves out because a row is too short for them; packed rows lose none."""
        if self.pack:
            return 0, 0
        over = np.maximum(self.pairs - self.length, 0)
        return int(np.count_nonzero(over)), int(over.sum())

    @property
    def padding(self) -> float:
        """Share of an epoch's positions that hold no target."""
        kept = int(self.pairs.sum()) - self.cut[1]
        return 1 - kept / (self.per_epoch * self.length)

    def go_on(self, other: "Rows", r: int) -> int:
        """The row to go on with where row r of `other`, the same text in rows of another length perhaps, would be next.

        Packed rows of another length are cut elsewhere, so that what is left of an epoch has no rows of its own: they
        go on with the next epoch.
        """
        if not self.pack or self.length == other.length:
            return r
        return -(-r // other.per_epoch) * self.per_epoch

    def row(self, r: int) -> Row:
        """Row r of the stream; costs two binary searches, except for the first row of an epoch."""
        epoch, k = divmod(r, self.per_epoch)
        order = self._order(epoch)
        k = int(order.rows[k])
        if not self.pack:
            return self._fill([(int(order.documents[k]), 0, min(int(self.pairs[order.documents[k]]), self.length))])
        return self._fill(self._pieces(order, k * self.length, (k + 1) * self.length))

    def _order(self, epoch: int) -> "_Order":
        """The order of an epoch, kept for two of them: prefetching reads ahead into the next one."""
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = self._make_order(epoch)
            return self._orders[epoch]

    def _make_order(self, epoch: int) -> "_Order":
        documents, rows = np.arange(self.store.documents), np.arange(self.per_epoch)
        if self.shuffle:
            documents = np.random.default_rng([self.seed, epoch, 0]).permutation(documents)
            rows = np.random.default_rng([self.seed, epoch, 1]).permutation(rows) if self.pack else rows
        return _Order(documents, np.cumsum(self.pairs[documents]), rows)

    def _pieces(self, order: "_Order", start: int, stop: int) -> list[tuple[int, int, int]]:
        """`(document, first pair, pairs)` of the pairs [start, stop) of an epoch's line."""
        pieces = []
        n = int(np.searchsorted(order.ends, start, side="right"))
        while start < stop and n < len(order.documents):
            document, end = int(order.documents[n]), int(order.ends[n])
            count = min(end, stop) - start
            pieces.append((document, start - (end - int(self.pairs[document])), count))
            start, n = start + count, n + 1
        return pieces

    def _fill(self, pieces: list[tuple[int, int, int]]) -> Row:
        ints = np.zeros((4, self.length), np.int32)
        mask = np.zeros(self.length, np.float32)
        tokens, targets, positions, segments = ints
        at = 0
        for segment, (document, first, count) in enumerate(pieces, 1):
            ids = self.store.doc(document, first, first + count + 1)
            here = slice(at, at + count)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            positions[here], segments[here], mask[here] = np.arange(count), segment, 1
            at += count
        return Row(tokens, targets, mask, positions, segments)


class _Order(NamedTuple):
    documents: np.ndarray
    ends: np.ndarray
    """pairs up to the end of each document, in this order"""
    rows: np.ndarray


def padding_row(length: int) -> Row:
    """A row without targets, which fills up the last batch of an evaluation."""
    zeros = np.zeros(length, np.int32)
    return Row(zeros, zeros, np.zeros(length, np.float32), zeros, zeros)
