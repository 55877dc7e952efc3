"""Which documents the rows of a stream hold, and where in the files they stand."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.config import parse
from jaxllm.data.entries import Entry, stat
from jaxllm.data.mixture import Mixture
from jaxllm.data.prepare import Unit, units_of
from jaxllm.data.readers import placed, records, where
from jaxllm.data.shards import open_shard
from jaxllm.data.sources import TURNS, Source
from jaxllm.data.store import TokenStore, read_meta
from jaxllm.errors import DataError, UserError


class Held(NamedTuple):
    """A document, or a part of one, in a row."""

    row: int
    """of the stream"""
    store: TokenStore
    document: int
    first: int
    """its first token there"""
    count: int
    """tokens to predict"""


def held(stream: Mixture, rows: Iterable[int]) -> list[Held]:
    """What these rows of a stream hold, in their order."""
    found = []
    for row in rows:
        source, k = stream.locate(row)
        of = stream.sources[source]
        found += [Held(row, of.store, *piece) for piece in of.pieces(k)]
    return found


def named(stream: Mixture, rows: Sequence[int], most: int = 4) -> str:
    """`23 documents: a.txt: line 3, byte 40; b.txt; ... and 21 more`: the first of each row before the rest."""
    every = list(dict.fromkeys((one.store.name, one.document) for one in held(stream, rows)))
    by_name = {of.store.name: of.store for of in stream.sources}
    ahead = {one.row: (one.store.name, one.document) for one in reversed(held(stream, rows))}
    chosen = list(dict.fromkeys([*(ahead[row] for row in sorted(ahead)), *every]))[:most]
    places = [places_of(by_name[name], [document])[0] for name, document in chosen]
    more = f"; and {len(every) - len(chosen):,} more" if len(every) > len(chosen) else ""
    return f"{len(every):,} {'document' if len(every) == 1 else 'documents'}: {'; '.join(places)}{more}"


def places_of(store: TokenStore, documents: Sequence[int]) -> list[str]:
    """File and line, byte or row of documents, found by reading their shards' files again.

    The number of a document stands for it where its file has changed or is gone.
    """
    starts = {}
    out = []
    for document in documents:
        shard = int(store.shard_of[document])
        try:
            if shard not in starts:
                starts[shard] = _starts(store, shard)
            out.append(_place(store, shard, int(np.searchsorted(starts[shard], store.start_of[document]))))
        except UserError:
            out.append(f"document {document} of {store.name}, whose file has changed since it was tokenised")
    return out


def _starts(store: TokenStore, shard: int) -> np.ndarray:
    """Where each document of a shard begins, those included that a store selected from it leaves out."""
    key = _meta(store)["shards"][shard]
    lengths = open_shard(store.folder, key, store.shards[shard].dtype)[1][:, 0]
    return np.cumsum(lengths) - lengths


def _place(store: TokenStore, shard: int, number: int) -> str:
    """Where document `number` of a shard stands. Raises DataError."""
    meta = _meta(store)
    source = parse(Source, meta["source"])
    unit = units_of(source, [Entry(*row) for row in meta["files"]], [])[shard]
    for k, (path, at) in enumerate(_read(source, unit)):
        if k == number:
            return where(source, path, at)
    raise DataError(f"{store.folder}: the files of shard {shard} hold fewer documents than it")


def _meta(store: TokenStore) -> dict:
    meta = read_meta(store.folder) if store.folder is not None else None
    if meta is None:
        raise DataError(f"token store {store.name}: its folder is gone")
    return meta


def _read(source: Source, unit: Unit) -> Iterator[tuple[str, int]]:
    for entry, first, last in unit.spans:
        if stat(entry.path) != (entry.size, entry.mtime):
            raise DataError(f"{entry.path}: changed since it was tokenised")
        read = records(entry.path, first, last) if source.format in TURNS else placed(source, entry.path, first, last)
        yield from ((entry.path, at) for at, _ in read)
