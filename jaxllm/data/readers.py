"""Documents out of files: text, JSON lines, parquet and arrow, plain or compressed, one at a time.

What is no error and yet not plain text is counted in `notes`, a Counter with the keys of `NOTES`.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jaxllm.data.compressed import COMPRESSED, optional
from jaxllm.data.lines import lines, paragraphs, place, plain, text, whole
from jaxllm.data.sources import TURNS, Source, kind
from jaxllm.data.tables import rows
from jaxllm.errors import DataError, nearest

#: What is counted, and what becomes of it.
NOTES = {
    "empty": "documents without text, left out",
    "blank": "blank lines, left out",
    "nothing": "files without text, left out",
    "bom": "byte-order marks, left out",
    "crlf": "documents with CRLF line ends, kept",
    "nul": "documents with a NUL character, kept",
}


def documents(
    source: Source, path: str, start: int = 0, stop: int | None = None, notes: Counter | None = None
) -> Iterator[str]:
    """The documents of one file, or those whose line begins in the bytes `[start, stop)` (see `splittable`).

    Documents without text are left out. Raises DataError with the file and the byte, line or row of what is wrong:
    not UTF-8, not JSON, no such field, too long, a damaged or cut-off compressed file.
    """
    yield from (text for _, text in placed(source, path, start, stop, notes))


def placed(
    source: Source, path: str, start: int = 0, stop: int | None = None, notes: Counter | None = None
) -> Iterator[tuple[int, str]]:
    """`documents` with the place of each: its byte, or in a table its row. See `where`."""
    notes = Counter() if notes is None else notes
    form = kind(source, path)
    if form in ("parquet", "arrow"):
        found = rows(path, form, source.field)
    elif form == "jsonl":
        found = _fields(source, path, start, stop, notes)
    elif source.document == "file":
        found = _file(path, notes)
    else:
        found = _per_line(path, start, stop, notes) if source.document == "line" else paragraphs(path, notes)
    for at, document in found:
        if not document:
            notes["empty"] += 1
            continue
        notes["crlf"] += "\r\n" in document
        notes["nul"] += "\0" in document
        yield at, document


def records(
    path: str, start: int = 0, stop: int | None = None, notes: Counter | None = None
) -> Iterator[tuple[int, Any]]:
    """`(byte offset, JSON value)` of the lines of one file, or of those that begin in the bytes `[start, stop)`.

    Raises DataError as `documents` does.
    """
    for offset, line in lines(path, start, stop, notes):
        line = text(path, line, offset)
        if not line.strip():
            if notes is not None:
                notes["blank"] += 1
            continue
        try:
            yield offset, json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            at = offset + len(line[: error.pos].encode("utf-8"))
            raise DataError(f"{place(path, at, offset)}: not JSON ({error.msg}); one object a line is wanted") from None
        except RecursionError:
            raise DataError(f"{place(path, offset)}: JSON nested too deep") from None
        except ValueError as error:  # a number of thousands of digits, or a key twice
            raise DataError(f"{place(path, offset)}: {error}") from None


@contextlib.contextmanager
def located(path: str, offset: int):
    """Puts the file, the line and the byte before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place(path, offset)}: {error}") from None


def where(source: Source, path: str, at: int) -> str:
    """The place of a document, for people."""
    if kind(source, path) in ("parquet", "arrow"):
        return f"{path}: row {at}"
    return path if kind(source, path) == "text" and source.document == "file" else place(path, at)


def splittable(source: Source, path: str) -> bool:
    """Whether byte ranges of the file can be read apart: uncompressed, and one line is one document."""
    form = kind(source, path)
    return not path.endswith(COMPRESSED) and (
        form in ("jsonl", *TURNS) or (form == "text" and source.document == "line")
    )


def require(source: Source, path: str) -> None:
    """Raises MissingExtra where a package is needed to read the file and is not installed."""
    if kind(source, path) in ("parquet", "arrow"):
        optional("pyarrow", "reading parquet and dataset folders")
    if path.endswith(".zst"):
        optional("zstandard", "reading .zst files")


def told(notes: Counter) -> str:
    """What was counted, in a line; empty where nothing was."""
    return "; ".join(f"{text}: {notes[key]:,}" for key, text in NOTES.items() if notes[key])


def _file(path: str, notes: Counter) -> Iterator[tuple[int, str]]:
    offset, data = whole(path, notes)
    yield offset, plain(path, data, offset)


def _per_line(path: str, start: int, stop: int | None, notes: Counter) -> Iterator[tuple[int, str]]:
    for offset, line in lines(path, start, stop, notes):
        yield offset, plain(path, line, offset).removesuffix("\n").removesuffix("\r")


def _fields(source: Source, path: str, start: int, stop: int | None, notes: Counter) -> Iterator[tuple[int, str]]:
    for offset, record in records(path, start, stop, notes):
        if problem := _field_problem(record, source.field):
            raise DataError(f"{place(path, offset)}: {problem}")
        yield offset, record[source.field]


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON, in which no key may stand twice: which value is meant, nobody can tell."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} stands twice in one object")
    return found


def _field_problem(record, field: str) -> str | None:
    if not isinstance(record, dict):
        return f"expected an object with the field {field}, found a {type(record).__name__}"
    if field not in record:
        return f"no field {field} (fields: {', '.join(record) or 'none'}){nearest(field, record)}; set field="
    if not isinstance(record[field], str):
        return f"the field {field} holds a {type(record[field]).__name__}, not a string"
    if surrogate := re.search("[\ud800-\udfff]", record[field]):
        return (
            f"the field {field} holds half a surrogate pair at character {surrogate.start()}, which UTF-8 cannot hold"
        )
    return None
