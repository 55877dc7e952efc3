"""What each kind of file gives, and what each bad one says."""

import gzip
import json
import os

import pytest

from jaxllm.data import readers
from jaxllm.data.readers import documents, splittable
from jaxllm.data.sources import Source, files
from jaxllm.errors import DataError, MissingExtra

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
TEXTS = ["first\nof two lines", "  zweite ü ▁\t", "third 😀\0"]


def lines_of(texts=TEXTS):
    return "".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)).encode()


def table(texts=TEXTS):
    return pa.table({"id": list(range(len(texts))), "text": texts})


def write_arrow(path, texts=TEXTS):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(texts).schema) as writer:
        writer.write_table(table(texts))


def read(path, **settings):
    source = Source(name="s", path=str(path), **settings)
    return [text for file in files(source) for text in documents(source, file)]


def test_all_formats_give_the_same_documents(tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_bytes(lines_of())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines_of()[:40]) + gzip.compress(lines_of()[40:]))
    # two frames in one file, as parallel compressors write them
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines_of()[:40]) + zstandard.compress(lines_of()[40:]))
    pq.write_table(table(), tmp_path / "d.parquet")
    (tmp_path / "saved").mkdir()
    write_arrow(tmp_path / "saved" / "data-00000-of-00001.arrow")
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(table(), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "saved", "hub"):
        assert read(tmp_path / name) == TEXTS, name
    assert read(tmp_path / "*.jsonl*") == TEXTS * 3


@pytest.mark.parametrize(
    "document, wanted",
    [
        ("file", ["\none\r\ntwo\n\n \nthree  \nfour"]),
        ("line", ["one", "two", " ", "three  ", "four"]),
        ("blank_line", ["one\r\ntwo\n", "three  \nfour"]),
    ],
)
def test_documents_of_text(tmp_path, document, wanted):
    (tmp_path / "a.txt").write_bytes(wanted_bytes := b"\none\r\ntwo\n\n \nthree  \nfour")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(wanted_bytes))
    assert read(tmp_path / "a.txt", document=document) == wanted
    assert read(tmp_path / "*.txt*", document=document) == wanted * 2


@pytest.mark.parametrize("step", [1, 3, 17, 1000])
def test_byte_ranges_hold_each_line_once(tmp_path, step):
    (tmp_path / "a.jsonl").write_bytes(data := lines_of(TEXTS * 5) + b"\n" + lines_of()[:-1])
    source = Source(name="s", path=str(tmp_path / "a.jsonl"))
    path = files(source)[0]
    assert splittable(source, path)
    ranges = [(a, min(a + step, len(data))) for a in range(0, len(data), step)]
    assert [t for a, b in ranges for t in documents(source, path, a, b)] == TEXTS * 6


def test_globs_are_sorted_unique_and_recursive(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = Source(name="s", path=(str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")))
    assert [os.path.basename(f) for f in files(source)] == ["a.txt", "b.txt", "c.txt"]


BAD = {
    "a.txt": (b"fine \xc3\xbc then \xff", {}, r"a.txt: line 1, byte 13: not UTF-8 \(0xff"),
    "b.txt": (b"one\ntwo \xe9\n", {"document": "line"}, "b.txt: line 2, byte 8: not UTF-8"),
    "a.jsonl": (lines_of() + b'{"text": "x" "y"}\n', {}, r"a.jsonl: line 4, byte \d+: not JSON"),
    "b.jsonl": (
        b'\n{"txt": "x", "url": 1}\n',
        {},
        r"line 2, byte 1: no field text \(fields: txt, url\); did you mean txt",
    ),
    "c.jsonl": (b"[1]\n", {}, "line 1, byte 0: expected an object with the field text, found a list"),
    "d.jsonl": (b'{"text": 3}', {}, "line 1, byte 0: the field text holds a int"),
    "e.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', {}, "e.jsonl: line 2, byte 24: not UTF-8"),
    "f.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, {}, "line 2, byte 14: JSON nested too deep"),
    "g.jsonl": (
        b'{"text": "a"}\n{"text": "caf\\ud83d"}\n',
        {},
        "line 2, byte 14: the field text holds half a surrogate pair at",
    ),
    "a.jsonl.gz": (
        gzip.compress(lines_of(TEXTS * 99))[:-30],
        {},
        r"a.jsonl.gz: line \d+, byte \d+ of the decompressed text: damaged or cut off",
    ),
    "b.jsonl.gz": (b"no gzip at all", {}, "b.jsonl.gz: damaged or cut off"),
    "c.jsonl.gz": (gzip.compress(b'{"text": "\xff"}'), {}, "byte 10 of the decompressed text"),
    "a.jsonl.zst": (
        zstandard.compress(lines_of(TEXTS * 99))[:-9],
        {},
        r"a.jsonl.zst: (line \d+, byte \d+ of the decompressed text: )?damaged or cut off",
    ),
    "b.jsonl.zst": (b"no zstd at all", {}, "b.jsonl.zst: damaged"),
    "a.parquet": (b"PAR1 no parquet at all", {}, "a.parquet: damaged or of another format"),
    "a.arrow": (b"no arrow at all, really none", {}, "a.arrow: damaged or of another format"),
    "empty.txt": (b"", {}, "source s: .*empty.txt is empty; name files that hold text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_the_place(tmp_path, name):
    data, settings, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **settings)


def test_missing_column_and_null(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(table(), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column txt \(columns: id, text\); did you mean text"):
        read(tmp_path / "a.parquet", field="txt")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet: row 1: the column text holds nothing"):
        read(tmp_path / "b.parquet")


def test_a_text_that_a_table_holds_once_for_many_rows_is_not_held_for_all(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x" * (1 << 20)] * 600}), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    found = documents(Source(name="s", path="x"), str(tmp_path / "a.parquet"))
    before, most = pa.total_allocated_bytes(), 0
    for _ in range(40):
        assert len(next(found)) == 1 << 20
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 64 << 20


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"source s: no file matches .*note.txt; did you mean notes.txt\?"):
        read(tmp_path / "note.txt")
    with pytest.raises(
        DataError, match=f"no file matches .*gone/a.txt; the folder {tmp_path} is there and holds 1 ent"
    ):
        read(tmp_path / "gone" / "a.txt")
    (tmp_path / "Makefile").write_text("x")
    with pytest.raises(DataError) as error:
        read(tmp_path / "some_file.py")
    assert "Makefile" not in str(error.value) and "notes" not in str(error.value), "none of them is meant"
    with pytest.raises(DataError, match="no .arrow, .parquet or .jsonl file in the folder"):
        read(tmp_path)


def test_splits_are_never_mixed(tmp_path):
    for name in ("train", "test"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / f"{name}-00000.jsonl").write_bytes(lines_of([name]))
        (tmp_path / "both" / name).mkdir(parents=True)
    (tmp_path / "both" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"mixes splits \(test, train\)"):
        read(tmp_path / "hub")
    assert read(tmp_path / "hub" / "train*") == ["train"]
    with pytest.raises(DataError, match="holds the splits test, train"):
        read(tmp_path / "both")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pyarrow: pip install 'jaxllm\[data\]'"):
        readers.require(Source(name="s", path="x"), "x.parquet")


def test_gs_paths_go_through_the_remote_layer(bucket):
    """A stand-in: shows that paths, globs, ranges and compressed streams go through epath, not what a network does."""
    import pyarrow.parquet as pq

    (bucket / "texts").mkdir(parents=True)
    (bucket / "texts" / "a.jsonl").write_bytes(lines_of())
    (bucket / "texts" / "b.jsonl.zst").write_bytes(zstandard.compress(lines_of()))
    pq.write_table(table(), bucket / "texts" / "c.parquet")
    source = Source(name="s", path="gs://bucket/texts/*")
    assert files(source) == [f"gs://bucket/texts/{n}" for n in ("a.jsonl", "b.jsonl.zst", "c.parquet")]
    assert read("gs://bucket/texts/*") == TEXTS * 3
    assert [t for a in (0, 50) for t in documents(source, "gs://bucket/texts/a.jsonl", a, a + 50)] == TEXTS
    with pytest.raises(DataError, match="gs://bucket/texts/x.*: no file matches|no file matches gs://"):
        read("gs://bucket/texts/x*")
    with pytest.raises(DataError, match=r"\*\* is not supported on gs://"):
        read("gs://bucket/**")
    with pytest.raises(DataError, match=r"texts is a folder; name its files by a glob, such as gs://bucket/texts/\*"):
        read("gs://bucket/texts")
