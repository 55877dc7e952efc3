"""From sources to token stores: in parallel, resumable, and again only for what changed.

Threads are enough: SentencePiece encodes without Python's lock (two threads are 1.9 times as fast as one).
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.config import to_dict
from jaxllm.data.config import DataConfig
from jaxllm.data.encode import Encoder, texts
from jaxllm.data.entries import Entry, entries_of, stat
from jaxllm.data.readers import require, splittable, told
from jaxllm.data.shards import ShardWriter, digest, has_shard
from jaxllm.data.sources import Source, kind, matched, patterns
from jaxllm.data.store import VERSION, TokenStore, heldout_limit, read_meta, write_meta
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, ResourceError

#: Called with a source's name, its bytes done and its bytes in all.
Progress = Callable[[str, int, int], None]
#: A shard holds about this much text, and at least a 64th of its source up to the larger size.
SMALL, LARGE = 1 << 20, 1 << 26


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, progress: Progress | None = None, say: Callable[[str], None] = print
) -> dict[str, TokenStore]:
    """`{source name: its token store}` for the sources and eval_sources of `config`.

    With `heldout`, each source also gives `<name>-heldout`. `say` gets a line for each source that is tokenised.
    Finished shards are kept when the work is cut off, and a changed file is noticed by its content.
    Raises DataError for what is wrong with a file, ResourceError for a full disk, MissingExtra.
    """
    stores = {}
    for source in config.sources + config.eval_sources:
        store = prepare_source(source, tokenizer, Path(config.cache), config.threads, progress=progress, say=say)
        stores[source.name] = store
        if config.heldout:
            stores[source.name], stores[f"{source.name}-heldout"] = store.split(config.heldout)
    return stores


def prepare_source(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    threads: int = 2,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> TokenStore:
    """One source's token store under `cache`, tokenised as far as it is not there yet."""
    encoder = Encoder(source, tokenizer)
    paths, empty = matched(source)
    for path in paths:
        require(source, path)
    settings = {k: v for k, v in to_dict(source).items() if k != "weight"} | {"path": patterns(source)}
    folder = cache.expanduser() / f"{source.name}-{digest([VERSION, settings, tokenizer.hash, *encoder.template])[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    old = read_meta(folder)
    entries = entries_of(paths, old, folder)
    units = units_of(source, entries, encoder.template)
    wanted = {unit.key: unit for unit in units}
    todo = [unit for key, unit in wanted.items() if not has_shard(folder, key)]
    if todo:
        say(_news(source, entries, old, len(todo), len(wanted)))
        _tokenise(encoder, todo, folder, threads, progress or (lambda *_: None))
    meta = {
        "name": source.name,
        "source": settings,
        "tokenizer": tokenizer.hash,
        "vocab": tokenizer.vocab,
        "dtype": encoder.dtype.str,
        "chat": encoder.chat,
        "files": [entry.row for entry in entries],
        "shards": [unit.key for unit in units],
    }
    if old is None or {**meta, "version": old["version"]} != old:
        write_meta(folder, meta)
    store = TokenStore.open(folder, tokenizer)
    if not store.documents:
        what = "conversations" if encoder.chat else "text"
        raise DataError(f"source {source.name}: no {what} in its {len(paths)} files, such as {paths[0]}")
    line = told(store.notes)
    counted = [f"empty files, left out: {empty:,}"] * bool(empty) + [line] * bool(line)
    if counted:
        say(f"source {source.name}: {'; '.join(counted)}")
    if store.untrained:
        say(f"source {source.name}: {rewritten(store)}")
    return store


def rewritten(store: TokenStore) -> str:
    """What to say of turns that are not learnt."""
    return f"{store.untrained:,} earlier turns of the assistant are not learnt: the chat template rewrites them"


@dataclass(frozen=True)
class Unit:
    """The work of one shard: some files, or a range of bytes of one."""

    key: str
    spans: tuple[tuple[Entry, int, int | None], ...]
    bytes: int


def units_of(source: Source, entries: list[Entry], template: list[str]) -> list[Unit]:
    """Groups small files and cuts big ones, in the order of the files; does not depend on the number of threads."""
    total = sum(entry.size for entry in entries)
    target = min(LARGE, max(SMALL, 1 << (total // 64).bit_length()))
    units, group, held = [], [], 0

    def close():
        nonlocal group, held
        if group:
            parts = [[e.hash, kind(source, e.path), os.path.splitext(e.path)[1], a, b] for e, a, b in group]
            key = digest([source.field, source.document, parts, *template])
            units.append(Unit(key, tuple(group), held))
        group, held = [], 0

    for entry in entries:
        if entry.size >= target:
            close()
        for start, stop, size in _ranges(source, entry, target):
            group.append((entry, start, stop))
            held += size
            if held >= target:
                close()
    close()
    return units


def _ranges(source: Source, entry: Entry, target: int) -> Iterator[tuple[int, int | None, int]]:
    if not splittable(source, entry.path) or entry.size < 2 * target:
        yield 0, None, entry.size
        return
    for start in range(0, entry.size, target):
        yield start, min(start + target, entry.size), min(target, entry.size - start)


def _news(source: Source, entries: list[Entry], old: dict | None, todo: int, shards: int) -> str:
    total = sum(entry.size for entry in entries) / 1e6
    line = f"source {source.name}: {total:,.1f} MB in {len(entries):,} files; tokenising {todo} of {shards} shards"
    if old is None:
        return line
    before = {path: hash for path, _, _, hash in old["files"]}
    changed = [entry.path for entry in entries if before.pop(entry.path, None) != entry.hash] + list(before)
    if not changed:
        return line + " (missing from the cache)"
    return line + f" again: {len(changed)} files changed since (such as {os.path.basename(changed[0])})"


def _tokenise(encoder: Encoder, units: list[Unit], folder: Path, threads: int, progress: Progress) -> None:
    stop, done, total = threading.Event(), 0, sum(unit.bytes for unit in units)
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenise") as pool:
        futures = {pool.submit(_shard, encoder, unit, folder, stop): unit for unit in units}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future].bytes
                progress(encoder.source.name, done, total)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _shard(encoder: Encoder, unit: Unit, folder: Path, stop: threading.Event) -> None:
    writer = ShardWriter(folder, unit.key, encoder.dtype, chat=encoder.chat)
    try:
        for entry, first, last in unit.spans:
            for document in encoder(entry.path, first, last, writer.notes):
                if stop.is_set():
                    return
                writer.add(document)
            if stat(entry.path) != (entry.size, entry.mtime):
                raise DataError(f"{entry.path}: changed while it was tokenised; run again when it is at rest")
        writer.commit()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(f"{folder}: the disk is full; free some space, or set data.cache to another disk") from None
    finally:
        writer.abort()


def train_tokenizer(
    sources: tuple[Source, ...],
    vocab: int = 4096,
    out: str | Path | None = None,
    *,
    heldout: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """A tokenizer trained on the text of the sources, saved into the folder `out` where given.

    The documents that `heldout` keeps from the training of a model are left out. Raises DataError, SettingsError.
    """
    limits = [_limit(source, heldout) for source in sources]
    say(f"training a tokenizer of {vocab} pieces")
    pairs = zip(sources, limits, strict=True)
    kept = (text for source, limit in pairs for text, hash in texts(source) if hash >= limit)
    return Tokenizer.train(kept, vocab, out)


def _limit(source: Source, heldout: float) -> int:
    """What `TokenStore.split` will hold out; 0 for nothing. Reads all of the text."""
    if not heldout:
        return 0
    return heldout_limit(source.name, np.array([hash for _, hash in texts(source)], np.int64), heldout)
