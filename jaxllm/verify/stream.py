"""Row 8: the stream of tokens goes on at the exact place, whatever the source and whoever reads it."""

import dataclasses
import gzip
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from jaxllm.verify.lab import Found, Lab

BATCH, LENGTH = 8, 32
#: What a stream is read with: batches made ahead, and processes that share each.
READERS = tuple(itertools.product((0, 2), (1, 2, 4)))


#: Batches that are read of each stream; and of the first of two stages.
STEPS, FIRST = 24, 9

#: Streams one after the other, each with the batches that are read of it: the stages of a run.
Stages = tuple[tuple[Any, int], ...]


def position(lab: Lab) -> Found:
    """Streams of every kind of source, cut anywhere and read on by other readers, are those of one whole reading."""
    streams, failures, cases, inside, ends = _streams(lab), [], 0, 0, 0
    for name, (stages, wanted) in streams.items():
        whole = [hashlib.sha256(row).hexdigest() for row in _read(wanted, 0, STEPS, 0, 1)]
        cuts = [lab.random.randrange(1, STEPS) * BATCH for _ in range(-(-lab.count(300, 3000) // len(streams)))]
        if len(stages) > 1:
            cuts.append(FIRST * BATCH)
        elif len(stages[0][0].names) == 1 and (epoch := stages[0][0].sources[0].per_epoch) < (STEPS - 1) * BATCH:
            cuts.append(epoch)  # with which no batch need end
            ends += 1
        for cut in cuts:
            (ahead, processes), (then, others) = lab.random.choice(READERS), lab.random.choice(READERS)
            first = _read(stages, 0, -(-cut // BATCH), ahead, processes)[:cut]
            rest = _read(stages, cut, min(STEPS - -(-cut // BATCH), 2), then, others)
            found = [hashlib.sha256(row).hexdigest() for row in (*first, *rest)]
            cases, inside = cases + 1, inside + _in_a_document(stages, cut)
            if found != whole[: len(found)]:
                failures.append(f"{name}: cut after {cut} rows ({processes} then {others} readers)")
    if not (inside and ends):
        failures.append(f"{inside} cuts fell inside a document, {ends} at the end of an epoch")
    figure = (
        f"{cases} cuts over {len(streams)} kinds of sources, {inside} inside a document and {ends} at the end of an "
        "epoch, with 0 and 2 batches ahead and 1, 2 and 4 processes"
    )
    return Found(cases, tuple(failures), figure)


def _read(stages: Stages, start: int, steps: int, ahead: int, processes: int) -> list[bytes]:
    """The bytes of the rows of so many global batches: tokens, targets, masks, positions and segments.

    From row `start` on, through one stage after the other, of all processes in order.
    """
    from jaxllm.data.loader import Loader

    out, begin = [], 0
    for stream, batches in stages:
        end = begin + batches * BATCH
        at, count = start + len(out), min(steps - len(out) // BATCH, -(-(end - start - len(out)) // BATCH))
        if begin <= at < end and count > 0:
            options = dict(start=at - begin, processes=processes, prefetch=ahead)
            loaders = [Loader(stream, BATCH, process=process, **options) for process in range(processes)]
            for _ in range(count):
                for share in [next(loader) for loader in loaders]:
                    out += [b"".join(x[row].tobytes() for x in _arrays(share)) for row in range(BATCH // processes)]
            for loader in loaders:
                loader.close()
        begin = end
    return out


def _in_a_document(stages: Stages, row: int) -> bool:
    """Whether a row goes on with a document that another row has begun."""
    for stream, batches in stages:
        if row < batches * BATCH:
            source, k = stream.locate(row)
            return stream.sources[source].pieces(k)[0][1] > 0
        row -= batches * BATCH
    return False


def _arrays(batch) -> list:
    return [batch.tokens_BT, batch.targets_BT, batch.mask_BT, batch.positions_BT, batch.segments_BT]


def _streams(lab: Lab) -> dict[str, tuple[Stages, Stages]]:
    """Of each kind the stages that are cut, and those whose rows they have to be.

    Short texts, so that epochs end and packs are cut within the batches read.
    """
    from jaxllm.data.config import DataConfig
    from jaxllm.data.prepare import prepare
    from jaxllm.data.sources import Source
    from jaxllm.data.tokenizer import Tokenizer
    from jaxllm.train.config import Stage
    from jaxllm.train.streams import make_streams

    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")
    sources = {kind: Source(name=kind, path=str(path)) for kind, path in _files(lab).items()}
    out, kinds = {}, {kind: [source] for kind, source in sources.items()}
    lengths = dict(one=FIRST, two=STEPS - FIRST)
    stages = [Stage(name=name, steps=steps, batch=BATCH, seq_len=LENGTH) for name, steps in lengths.items()]
    for kind, used in (kinds | {"mixture": list(sources.values())}).items():
        weighted = tuple(dataclasses.replace(one, weight=1 + number) for number, one in enumerate(used))
        data = DataConfig(sources=weighted, cache=str(lab.folder / "cache"))
        if kind == "mixture":
            stages[1] = dataclasses.replace(stages[1], weights={"text": 1.0, "jsonl": 2.0})
        first, second = make_streams(data, stages, prepare(data, tokenizer, say=lambda _: None))
        whole, both = ((first, STEPS),), ((first, FIRST), (second, STEPS - FIRST))
        out[kind] = whole, whole
        if kind == "text":  # a stage goes on where the one before it ended
            out["a stage boundary"] = both, whole
        if kind == "mixture":
            out["a mixture that changes with its stage"] = both, both
    return out | ({"your own run": _own(lab)} if lab.run_file is not None else {})


def _own(lab: Lab) -> tuple[Stages, Stages]:
    """The first stage of the user's own run."""
    from jaxllm.data.prepare import prepare
    from jaxllm.train.folder import RunFolder
    from jaxllm.train.load import load_run
    from jaxllm.train.streams import make_streams

    config, _ = load_run(lab.settings(lab.folder / "own"))
    stores = prepare(config.data, RunFolder(config).open_tokenizer(lab.say), say=lab.say)
    whole = ((make_streams(config.data, config.train.resolved_stages, stores)[0], STEPS),)
    return whole, whole


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
