"""The text of a column: parquet and arrow files, row by row."""

from collections.abc import Iterator
from typing import BinaryIO

from jaxllm.data.compressed import open_binary, optional
from jaxllm.data.lines import LONGEST, damage, too_long
from jaxllm.data.sources import COMPRESSED, remote
from jaxllm.errors import DataError, nearest

#: Rows that are read at once: a dictionary may hold one long text for many rows. 8 are as fast as 512.
ROWS = 8
#: How arrow's stream format ends (arrow.apache.org, IPC streaming format).
END = b"\xff\xff\xff\xff\0\0\0\0"


def rows(path: str, form: str, field: str) -> Iterator[tuple[int, str]]:
    """`(row, text)` of one column of a parquet or arrow file. Raises DataError with the file and the row."""
    optional("pyarrow", "reading parquet and dataset folders")
    row = 0
    try:
        with open_binary(path) as file:
            for batch in _batches(path, field, file, form):
                for value in batch.column(field):
                    yield row, _text(value, f"{path}: row {row}", field)
                    row += 1
    except Exception as error:
        raise damage(path, error) from None


def _text(value, where: str, field: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the column {field} holds a string that is not UTF-8 ({error.reason})") from None
    if not isinstance(text, str):
        found = "nothing" if text is None else f"a {type(text).__name__}"
        raise DataError(f"{where}: the column {field} holds {found}, not a string")
    if len(text) > LONGEST:
        raise too_long(where, "a text", LONGEST)
    return text


def _batches(path: str, field: str, file: BinaryIO, form: str):
    """Record batches of the one column."""
    if form == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        _has_column(path, field, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=ROWS, columns=[field])
        return
    yield from _arrow(path, field, file)


def _arrow(path: str, field: str, file: BinaryIO):
    import pyarrow.ipc

    # `save_to_disk` writes arrow's stream format; other writers choose the file format, which has a magic number.
    head = file.read(6)
    if head != b"ARROW1" and head[:4] != END[:4]:
        raise DataError(f"{path}: damaged or of another format (no arrow); fetch or write it again")
    if not (remote(path) or path.endswith(COMPRESSED)):
        file = pyarrow.memory_map(path)  # a length that is wrong costs no memory
    if head == b"ARROW1":
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        _has_column(path, field, reader.schema.names)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        return
    file.seek(-len(END), 2)
    complete = file.read() == END
    file.seek(0)
    reader = pyarrow.ipc.open_stream(file)
    _has_column(path, field, reader.schema.names)
    yield from reader
    if not complete:  # arrow takes the end of the file for the end of the stream
        raise DataError(f"{path}: cut off: arrow's mark of the end is missing; fetch or write it again")


def _has_column(path: str, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{path}: no column {field} (columns: {', '.join(names)}){nearest(field, names)}")
