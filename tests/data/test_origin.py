"""Where the documents of a row stand in the files, for each format, and after documents were held out."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.mixture import mix
from jaxllm.data.origin import held, named, places_of
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import Source
from jaxllm.errors import DataError

TEXTS = [f"the {i} brown foxes jump\n" * (1 + i % 3) for i in range(40)]


def stores(tmp_path, tokenizer, source, **options):
    config = DataConfig(sources=(source,), cache=str(tmp_path / "cache"), **options)
    return prepare(config, tokenizer, say=lambda line: None)


def lines(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def chat(i: int) -> dict:
    return {"prompt": f"what is {i}?", "completion": f"{i} is {i}"}


def files(tmp_path) -> dict[str, dict]:
    """Settings of a source by the kind of its file."""
    paragraphs = "\n\n".join(text.strip() for text in TEXTS)
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "a.jsonl").write_text("\n" + lines(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS).encode()))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(40)))
    return {
        "a.txt": {"document": "blank_line"},
        "a.jsonl": {},
        "b.jsonl.gz": {},
        "c.jsonl": {"format": "chat"},
    }


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.jsonl.gz", "c.jsonl"])
def test_a_place_holds_the_document(tmp_path, tokenizer, name):
    source = Source(name="s", path=str(tmp_path / name), **files(tmp_path)[name])
    rest, out = stores(tmp_path, tokenizer, source, heldout=0.3).values()
    data = (tmp_path / name).read_bytes()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    for store in (rest, out):
        for i, place in enumerate(places_of(store, range(store.documents))):
            path, line, byte = place.removesuffix(" of the decompressed text").replace(", byte", ": byte").split(": ")
            at = int(byte.removeprefix("byte "))
            assert path == str(tmp_path / name) and data[:at].count(b"\n") + 1 == int(line.removeprefix("line "))
            said = re.search(r"the \d+ |what is \d+\?", tokenizer.decode(store.doc(i).tolist()))[0]
            assert said.encode() in data[at:].split(b"\n")[0], place


def test_whole_files_and_rows_of_a_table(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    store = stores(tmp_path, tokenizer, Source(name="s", path=str(tmp_path / "*.txt")))["s"]
    assert places_of(store, [2, 0]) == [str(tmp_path / "2.txt"), str(tmp_path / "0.txt")]
    parquet.write_table(pa.table({"text": ["a", "", "c"]}), tmp_path / "t.parquet")
    store = stores(tmp_path, tokenizer, Source(name="t", path=str(tmp_path / "t.parquet")))["t"]
    assert places_of(store, [0, 1]) == [f"{tmp_path}/t.parquet: row 0", f"{tmp_path}/t.parquet: row 2"]


def test_a_file_that_has_changed_is_not_asked(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    store = stores(tmp_path, tokenizer, Source(name="s", path=str(tmp_path / "a.jsonl")))["s"]
    (tmp_path / "a.jsonl").write_text(lines(TEXTS[::-1] + ["x"]))
    assert places_of(store, [7]) == ["document 7 of s, whose file has changed since it was tokenised"]
    (tmp_path / "a.jsonl").unlink()
    assert "document 7 of s" in places_of(store, [7])[0]


def test_rows_name_their_documents(tmp_path, tokenizer):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(lines(TEXTS))
    sources = tuple(Source(name=name, path=str(tmp_path / f"{name}.jsonl")) for name in "ab")
    config = DataConfig(sources=sources, cache=str(tmp_path / "cache"))
    stream = mix(prepare(config, tokenizer, say=lambda line: None), {"a": 1, "b": 1}, 24)
    for row in range(0, 40, 7):
        parts = held(stream, [row])
        tokens = np.concatenate([one.store.doc(one.document, one.first, one.first + one.count) for one in parts])
        assert tokens.tolist() == stream.row(row).tokens[stream.row(row).segments > 0].tolist()
    text = named(stream, range(8), most=3)
    assert text.count("line ") == 3 and "a.jsonl" in text and "b.jsonl" in text
    every = len({(one.store.name, one.document) for one in held(stream, range(8))})
    assert text.startswith(f"{every} documents: ") and text.endswith(f"and {every - 3} more")


def test_what_was_counted_is_kept_with_the_store(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines(["x", "", "a\r\nb", "n\0"]) + "\n\n")
    source, said = Source(name="s", path=str(tmp_path / "a.jsonl")), []
    config = DataConfig(sources=(source,), cache=str(tmp_path / "cache"))
    for _ in range(2):  # the second time nothing is read
        store = prepare(config, tokenizer, say=said.append)["s"]
        assert store.notes == Counter(empty=1, blank=2, bom=1, crlf=1, nul=1) and store.documents == 3
        assert "documents without text, left out: 1; blank lines, left out: 2" in said[-1]
    assert sum("tokenising" in line for line in said) == 1
    path = next((tmp_path / "cache").glob("*/*.notes.json"))
    path.write_text("{")
    with pytest.raises(DataError, match="damaged shard"):
        prepare(config, tokenizer, say=said.append)
