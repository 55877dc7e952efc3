"""Batches of this process's rows, made ahead of time by grain."""

import sys
from typing import Protocol

import grain
import numpy as np

from jaxllm.data.batch import TokenBatch
from jaxllm.data.pack import Row, padding_row
from jaxllm.errors import SettingsError


class Stream(Protocol):
    """Endless rows by number: `Rows` or `Mixture`."""

    length: int

    def row(self, r: int) -> Row: ...


class Loader:
    """An iterator over `TokenBatch`es of shape (batch // processes, T).

    Global batch b holds the rows `start + b*batch` up to `start + (b+1)*batch`, and process p of P its p-th share of
    them: the global stream is the same for every P. `position` is the first row that no batch given out so far
    holds; a new Loader with `start=position` goes on there, whatever was made ahead.
    """

    def __init__(
        self,
        stream: Stream,
        batch: int,
        *,
        start: int = 0,
        stop: int | None = None,
        process: int = 0,
        processes: int = 1,
        prefetch: int = 2,
    ):
        """`batch`: rows of the global batch. `stop`: rows from here on are padding, and the last batch is the one
        that holds row `stop - 1` (one pass over `Rows`: `stop=rows.per_epoch`). `prefetch`: batches made ahead.
        Raises SettingsError for a batch that the processes cannot share evenly.
        """
        if batch < 1 or batch % processes:
            fits = sorted({max(1, batch // processes) * processes, (batch // processes + 1) * processes})
            raise SettingsError(f"a batch of {batch} rows does not divide among {processes} processes; try {fits}")
        self.position, self._batch = start, batch
        source = _Batches(stream, batch // processes, batch, start + process * (batch // processes), start, stop)
        options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
        self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> TokenBatch:
        batch = next(self._batches)
        self.position += self._batch
        return batch

    def close(self) -> None:
        """Stops making batches ahead."""
        self._batches.close()


class _Batches:
    """What grain reads: batch number b of this process."""

    def __init__(self, stream: Stream, rows: int, step: int, first: int, start: int, stop: int | None):
        self._stream, self._rows, self._step, self._first, self._stop = stream, rows, step, first, stop
        self._len = sys.maxsize if stop is None else max(0, -(-(stop - start) // step))

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, b: int) -> TokenBatch:
        first = self._first + int(b) * self._step
        rows = [self._row(r) for r in range(first, first + self._rows)]
        columns = zip(*rows, strict=True)
        return TokenBatch(*(None if column[-1] is None else np.stack(column) for column in columns))

    def _row(self, r: int) -> Row:
        if self._stop is not None and r >= self._stop:
            reference = self._stream.row(self._stop - 1).reference is not None
            return padding_row(self._stream.length, reference=reference)
        return self._stream.row(r)
