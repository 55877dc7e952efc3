"""The manifest: what makes a step a saved one, and what proves that its bytes are still the ones written.

Orbax does not checksum array data (24 of 24 flipped bits restored in silence with 0.12.8), so each step folder gets
a `manifest.json` with the size and CRC-32 of every file, the dtype and shape of every array, and the run's metadata.
It is written last and appears at once: only a step folder that has one is read. While a step is written or deleted, a
file `<step>.unfinished` stands beside its folder; a folder with neither lost its manifest, and is kept aside.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from jaxllm.errors import CheckpointError

#: Version of the layout on disk: raise it when a reader of the old one would misread the new one.
FORMAT = 1
NAME = "manifest.json"
THREADS = 8  # zlib.crc32 releases the GIL; on network storage the reads overlap


class Damaged(Exception):
    """A step whose files are not those that were written; the message names the file and both values."""


def sealed(folder: epath.Path) -> bool:
    """Whether the step in `folder` was saved to the end."""
    return (folder / NAME).exists()


def seal(folder: epath.Path, body: dict) -> None:
    """Writes the manifest of a finished step: `body` (JSON-able), the format, and the checksum of each file."""
    names = [str(root.relative_to(folder) / name) for root, _, files in folder.walk() for name in files]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: _checksum(folder / name), names)
    _write(folder, {"format": FORMAT, **body, "files": dict(zip(names, sums, strict=True))})


def amend(folder: epath.Path, **changes) -> None:
    """Replaces entries of the body of a sealed step at once. Raises Damaged where its manifest is."""
    _write(folder, read(folder) | changes)


def _write(folder: epath.Path, body: dict) -> None:
    body, partial = plain(body), folder / (NAME + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps({"crc32": _crc(body), **body}))
        file.flush()
        if is_local(folder):
            os.fsync(file.fileno())
    partial.replace(folder / NAME)


def read(folder: epath.Path) -> dict:
    """The manifest of a step. Raises Damaged, and CheckpointError for a format that this version does not know."""
    try:
        text = (folder / NAME).read_text()
        body = json.loads(text)
        stored = body.pop("crc32")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} is unreadable ({type(error).__name__})") from None
    # A flipped bit may also change nothing that is read, such as 1e-05 to 1E-05.
    if stored != _crc(body) or text != json.dumps({"crc32": stored, **body}):
        raise Damaged(f"{NAME} does not match its own checksum")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {body.get('format')}, this jaxllm reads format {FORMAT}; "
            "use the jaxllm version that wrote it"
        )
    return body


def verify(folder: epath.Path, body: dict, items: tuple[str, ...] = ("",)) -> None:
    """Compares the files of the named items (default: all) with the manifest. Raises Damaged for the first change."""
    names = [name for name in body["files"] if name.startswith(items)]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, now in zip(names, pool.map(lambda name: _try_checksum(folder / name), names), strict=True):
            size, crc = body["files"][name]
            if isinstance(now, OSError):
                raise Damaged(f"{name} cannot be read ({now.strerror or type(now).__name__})")
            if now[0] != size:
                raise Damaged(f"{name} has {now[0]} bytes, {size} were written")
            if now[1] != crc:
                raise Damaged(f"{name} has CRC-32 {now[1]:08x}, {crc:08x} was written")


def plain(body: dict) -> dict:
    """`body` as JSON gives it back: tuples are lists, keys are strings. What is not JSON raises TypeError."""
    return json.loads(json.dumps(body))


def is_local(folder: epath.Path) -> bool:
    """Whether the path is on a mounted file system, and not `gs://` or another store."""
    return "://" not in os.fspath(folder)


def _checksum(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _try_checksum(path: epath.Path) -> tuple[int, int] | OSError:
    try:
        return _checksum(path)
    except OSError as error:
        return error


def _crc(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
