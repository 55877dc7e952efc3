"""Documents out of files: text, JSON lines, parquet and arrow, plain or compressed, one at a time."""

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxllm.data.compressed import open_binary, optional
from jaxllm.data.sources import TURNS, Source, kind
from jaxllm.errors import DataError, nearest


def documents(source: Source, path: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The documents of one file, or those whose line begins in the bytes `[start, stop)` (see `splittable`).

    Documents without text are left out. Raises DataError with the file and the byte, line or row of what is wrong:
    not UTF-8, not JSON, no such field, a damaged or cut-off compressed file.
    """
    form = kind(source, path)
    if form in ("parquet", "arrow"):
        found = _table(source, path, form)
    elif form == "jsonl":
        found = _jsonl(source, path, start, stop)
    else:
        found = {"file": _whole, "line": _per_line, "blank_line": _per_paragraph}[source.document](path, start, stop)
    with _readable(path):
        yield from (text for text in found if text)


def records(path: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """`(byte offset, JSON value)` of the lines of one file, or of those that begin in the bytes `[start, stop)`.

    Raises DataError as `documents` does.
    """
    with _readable(path):
        yield from _records(path, start, stop)


@contextlib.contextmanager
def located(path: str, offset: int):
    """Puts the file and the line at this offset before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: line {_line_number(path, offset)}: {error}") from None


def splittable(source: Source, path: str) -> bool:
    """Whether byte ranges of the file can be read apart: uncompressed, and one line is one document."""
    form = kind(source, path)
    return not path.endswith((".gz", ".zst")) and (
        form in ("jsonl", *TURNS) or (form == "text" and source.document == "line")
    )


def require(source: Source, path: str) -> None:
    """Raises MissingExtra where a package is needed to read the file and is not installed."""
    if kind(source, path) in ("parquet", "arrow"):
        optional("pyarrow", "reading parquet and dataset folders")
    if path.endswith(".zst"):
        optional("zstandard", "reading .zst files")


@contextlib.contextmanager
def _readable(path: str):
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); fetch or write it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the column holds a string that is not UTF-8 ({error.reason})") from None
    except DataError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("zstandard", "zstd", "pyarrow"):
            raise
        raise DataError(f"{path}: damaged or of another format ({error}); fetch or write it again") from None


def _lines(path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """`(byte offset, line)` of the lines that begin in `[start, stop)`; every line belongs to exactly one range."""
    with open_binary(path) as file:
        offset = start
        if start:
            file.seek(start - 1)
            offset += len(file.readline()) - 1
        while stop is None or offset < stop:
            line = file.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _text(path: str, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"0x{data[error.start]:02x}, {error.reason}"
        where = "of the decompressed text " if path.endswith((".gz", ".zst")) else ""
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start} {where}({what}); convert it to UTF-8"
        ) from None


def _whole(path: str, start: int, stop: int | None) -> Iterator[str]:
    with open_binary(path) as file:
        yield _text(path, file.read(), 0)


def _per_line(path: str, start: int, stop: int | None) -> Iterator[str]:
    for offset, line in _lines(path, start, stop):
        yield _text(path, line, offset).removesuffix("\n").removesuffix("\r")


def _per_paragraph(path: str, start: int, stop: int | None) -> Iterator[str]:
    held = []
    for offset, line in _lines(path, start, stop):
        text = _text(path, line, offset)
        if text.strip():
            held.append(text)
        elif held:
            yield "".join(held)
            held = []
    yield "".join(held)


def _jsonl(source: Source, path: str, start: int, stop: int | None) -> Iterator[str]:
    for offset, record in _records(path, start, stop):
        if problem := _field_problem(record, source.field):
            raise DataError(f"{path}: line {_line_number(path, offset)}: {problem}")
        yield record[source.field]


def _records(path: str, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
    for offset, line in _lines(path, start, stop):
        text = _text(path, line, offset)
        if not text.strip():
            continue
        try:
            record = json.loads(text.removeprefix("\ufeff") if offset == 0 else text)
        except json.JSONDecodeError as error:
            at = offset + len(text[: error.pos].encode("utf-8"))
            number = _line_number(path, offset)
            raise DataError(
                f"{path}: line {number}, byte {at}: not JSON ({error.msg}); one object a line is wanted"
            ) from None
        except RecursionError:
            raise DataError(f"{path}: line {_line_number(path, offset)}: JSON nested too deep") from None
        yield offset, record


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


def _line_number(path: str, offset: int) -> int:
    """Counted only for a message: a reader of a byte range does not know it."""
    number = 1
    with open_binary(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _table(source: Source, path: str, form: str) -> Iterator[str]:
    optional("pyarrow", "reading parquet and dataset folders")
    row = 0
    with open_binary(path) as file:
        for batch in _batches(source, path, file, form):
            for text in batch.column(source.field).to_pylist():
                if not isinstance(text, str):
                    found = "nothing" if text is None else f"a {type(text).__name__}"
                    raise DataError(f"{path}: row {row}: the column {source.field} holds {found}, not a string")
                yield text
                row += 1


def _batches(source: Source, path: str, file: BinaryIO, form: str):
    """Record batches of the one column, a few hundred rows at a time."""
    if form == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        _has_column(source, path, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=512, columns=[source.field])
        return
    import pyarrow.ipc

    # `save_to_disk` writes arrow's stream format; other writers choose the file format, which has a magic number.
    arrow = pyarrow.ipc.open_file if file.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
    file.seek(0)
    reader = arrow(file)
    _has_column(source, path, reader.schema.names)
    if arrow is pyarrow.ipc.open_stream:
        yield from reader
    else:
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _has_column(source: Source, path: str, names: list[str]) -> None:
    if source.field not in names:
        raise DataError(f"{path}: no column {source.field} (columns: {', '.join(names)}){nearest(source.field, names)}")
