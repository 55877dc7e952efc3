"""Rows of tokens as a pure function of store, length, seed and row number: packed, or one document a row."""

import threading
from typing import NamedTuple

import numpy as np

from jaxllm.data.layout import Line, Order, Piece, Whole
from jaxllm.data.shards import digest
from jaxllm.data.store import TokenStore
from jaxllm.data.truncate import Truncate, keep, news
from jaxllm.errors import DataError, SettingsError


class Row(NamedTuple):
    """One row; all arrays have the shape (T,). Padding has mask 0, segment 0, position 0 and the padding id 0."""

    tokens: np.ndarray
    """int32, what the model reads"""
    targets: np.ndarray
    """int32, the next token of the same document"""
    mask: np.ndarray
    """float32, 1 where there is a target to learn: in conversations, a token of the assistant's"""
    positions: np.ndarray
    """int32, from 0 at the start of each segment"""
    segments: np.ndarray
    """int32, from 1: equal numbers may attend to each other; of a pair the rejected conversation has the next number"""
    reference: np.ndarray | None = None
    """float32, the log-probability of each target under a frozen model, where `Rows.reference` has them"""


class Rows:
    """The endless rows of one store: `row(r)` belongs to the epoch `r // per_epoch`.

    A document of m tokens gives m-1 pairs of input and target. Packed, the pairs of all documents in the epoch's
    order are one line, cut into rows of T: every token but a document's first is predicted exactly once an epoch.
    The rows are shuffled as well, so that the pieces of a long document do not meet in one batch. Not packed, a
    row is one document. Conversations are packed too, but each stays whole, since an answer without its question is
    no example. What is longer than a row and has to be whole goes by `truncate`; `news` says how much that loses.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        *,
        seed: int = 0,
        pack: bool = True,
        shuffle: bool = True,
        truncate: Truncate = "right",
    ):
        """`length`: T, pairs in a row. Raises SettingsError for a length below 1, DataError where there are no rows."""
        if length < 1:
            raise SettingsError(f"sequence length {length}: must be at least 1")
        if not store.documents:
            raise DataError(f"source {store.name}: no documents")
        self.store, self.length, self.seed, self.pack, self.shuffle = store, length, seed, pack, shuffle
        if store.pairs and truncate != "error":
            truncate = "drop"  # a pair of which a part is missing says nothing
        self.pairs, self.truncate = store.lengths - 1, truncate
        self.offsets = np.cumsum(store.lengths) - store.lengths
        self.reference: np.ndarray | None = None
        """float32: what `Row.reference` holds, for each token of the store"""
        self.kept = keep(store, length, truncate) if store.chat or not pack else None
        self.layout = self._layout()
        self.per_epoch = self.layout.per_epoch
        self._orders: dict[int, Order] = {}
        self._lock = threading.Lock()

    def _layout(self) -> Line | Whole:
        if self.kept is None:
            return Line(self.pairs, self.length)
        parts = self.kept.documents, self.kept.first, self.kept.counts
        return Whole(*parts, self.length, pack=self.pack, shuffle=self.shuffle)

    @property
    def fingerprint(self) -> str:
        """Hash of all that a row depends on."""
        return digest([self.store.fingerprint, self.length, self.seed, self.pack, self.shuffle, self.truncate])

    @property
    def cut(self) -> tuple[int, int]:
        """`(documents, tokens)` that an epoch leaves out because a row is too short; packed text loses none."""
        return (0, 0) if self.kept is None else (self.kept.over, self.kept.lost)

    @property
    def news(self) -> str:
        """One line on what an epoch leaves out, empty where it is nothing."""
        return "" if self.kept is None else news(self.store, self.length, self.truncate, self.kept)

    @property
    def targets(self) -> int:
        """Tokens that an epoch predicts."""
        return int(self.pairs.sum()) if self.kept is None else self.kept.targets

    @property
    def padding(self) -> float:
        """Share of an epoch's positions that hold no token."""
        held = int(self.pairs.sum()) - self.cut[1]
        return 1 - held / (self.per_epoch * self.length)

    def go_on(self, other: "Rows", r: int) -> int:
        """The row to go on with where row r of `other`, the same text in rows of another length perhaps, would be next.

        Packed rows of another length are cut elsewhere, so that what is left of an epoch has no rows of its own: they
        go on with the next epoch.
        """
        if self.length == other.length or (not self.pack and self.per_epoch == other.per_epoch):
            return r
        return -(-r // other.per_epoch) * self.per_epoch

    def row(self, r: int) -> Row:
        """Row r of the stream; costs two binary searches at most, except for the first row of an epoch."""
        return self._fill(self.pieces(r))

    def pieces(self, r: int) -> list[Piece]:
        """`(document, first pair, pairs)` of what row r of the stream holds."""
        epoch, k = divmod(r, self.per_epoch)
        return self.layout.pieces(self._order(epoch), k)

    def _order(self, epoch: int) -> Order:
        """The order of an epoch, kept for two of them: prefetching reads ahead into the next one."""
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = self.layout.order(self.seed, epoch, self.shuffle)
            return self._orders[epoch]

    def _fill(self, pieces: list[Piece]) -> Row:
        ints = np.zeros((4, self.length), np.int32)
        mask = np.zeros(self.length, np.float32)
        tokens, targets, positions, segments = ints
        reference = None if self.reference is None else np.zeros(self.length, np.float32)
        at = segment = 0
        for document, first, count in pieces:
            ids = self.store.doc(document, first, first + count + 1)
            here, segment = slice(at, at + count), segment + 1
            tokens[here], targets[here] = ids[:-1], ids[1:]
            positions[here], segments[here] = np.arange(count), segment
            mask[here] = self.store.learnt(document, first + 1, first + count + 1)
            if reference is not None:
                reference[here] = self.reference[self.offsets[document] + first + 1 :][:count]
            if self.store.pairs:
                second, stop, segment = at + self.store.rejected(document), at + count, segment + 1
                positions[second:stop], segments[second:stop] = np.arange(stop - second), segment
                mask[second - 1] = 0  # from the last token of one to the first of the other
            at += count
        return Row(tokens, targets, mask, positions, segments, reference)

    def places(self, r: int) -> np.ndarray:
        """For each position of row r of the first epoch the number of its target in `reference`, -1 for none."""
        found, at = np.full(self.length, -1, np.int64), 0
        for document, first, count in self.layout.pieces(self._order(0), r):
            found[at : at + count] = self.offsets[document] + first + 1 + np.arange(count)
            at += count
        return found


def padding_row(length: int, *, reference: bool = False) -> Row:
    """A row without targets, which fills up the last batch of an evaluation."""
    zeros, floats = np.zeros(length, np.int32), np.zeros(length, np.float32)
    return Row(zeros, zeros, floats, zeros, zeros, floats if reference else None)
