"""Which pieces of which documents make up a row: text as one long line, conversations whole.

A piece is `(document, first pair, pairs)`; a document of m tokens has m-1 pairs of input and target.
"""

from typing import NamedTuple

import numpy as np

Piece = tuple[int, int, int]


class Order(NamedTuple):
    """One epoch."""

    documents: np.ndarray
    rows: np.ndarray
    ends: np.ndarray
    """what lies before the end of each document: pairs, of a line; of whole documents, documents by row"""


class Line:
    """The pairs of all documents in the epoch's order are one line, cut into rows of `length`."""

    def __init__(self, pairs: np.ndarray, length: int):
        self.pairs, self.length = pairs, length
        self.per_epoch = -(-int(pairs.sum()) // length)

    def order(self, seed: int, epoch: int, shuffle: bool) -> Order:
        documents, rows = np.arange(len(self.pairs)), np.arange(self.per_epoch)
        if shuffle:
            documents = np.random.default_rng([seed, epoch, 0]).permutation(documents)
            rows = np.random.default_rng([seed, epoch, 1]).permutation(rows)
        return Order(documents, rows, np.cumsum(self.pairs[documents]))

    def pieces(self, order: Order, k: int) -> list[Piece]:
        start, stop = order.rows[k] * self.length, (order.rows[k] + 1) * self.length
        pieces = []
        n = int(np.searchsorted(order.ends, start, side="right"))
        while start < stop and n < len(order.documents):
            document, end = int(order.documents[n]), int(order.ends[n])
            count = int(min(end, stop) - start)
            pieces.append((document, int(start - (end - self.pairs[document])), count))
            start, n = start + count, n + 1
        return pieces


class Whole:
    """Documents that stay whole: one a row, or packed with others.

    Shuffled, they are packed once by best-fit decreasing (Johnson, 1974), which goes by their lengths alone, and each
    epoch deals documents of the same length anew to the places of that length; so all epochs have as many rows. Not
    shuffled, a row takes documents as they come until the next does not fit.
    """

    def __init__(self, documents: np.ndarray, first: np.ndarray, counts: np.ndarray, length: int, *, pack, shuffle):
        """`documents`: those there are; `first`, `counts`: of any document, its first pair and its pairs."""
        self.documents, self.first, self.counts = documents, first, counts
        lengths = counts[documents]
        if not pack:
            row_of = np.arange(len(documents))
        else:
            row_of = best_fit(-np.sort(-lengths), length) if shuffle else next_fit(lengths, length)
        self.packed, self.places = pack, np.argsort(row_of, kind="stable")
        self.bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.per_epoch = len(self.bounds) - 1

    def order(self, seed: int, epoch: int, shuffle: bool) -> Order:
        documents, rows = self.documents, np.arange(self.per_epoch)
        if shuffle:
            documents = np.random.default_rng([seed, epoch, 0]).permutation(documents)
        if shuffle and self.packed:
            documents = documents[np.argsort(-self.counts[documents], kind="stable")]
            rows = np.random.default_rng([seed, epoch, 1]).permutation(rows)
        return Order(documents[self.places], rows, self.bounds)

    def pieces(self, order: Order, k: int) -> list[Piece]:
        row = order.rows[k]
        found = order.documents[order.ends[row] : order.ends[row + 1]]
        return [(int(d), int(self.first[d]), int(self.counts[d])) for d in found]


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each length: the fullest of those opened so far that it fits into, or a new one."""
    opened: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room that is left in them
    rooms, rows, row_of = 0, 0, []  # bit n of `rooms`: there is a row with room for n
    for length in lengths.tolist():
        if fits := rooms >> length:
            left = (fits & -fits).bit_length() - 1
            row = opened[length + left].pop()
            if not opened[length + left]:
                rooms ^= 1 << (length + left)
        else:
            left, row, rows = room - length, rows, rows + 1
        opened[left].append(row)
        rooms |= 1 << left
        row_of.append(row)
    return np.array(row_of, np.int64)


def next_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each length: the last one, or a new one where it does not fit."""
    row, left, row_of = 0, room, []
    for length in lengths.tolist():
        if length > left:
            row, left = row + 1, room
        left -= length
        row_of.append(row)
    return np.array(row_of, np.int64)
