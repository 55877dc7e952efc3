"""Row 8: the stream of tokens goes on at the exact place, whatever the source and whoever reads it."""

import dataclasses
import gzip
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from jaxllm.verify.lab import Found, Lab

BATCH, LENGTH = 8, 32
#: What a stream is read with: batches made ahead, and processes that share each.
READERS = tuple(itertools.product((0, 2), (1, 2, 4)))


def position(lab: Lab) -> Found:
    """Streams of every kind of source, cut anywhere and read on by other readers, are those of one whole reading."""
    streams, failures, cases = _streams(lab), [], 0
    for name, stream in streams.items():
        steps = 24
        whole = [hashlib.sha256(batch).hexdigest() for batch in _read(stream, 0, steps, 0, 1)]
        for _ in range(lab.count(300, 3000) // len(streams)):
            cut, (ahead, processes) = lab.random.randrange(1, steps), lab.random.choice(READERS)
            then, others = lab.random.choice(READERS)
            first = _read(stream, 0, cut, ahead, processes)
            rest = _read(stream, cut * BATCH, min(steps, cut + 2) - cut, then, others)
            found = [hashlib.sha256(batch).hexdigest() for batch in (*first, *rest)]
            cases += 1
            if found != whole[: len(found)]:
                failures.append(f"{name}: cut after {cut} batches ({processes} then {others} readers)")
    figure = f"{cases} cuts over {len(streams)} kinds of sources, with 0 and 2 batches ahead and 1, 2 and 4 processes"
    return Found(cases, tuple(failures), figure)


def _read(stream, start: int, steps: int, ahead: int, processes: int) -> list[bytes]:
    """The bytes of so many global batches: tokens, targets, masks, positions and segments of all processes in order."""
    from jaxllm.data.loader import Loader

    options = dict(start=start, processes=processes, prefetch=ahead)
    loaders = [Loader(stream, BATCH, process=process, **options) for process in range(processes)]
    out = []
    for _ in range(steps):
        shares = [next(loader) for loader in loaders]
        parts = zip(*((x for x in share if x is not None) for share in map(_arrays, shares)), strict=True)
        out.append(b"".join(np.concatenate(part).tobytes() for part in parts))
    for loader in loaders:
        loader.close()
    return out


def _arrays(batch) -> list:
    return [batch.tokens_BT, batch.targets_BT, batch.mask_BT, batch.positions_BT, batch.segments_BT]


def _streams(lab: Lab) -> dict:
    """A stream for each kind of source; short texts, so that epochs end and packs are cut within the batches read."""
    from jaxllm.data.config import DataConfig
    from jaxllm.data.prepare import prepare
    from jaxllm.data.sources import Source
    from jaxllm.data.tokenizer import Tokenizer
    from jaxllm.train.config import Stage
    from jaxllm.train.streams import make_streams

    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")
    sources = {kind: Source(name=kind, path=str(path)) for kind, path in _files(lab).items()}
    out, kinds = {}, {kind: [source] for kind, source in sources.items()}
    stages = [Stage(name=name, steps=9, batch=BATCH, seq_len=LENGTH) for name in ("one", "two")]
    for kind, used in (kinds | {"mixture": list(sources.values())}).items():
        weighted = tuple(dataclasses.replace(one, weight=1 + number) for number, one in enumerate(used))
        data = DataConfig(sources=weighted, cache=str(lab.folder / "cache"))
        first, second = make_streams(data, stages, prepare(data, tokenizer, say=lambda _: None))
        out |= {kind: first} | ({"the stage after": second} if kind == "mixture" else {})
    return out


def _files(lab: Lab) -> dict[str, Path]:
    """The same few documents in each format that can be written here."""
    texts = [f"def f{i}(self):\n    return {lab.random.randrange(10**9)} * {i}\n\n" * (1 + i % 4) for i in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    folder = lab.folder / "text"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)
    out = {"text": folder / "*.txt", "jsonl": lab.folder / "a.jsonl", "compressed": lab.folder / "b.jsonl.gz"}
    out["jsonl"].write_text(lines)
    out["compressed"].write_bytes(gzip.compress(lines.encode()))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # without the extra for tables
        return out
    table = pyarrow.table({"text": texts})
    out |= {"parquet": lab.folder / "c.parquet", "dataset": lab.folder / "dataset"}
    parquet.write_table(table, out["parquet"])
    out["dataset"].mkdir()
    with pyarrow.OSFile(str(out["dataset"] / "data-00000-of-00001.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (out["dataset"] / name).write_text("{}")
    return out
