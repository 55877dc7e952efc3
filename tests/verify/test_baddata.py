"""Row 10: every kind of bad data is refused with its place or counted; a reader that is silent is caught."""

import dataclasses
import tempfile
from pathlib import Path

import pytest

from jaxllm.data import lines, prepare, readers, tables
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.verify import baddata, badfiles
from jaxllm.verify.baddata import attempt, bad_data


@pytest.fixture
def meet(lab):
    """`meet(name)`: what is wrong with how a kind of bad data is met."""
    tokenizer = Tokenizer.load(lab.corpus() / "tokenizer")

    def meet(name, **changes):
        case = next(case for case in badfiles.cases() if case.name == name)
        return attempt(dataclasses.replace(case, **changes), Path(tempfile.mkdtemp(dir=lab.folder)), tokenizer)[0]

    return meet


@pytest.mark.slow
def test_the_row_holds(lab):
    found = bad_data(lab)
    assert found.passed and found.cases > 70, found.failures


def test_kinds_have_names_of_their_own():
    names = [case.name for case in badfiles.cases()]
    assert len(set(names)) == len(names) >= 25


SILENT = ["invalid UTF-8", "invalid UTF-8 in a record", "a character cut off at the end", "invalid UTF-8 inside gzip"]


@pytest.mark.parametrize("name", SILENT)
def test_a_reader_that_drops_what_is_not_utf8(meet, monkeypatch, name):
    for module in (lines, readers):
        monkeypatch.setattr(module, "text", lambda path, data, offset: data.decode("utf-8", "ignore"))
    assert "expected" in meet(name)


def test_an_error_without_its_place(meet, monkeypatch):
    monkeypatch.setattr(lines, "place", lambda path, offset, begin=None: path)
    assert "refused" in meet("NUL in a text")


def test_an_error_of_json(meet, monkeypatch):
    def loads(text, **_):
        raise KeyError("text")

    monkeypatch.setattr(readers.json, "loads", loads)
    assert "crashed" in meet("a last line cut off")


def test_a_key_that_stands_twice_and_the_last_one_taken(meet, monkeypatch):
    monkeypatch.setattr(readers, "_once", dict)
    assert "accepted" in meet("a key twice")


def test_a_line_without_a_limit_and_one_that_takes_too_much(meet, monkeypatch):
    assert "and 1 and 512 are allowed" in meet("100 MB in a record", memory=1 << 20)
    monkeypatch.setattr(baddata, "RESIDENT", -1 << 20)  # what tests before this one gave back may be enough for it
    assert "and 160 and -1 are allowed" in meet("100 MB in a record")
    monkeypatch.setattr(lines, "LONGEST", 1 << 30)
    assert "expected" in meet("a bomb of gzip")


def test_what_is_left_out_and_not_said(meet, monkeypatch):
    assert meet("blank lines") is None
    monkeypatch.setattr(prepare, "told", lambda notes: "")
    assert "accepted" in meet("a byte-order mark") and "accepted" in meet("CRLF")


def test_a_table_that_ends_early(meet, monkeypatch):
    pytest.importorskip("pyarrow")
    assert meet("arrow without its end") is None
    batches = tables._arrow

    def lenient(path, field, file):
        with pytest.raises(readers.DataError, match="mark of the end"):
            yield from batches(path, field, file)

    monkeypatch.setattr(tables, "_arrow", lenient)
    assert "accepted" in meet("arrow cut off", data=_without_end)


def _without_end(path):
    next(case for case in badfiles.cases() if case.name == "arrow without its end").data(path)


def test_a_file_that_changes_while_it_is_read(meet, monkeypatch):
    assert meet("changed while it was tokenised") is None
    monkeypatch.setattr(prepare, "_shard", _trusting)
    assert "accepted" in meet("changed while it was tokenised", file="b.txt")


def _trusting(encoder, unit, folder, stop):
    writer = prepare.ShardWriter(folder, unit.key, encoder.dtype)
    for entry, first, last in unit.spans:
        for document in encoder(entry.path, first, last, writer.notes):
            writer.add(document)
    writer.commit()
