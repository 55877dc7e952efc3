"""Files by their content: what tells a changed file from one that was only looked at again."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from jaxllm.data.sources import remote
from jaxllm.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A file as it was when its content was hashed."""

    path: str
    size: int
    mtime: int
    hash: str

    @property
    def row(self) -> list:
        return [self.path, self.size, self.mtime, self.hash]


def entries_of(paths: list[str], old: dict | None, folder: Path) -> list[Entry]:
    """Hashes files; those whose size and time are as before keep the hash they had.

    A file changed within two seconds of the last look is hashed again: its time may not tell (as in git's index).
    """
    known = {}
    if old:
        looked = (folder / "store.json").stat().st_mtime_ns
        known = {(p, s, m): h for p, s, m, h in old["files"] if 0 < m < looked - 2_000_000_000}
    entries = []
    for path in paths:
        size, mtime = stat(path)
        entries.append(Entry(path, size, mtime, known.get((path, size, mtime)) or _hash(path)))
    return entries


def stat(path: str) -> tuple[int, int]:
    """Size, and time of the last change in nanoseconds. Raises DataError where the file is gone."""
    try:
        if remote(path):
            found = epath.Path(path).stat()
            return found.length, int(found.mtime) * 10**9
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _hash(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with epath.Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()
