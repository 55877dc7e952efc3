"""Tokenised once, again only for what changed, and safe against being killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm.data import entries
from jaxllm.data import prepare as module
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare, prepare_source, train_tokenizer
from jaxllm.data.sources import Source
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, ResourceError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 2048)


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i} ü\n" * (20 + 10 * i))
    return tmp_path


def run(folder, tokenizer, threads=2, **settings):
    """`(store, what was said)`."""
    said = []
    source = Source(name="notes", **({"path": str(folder / "*.txt")} | settings))
    return prepare_source(source, tokenizer, folder / "cache", threads, say=said.append), said


def texts(store, tokenizer):
    return [tokenizer.decode(store.doc(i)) for i in range(store.documents)]


@pytest.mark.fast
@pytest.mark.parametrize("threads", [1, 4])
def test_store_holds_every_document_with_both_ends(folder, tokenizer, threads):
    store, said = run(folder, tokenizer, threads)
    wanted = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert texts(store, tokenizer) == wanted
    for i, text in enumerate(wanted):
        np.testing.assert_array_equal(store.doc(i), tokenizer.encode(text, bos=True, eos=True))
        assert store.bytes[i] == len(text.encode()) and store.lengths[i] == len(store.doc(i))
    assert store.text_bytes == sum(store.bytes) and store.tokens == sum(store.lengths)
    assert len(store.shards) > 3 and said == [
        f"source notes: 0.0 MB in 12 files; tokenising {len(store.shards)} of {len(store.shards)} shards"
    ]


def test_big_file_is_cut_into_ranges(tmp_path, tokenizer):
    lines = [f"line {i} " * (i % 9 + 1) for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    store, _ = run(tmp_path, tokenizer, path=str(tmp_path / "a.jsonl"))
    assert len(store.shards) > 5 and texts(store, tokenizer) == lines


def test_second_time_nothing_is_done_and_weight_does_not_matter(folder, tokenizer):
    store, _ = run(folder, tokenizer)
    again, said = run(folder, tokenizer, weight=3.0)
    assert said == [] and again.fingerprint == store.fingerprint


@pytest.mark.parametrize("keep_time", [False, True])
def test_changed_file_is_noticed_and_only_its_shard_made_again(folder, tokenizer, keep_time):
    """Same size, and even the same time while the last look is fresh."""
    store, _ = run(folder, tokenizer)
    stat = (folder / "11.txt").stat()
    text = (folder / "11.txt").read_text().replace("file", "pile")
    (folder / "11.txt").write_text(text)
    if keep_time:
        os.utime(folder / "11.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, said = run(folder, tokenizer)
    assert said[0].endswith(f"tokenising 1 of {len(store.shards)} shards again: 1 files changed since (such as 11.txt)")
    assert texts(changed, tokenizer)[-1] == text and changed.fingerprint != store.fingerprint
    assert len(list((folder / "cache").glob("*/*.tokens"))) == len(store.shards)  # the old shard is gone
    (folder / "11.txt").unlink()
    assert run(folder, tokenizer)[0].documents == 11


def test_unchanged_files_are_not_read_again(folder, tokenizer, monkeypatch):
    old = time.time() - 100
    for path in folder.glob("*.txt"):
        os.utime(path, (old, old))
    run(folder, tokenizer)
    monkeypatch.setattr(entries, "_hash", lambda path: pytest.fail(f"{path} was read"))
    run(folder, tokenizer)


def test_settings_and_tokenizers_have_stores_of_their_own(folder, tokenizer):
    whole, _ = run(folder, tokenizer)
    lines, _ = run(folder, tokenizer, document="line")
    other = train_tokenizer((Source(name="n", path="python-stdlib:heldout"),), vocab=450)
    foreign, _ = run(folder, other)
    assert lines.documents > whole.documents and len({whole.fingerprint, lines.fingerprint, foreign.fingerprint}) == 3
    store = next(p for p in (folder / "cache").iterdir() if json.loads((p / "store.json").read_text())["vocab"] == 450)
    with pytest.raises(DataError, match=f"made by the tokenizer {other.hash[:12]}, not by {tokenizer.hash[:12]}"):
        TokenStore.open(store, tokenizer)


KILLED = """
import os, sys, signal
from pathlib import Path
from jaxllm.data import entries
from jaxllm.data import prepare as module
from jaxllm.data.sources import Source
from jaxllm.data.shards import ShardWriter
from jaxllm.data.tokenizer import Tokenizer
module.SMALL = 2048
folder, commit, done = Path(sys.argv[1]), ShardWriter.commit, []
def killed(writer):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(writer)
    done.append(writer)
ShardWriter.commit = killed
source = Source(name="notes", path=str(folder / "*.txt"))
module.prepare_source(source, Tokenizer.load(folder / "tok"), folder / "cache", 1, say=print)
"""


def test_killed_run_keeps_finished_shards(folder, tokenizer):
    tokenizer.save(folder / "tok")
    result = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = next((folder / "cache").iterdir())
    assert len(list(left.glob("*.docs.npy"))) == 2 and list(left.glob("*.tmp"))
    store, said = run(folder, tokenizer)
    assert f"tokenising {len(store.shards) - 2} of {len(store.shards)} shards" in said[0]
    assert texts(store, tokenizer) == [path.read_text() for path in sorted(folder.glob("*.txt"))]


def test_stopped_by_an_error_nothing_half_written_is_used(folder, tokenizer):
    (folder / "07.txt").write_bytes(b"fine\n" * 99 + b"\xff")
    with pytest.raises(DataError, match="07.txt: line 100, byte 495: not UTF-8"):
        run(folder, tokenizer)
    assert not list((folder / "cache").glob("*/*.tmp")) and not list((folder / "cache").glob("*/store.json"))
    (folder / "07.txt").write_text("mended\n")
    assert "mended\n" in texts(run(folder, tokenizer)[0], tokenizer)


def test_full_disk(folder, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxllm.data.shards.ShardWriter.add", full)
    with pytest.raises(ResourceError, match="the disk is full.* data.cache"):
        run(folder, tokenizer)


def test_damaged_stores_are_refused(folder, tokenizer):
    store, _ = run(folder, tokenizer)
    place = next((folder / "cache").iterdir())
    shard = sorted(place.glob("*.tokens"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=f"{len(data) - 2:,} bytes, expected {len(data):,}"):
        TokenStore.open(place)
    shard.write_bytes(data)
    first = json.loads((place / "store.json").read_text())["shards"][0]
    ids = np.fromfile(place / f"{first}.tokens", "<u2")
    ids[7] = 60_000
    ids.tofile(place / f"{first}.tokens")
    with pytest.raises(DataError, match="document 0, position 7: token id 60000 is outside the vocabulary of 400"):
        TokenStore.open(place).doc(0)
    assert TokenStore.open(place).doc(0, 0, 7).size == 7
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(folder)


def test_heldout_documents_are_apart_and_duplicates_together(folder, tokenizer):
    source = Source(name="notes", path=str(folder / "*.txt"), document="line")
    lines = [f"line {i}" for i in range(300)] * 2
    (folder / "lines.txt").write_text("\n".join(lines))
    config = DataConfig(sources=(source,), heldout=0.2, cache=str(folder / "cache"))
    stores = prepare(config, tokenizer, say=lambda line: None)
    assert list(stores) == ["notes", *config.eval_names] == ["notes", "notes-heldout"]
    rest, out = (set(texts(store, tokenizer)) for store in stores.values())
    assert not rest & out and {*lines} <= rest | out and 0.1 < len(out) / len(rest | out) < 0.3


def test_the_same_documents_are_held_out_under_any_tokenizer(folder, tokenizer):
    other = Tokenizer.train([f"word {i * 7} and others {i}\n" * 9 for i in range(99)], 300)
    halves = [[set(texts(half, t)) for half in run(folder, t)[0].split(0.3)] for t in (tokenizer, other)]
    assert halves[0] == halves[1] and min(map(len, halves[0])) > 1


def test_a_few_documents_give_one_to_hold_out_and_keep_one(folder, tokenizer):
    store, _ = run(folder, tokenizer)
    assert [half.documents for half in store.split(1e-9)] == [11, 1]
    assert [half.documents for half in store.split(1 - 1e-9)] == [1, 11]
    assert [half.name for half in store.split(0.3)] == ["notes", "notes-heldout"]
    for same in (np.arange(1), np.zeros(5, int)):
        with pytest.raises(DataError, match="notes: heldout=0.1 needs two .* document: blank_line .*eval_sources"):
            store.select(same).split(0.1)


def test_progress_ends_at_the_whole(folder, tokenizer):
    seen = []
    config = DataConfig(sources=(Source(name="notes", path=str(folder / "*.txt")),), cache=str(folder / "cache"))
    prepare(config, tokenizer, progress=lambda *x: seen.append(x), say=lambda line: None)
    total = sum(path.stat().st_size for path in folder.glob("*.txt"))
    assert seen[-1] == ("notes", total, total) and [x[1] for x in seen] == sorted(x[1] for x in seen)


def test_no_text_at_all(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match="source notes: no text in its 1 files, such as"):
        run(tmp_path, tokenizer, document="blank_line")


@pytest.mark.fast
def test_tokenising_does_not_load_jax():
    code = "import sys, jaxllm.data.prepare, jaxllm.data.mixture, jaxllm.data.inspect; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_large_vocabulary_takes_four_bytes(folder, tokenizer):
    class Large:
        vocab, hash, bos = 70_000, "large", 2

        def encode(self, text, bos, eos):
            return np.array([2, 69_999, 3], np.int32)

    store, _ = run(folder, Large())
    assert store.doc(0).tolist() == [2, 69_999, 3] and store.doc(0).dtype == np.uint32


def test_tokenizer_from_sources(folder):
    (folder / "more.txt").write_text("".join(f"words {i} and brown foxes {i * 7}\n" for i in range(300)))
    tokenizer = train_tokenizer((Source(name="n", path=str(folder / "*.txt")),), 300, folder / "tok")
    assert tokenizer.vocab == 300 and Tokenizer.load(folder / "tok").hash == tokenizer.hash


def test_gs_text_and_tokenizer_become_a_local_store(bucket, folder, tokenizer):
    for path in folder.glob("*.txt"):
        path.rename(bucket / path.name)
    tokenizer.save("gs://bucket/tok")
    assert (bucket / "tok" / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
    store, _ = run(folder, Tokenizer.load("gs://bucket/tok"), path="gs://bucket/*.txt")
    assert texts(store, tokenizer) == [path.read_text() for path in sorted(bucket.glob("*.txt"))]
    assert run(folder, tokenizer, path="gs://bucket/*.txt")[1] == []


def test_a_temporary_file_that_another_process_renames_is_no_error(folder, tokenizer):
    run(folder, tokenizer)
    place = next((folder / "cache").iterdir())
    (place / "gone.tmp").symlink_to(place / "nowhere")  # listed, and not there when it is looked at
    (folder / "new.txt").write_text("new\n")
    assert run(folder, tokenizer)[0].documents == 13


def test_a_tokenizer_is_not_trained_on_what_is_held_out(folder, tokenizer, monkeypatch):
    source, seen = Source(name="notes", path=str(folder / "*.txt")), []
    monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab, out: seen.extend(texts))
    train_tokenizer((source,), 300, heldout=0.3)
    monkeypatch.undo()
    rest, out = run(folder, tokenizer)[0].split(0.3)
    assert len(seen) == rest.documents and sum(map(len, (t.encode() for t in seen))) == rest.text_bytes
    train_on = {path.read_text() for path in folder.glob("*.txt")}
    assert set(seen) < train_on and len(train_on) == len(seen) + out.documents
