"""Files as lines and whole texts of bounded size, and where in a file something stands."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator

from jaxllm.data.compressed import COMPRESSED, open_binary
from jaxllm.errors import DataError

#: Bytes of a line, a paragraph, or a value in a table; more is an error, so that memory stays bounded.
LONGEST = 1 << 26
#: Bytes of a text file that is one document.
WHOLE = 1 << 28
BOM = b"\xef\xbb\xbf"

#: What the first bytes of a file say, where it is not the text that its name promises.
LOOKS = (
    (b"\x1f\x8b", "it looks like gzip: name it .gz"),
    (b"\x28\xb5\x2f\xfd", "it looks like zstandard: name it .zst"),
    (b"\xfd7zXZ", "it looks like xz: decompress it"),
    (b"BZh", "it looks like bzip2: decompress it"),
    (b"PK\x03\x04", "it looks like a zip archive: unpack it"),
    (b"PAR1", "it looks like parquet: name it .parquet"),
    (b"ARROW1", "it looks like arrow: name it .arrow"),
    (b"\xff\xfe", "it looks like UTF-16: convert it to UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16: convert it to UTF-8"),
)


def lines(path: str, start: int = 0, stop: int | None = None, notes: Counter | None = None):
    """`(byte offset, line)` of the lines that begin in `[start, stop)`; every line belongs to exactly one range.

    A byte-order mark at the start of the file is left out, and counted in `notes`. Raises DataError for a line of more
    than LONGEST bytes, and for a file that is damaged or cannot be read.
    """
    offset = start
    try:
        with open_binary(path) as file:
            if start:
                file.seek(start - 1)
                offset += _rest_of_line(file) - 1
            while stop is None or offset < stop:
                line = file.readline(LONGEST + 1)
                if not line:
                    return
                if len(line) > LONGEST:
                    raise too_long(place(path, offset), "a line", LONGEST)
                bare = 0 if offset else _mark(line, notes)
                yield offset + bare, line[bare:] if bare else line
                offset += len(line)
    except Exception as error:
        raise damage(path, error, offset) from None


def whole(path: str, notes: Counter | None = None) -> tuple[int, bytes]:
    """`(byte offset, bytes)` of all of a file; as `lines`, with the limit WHOLE."""
    data = bytearray()
    try:
        with open_binary(path) as file:
            while block := file.read(min(1 << 22, WHOLE + 1 - len(data))):
                data += block
                if len(data) > WHOLE:
                    hint = "; set document: line or blank_line, or split the file"
                    raise too_long(path, "one document", WHOLE, hint)
    except Exception as error:
        raise damage(path, error, len(data)) from None
    bare = _mark(data, notes)
    return bare, bytes(data[bare:])


def text(path: str, data: bytes, offset: int) -> str:
    """The text of these bytes, which begin at `offset` of the file. Raises DataError for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, what = offset + error.start, f"0x{data[error.start]:02x}, {error.reason}"
        raise DataError(f"{place(path, at)}: not UTF-8 ({what}); {_hint(path)}") from None


def plain(path: str, data: bytes, offset: int) -> str:
    """As `text`; a byte of 0, which text files do not hold, is an error too."""
    if (at := data.find(b"\0")) >= 0:
        hint = _hint(path, "it is no text, or was not written to its end")
        raise DataError(f"{place(path, offset + at)}: a NUL byte; {hint}")
    return text(path, data, offset)


def too_long(where: str, what: str, limit: int, hint: str = "") -> DataError:
    return DataError(f"{where}: {what} of more than the {limit >> 20} MiB that are read as one{hint}")


def damage(path: str, error: Exception, offset: int | None = None) -> Exception:
    """What to raise for an error of reading: a DataError with the file and the place, or one that is not the file's."""
    if isinstance(error, DataError):
        return error
    where = path if not offset else place(path, offset)
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return DataError(f"{where}: damaged or cut off ({error}); fetch or write it again")
    if isinstance(error, OSError):
        return DataError(f"{path}: cannot be read ({error.strerror or error})")
    if type(error).__module__.split(".")[0] in ("zstandard", "zstd", "pyarrow"):
        return DataError(f"{where}: damaged or of another format ({error}); fetch or write it again")
    return error


def place(path: str, offset: int, begin: int | None = None) -> str:
    """`file: line 3, byte 120`: lines count from 1, bytes from 0. `begin`: where the line begins, if not there."""
    number = line_number(path, offset if begin is None else begin)
    return f"{path}: line {number}, byte {offset}" + " of the decompressed text" * path.endswith(COMPRESSED)


def line_number(path: str, offset: int) -> int:
    """Counted only for a message: a reader of a byte range does not know it."""
    number = 1
    with open_binary(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _rest_of_line(file) -> int:
    """Reads to the end of the line; its bytes."""
    count = 0
    while part := file.readline(1 << 20):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _mark(data: bytes, notes: Counter | None) -> int:
    """Bytes of a byte-order mark at the start."""
    if not data.startswith(BOM):
        return 0
    if notes is not None:
        notes["bom"] += 1
    return len(BOM)


def _hint(path: str, otherwise: str = "convert it to UTF-8") -> str:
    with open_binary(path) as file:
        head = file.read(8)
    return next((text for magic, text in LOOKS if head.startswith(magic)), otherwise)


def paragraphs(path: str, notes: Counter | None = None) -> Iterator[tuple[int, str]]:
    """`(byte offset, text)` of what lies between blank lines, at most LONGEST bytes each."""
    held, first, size = [], 0, 0
    for offset, line in lines(path, notes=notes):
        if (found := plain(path, line, offset)).strip():
            first, size = (first, size + len(line)) if held else (offset, len(line))
            if size > LONGEST:
                raise too_long(place(path, first), "a paragraph", LONGEST)
            held.append(found)
        elif held:
            yield first, "".join(held)
            held = []
    if held:
        yield first, "".join(held)
