"""Kinds of bad data, what is said of each, and the memory that it may take."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

#: Bytes that Python may hold at once for a small file, whatever is wrong with it.
SMALL = 32 << 20
#: And for one that holds or makes over 100 MB in a line: twice the longest line that is read, and the same.
LARGE = (128 << 20) + SMALL
#: By which a process may grow, with what libraries in C hold: a text of 65 MiB in a table takes 280 MiB.
RESIDENT = 512 << 20

TEXT = "def f(self):\n    return self.value\n\n"
GOOD = json.dumps({"text": TEXT}).encode() + b"\n"
ASKED, SAID = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of bad data."""

    name: str
    file: str
    """its file's name, which says the format"""
    data: bytes | Callable[[Path], None]
    """what is wrong with it, or what writes it"""
    expected: str
    """pattern of the error, from the file's name on; or with `policy` of the line that counts"""
    policy: bool = False
    memory: int = SMALL
    source: dict = dataclasses.field(default_factory=dict)
    """settings of the source"""
    whole_folder: bool = False
    """the source names the folder"""
    meanwhile: Callable[[Path], None] | None = None
    """what becomes of the file while it is tokenised"""
    afterwards: Callable[[Path], None] | None = None
    """what becomes of it before it is tokenised again"""


def cases() -> list[Case]:
    """All kinds; those of zstandard and of tables where the extra for data is there."""
    found = [*_texts(), *_changing(), *_records(), *_conversations(), *_gzips()]
    found += _zstandards() if find_spec("zstandard") else []
    return found + (_tables() if find_spec("pyarrow") else [])


def at(line: int | str, byte: int | str, what: str) -> str:
    """The pattern of a place and what is said of it."""
    return f": line {line}, byte {byte}: {what}"


def zipped(line: int | str, byte: int | str, what: str) -> str:
    return f": line {line}, byte {byte} of the decompressed text: {what}"


def endless(path: Path) -> None:
    """100 MB without the end of a line."""
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"0123456789" * 100_000)


def _texts() -> list[Case]:
    line, blank = {"document": "line"}, {"document": "blank_line"}
    accented = "caf\u00e9\n".encode()
    long, folder = "a line of more than the 64 MiB", {"policy": True, "whole_folder": True}

    def beside_empty(path: Path) -> None:
        path.write_bytes(GOOD)
        path.with_name("empty.jsonl").touch()

    return [
        Case("invalid UTF-8", "a.txt", b"one\ntwo \xe9 three\n", at(2, 8, r"not UTF-8 \(0xe9")),
        Case("invalid UTF-8 in a line", "a.txt", b"one\n\xff\n", at(2, 4, "not UTF-8"), source=line),
        Case("invalid UTF-8 in a paragraph", "a.txt", b"a\n\nb\xff\n", at(3, 4, "not UTF-8"), source=blank),
        Case("a character cut off at the end", "a.txt", accented[:-2], at(1, 3, "not UTF-8")),
        Case("UTF-16", "a.txt", accented.decode().encode("utf-16"), at(1, r"\d", ".*UTF-16")),
        Case("gzip by another name", "a.txt", gzip.compress(GOOD), at(1, r"\d", ".*looks like gzip")),
        Case("NUL in a text", "a.txt", b"one\ntwo\0\0\n", at(2, 7, "a NUL byte")),
        Case("NUL in a line", "a.txt", b"one\n\0\n", at(2, 4, "a NUL byte"), source=line),
        Case("a byte-order mark", "a.txt", b"\xef\xbb\xbf" + GOOD, "byte-order marks, left out: 1", policy=True),
        Case("CRLF", "a.txt", b"one\r\ntwo\r\n", "documents with CRLF line ends, kept: 1", policy=True),
        Case("an empty file", "a.txt", b"", " is empty; name files that hold text"),
        Case("an empty file among others", "in/a.jsonl", beside_empty, "empty files, left out: 1", **folder),
        Case("blank lines", "a.txt", b"a\n\n\nb\n", "without text, left out: 2", policy=True, source=line),
        Case("nothing but blank lines", "a.txt", b"\n\n\n", "", source=blank),
        Case("100 MB in a line", "a.txt", endless, at(1, 0, long), memory=LARGE, source=line),
        Case("100 MB in a paragraph", "a.txt", endless, at(1, 0, long), memory=LARGE, source=blank),
        Case("an archive", "a.tar.gz", b"x", ": no such file is read; unpack it"),
    ]


def _changing() -> list[Case]:
    def longer(path: Path) -> None:
        path.write_text(TEXT * 2)

    again = "again: 1 files changed since"
    return [
        Case("changed since it was tokenised", "a.txt", TEXT.encode(), again, policy=True, afterwards=longer),
        Case("changed while it was tokenised", "a.txt", TEXT.encode(), ": changed while", meanwhile=longer),
        Case("gone while it was tokenised", "a.txt", TEXT.encode(), ": cannot be read", meanwhile=Path.unlink),
    ]


def _records() -> list[Case]:
    name, size = "a.jsonl", len(GOOD)
    kinds = {
        "a last line cut off": (b'{"text": "ab', rf"(?<=line 2, byte {size + 9}: )not JSON \(Unterminated"),
        "a line that is no JSON": (b'{"text" "x"}\n' + GOOD, "not JSON"),
        "an array over all lines": (b'[{"text": "x"},\n', "not JSON"),
        "a list in a line": (b"[1]\n", "expected an object with the field text, found a list"),
        "another field": (b'{"txt": "x"}\n', r"no field text \(fields: txt\); did you mean txt"),
        "a number for a text": (b'{"text": 3}\n', "the field text holds a int"),
        "null for a text": (b'{"text": null}\n', "the field text holds a NoneType"),
        "a key twice": (b'{"text": "a", "text": "b"}\n', "the key text stands twice"),
        "half a surrogate pair": (b'{"text": "a\\ud83d"}\n', "the field text holds half a surrogate pair"),
        "nested too deep": (b"[" * 100_000 + b"\n", "JSON nested too deep"),
        "a number of 5000 digits": (b'{"text": ' + b"1" * 5000 + b"}\n", "Exceeds the limit"),
        "invalid UTF-8 in a record": (b'{"text": "\xff"}\n', "not UTF-8"),
        "a raw NUL in a record": (b'{"text": "a\0"}\n', "not JSON"),
    }
    found = [Case(kind, name, GOOD + data, at(2, r"\d+", what)) for kind, (data, what) in kinds.items()]
    counted = {
        "records without text": (b'{"text": ""}\n', "documents without text, left out: 1"),
        "blank lines between records": (b"\n \n", "blank lines, left out: 2"),
        "an escaped NUL": (b'{"text": "a\\u0000b"}\n', "documents with a NUL character, kept: 1"),
    }
    found += [Case(kind, name, GOOD + data, what, policy=True) for kind, (data, what) in counted.items()]
    mark = b"\xef\xbb\xbf"
    found.append(Case("a byte-order mark before records", name, mark + GOOD, "byte-order marks, left", policy=True))
    long = at(1, 0, "a line of more than the 64 MiB")
    return [*found, Case("100 MB in a record", name, endless, long, memory=LARGE)]


def _conversations() -> list[Case]:
    def line(value) -> bytes:
        return json.dumps(value).encode() + b"\n"

    chat, pairs = {"messages": [ASKED, SAID]}, {"prompt": "How many?", "chosen": "Seven.", "rejected": "Eight."}
    bad_chats = {
        "an unknown role": ({"messages": [ASKED, SAID | {"role": "asistant"}, SAID]}, "message 2: unknown role"),
        "a turn without content": ({"messages": [{"role": "user"}, SAID]}, "message 1, of the role user, has no"),
        "a number for a content": ({"messages": [ASKED | {"content": 3}, SAID]}, "messages: message 1: content holds"),
        "no turn of the assistant": ({"messages": [ASKED]}, "no turn of the assistant"),
        "messages in a string": ({"messages": "Seven."}, "messages holds a str"),
        "a prompt without a completion": ({"prompt": "How many?"}, "prompt stands there without completion"),
        "half a surrogate pair in a turn": ({"messages": [ASKED, SAID | {"content": "\ud800"}]}, ".*surrogate"),
    }
    bad_pairs = {
        "a pair without the rejected": ({"prompt": "x", "chosen": "y"}, ".*rejected is missing"),
        "a pair of the same": (pairs | {"rejected": "Seven."}, "chosen and rejected are the same"),
        "a number in a pair": (pairs | {"chosen": 3}, "prompt and completion hold"),
    }
    out = []
    for form, good, bad in (("chat", chat, bad_chats), ("pairs", pairs, bad_pairs)):
        for name, (record, what) in bad.items():
            place = at(2, len(line(good)), what)
            out.append(Case(name, "a.jsonl", line(good) + line(record), place, source={"format": form}))
        cut = line(good) + line(good)[:-20]
        out.append(Case(f"{form} cut off", "a.jsonl", cut, at(2, r"\d+", "not JSON"), source={"format": form}))
    nul = line({"messages": [ASKED, SAID | {"content": "a\0b"}]})
    what = "documents with a NUL character, kept: 1"
    return [*out, Case("NUL in a turn", "a.jsonl", nul, what, policy=True, source={"format": "chat"})]


def _gzips() -> list[Case]:
    name, whole = "a.jsonl.gz", gzip.compress(GOOD * 5000)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # of the checksum

    def bomb(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(200):
                file.write(b"a" * 1_000_000)

    damaged = r".*damaged or cut off"
    return [
        Case("gzip cut off", name, whole[:-30], zipped(r"\d+", r"\d+", damaged)),
        Case("gzip with a wrong checksum", name, bytes(flipped), damaged),
        Case("gzip and something behind it", name, whole + b"x", damaged),
        Case("no gzip at all", name, GOOD, damaged),
        Case("gzip of nothing", name, gzip.compress(b""), ""),
        Case("invalid UTF-8 inside gzip", name, gzip.compress(GOOD + b"\xff"), zipped(2, len(GOOD), "not UTF-8")),
        Case("a bomb of gzip", name, bomb, zipped(1, 0, "a line of more than the 64 MiB"), memory=LARGE),
        Case("xz", "a.jsonl.xz", b"\xfd7zXZ\0", ": no such file is read"),
        Case("bzip2", "a.jsonl.bz2", b"BZh9", ": no such file is read"),
    ]


def _zstandards() -> list[Case]:
    import zstandard

    name, whole = "a.jsonl.zst", zstandard.compress(GOOD * 5000)

    def bomb(path: Path) -> None:
        """A GiB in one frame of a few dozen KiB."""
        frame = zstandard.ZstdCompressor().compressobj()
        with path.open("wb") as file:
            for _ in range(64):
                file.write(frame.compress(bytes(16 << 20)))
            file.write(frame.flush())

    # What one slice of the file makes is held beside the line.
    memory = LARGE + (64 << 20)
    return [
        Case("zstandard cut off", name, whole[:-9], "(.*of the decompressed text)?: damaged or cut off"),
        Case("no zstandard at all", name, GOOD, ": damaged or of another format"),
        Case("a bomb of zstandard", name, bomb, zipped(1, 0, "a line of more than the 64 MiB"), memory=memory),
    ]


def _tables() -> list[Case]:
    import pyarrow as pa
    from pyarrow import parquet

    def of(table, cut: int | None = None) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            if path.suffix == ".parquet":
                parquet.write_table(table, path)
            else:
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
            path.write_bytes(path.read_bytes()[:cut])

        return write

    good, file = pa.table({"text": [TEXT] * 9}), "a.parquet"
    not_utf8 = pa.table({"text": pa.array([b"a", b"\xff"]).view(pa.string())})
    long = pa.table({"text": ["a", "b" * (65 << 20)]})
    nothing = pa.table({"text": pa.array([], pa.string())})
    hub = "data/train-00001-of-00002.parquet"
    return [
        Case("a table without the column", file, of(pa.table({"txt": ["x"]})), r": no column text \(columns: txt\)"),
        Case("null in a table", file, of(pa.table({"text": ["x", None]})), ": row 1: the column text holds nothing"),
        Case("numbers in a table", file, of(pa.table({"text": [1, 2]})), ": row 0: the column text holds a int"),
        Case("invalid UTF-8 in a table", file, of(not_utf8), ": row 1: the column text holds a string that is not"),
        Case("65 MiB in a table", file, of(long), ": row 1: a text of more than the 64 MiB", memory=LARGE),
        Case("parquet cut off", file, of(good, -9), ": damaged or of another format"),
        Case("no parquet at all", file, GOOD, ": damaged or of another format"),
        Case("a table without rows", file, of(nothing), ""),
        Case("texts in a table without text", file, of(pa.table({"text": ["x", ""]})), "left out: 1", policy=True),
        Case("arrow cut off", "a.arrow", of(good, -40), ": "),
        Case("arrow without its end", "a.arrow", of(good, -8), ": cut off: arrow's mark of the end is missing"),
        Case("no arrow at all", "a.arrow", GOOD, ": damaged or of another format"),
        Case("a dataset without a file", hub, of(good), "train-00000-of-00002.parquet is missing", whole_folder=True),
    ]
