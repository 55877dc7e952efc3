"""Files as bytes: plain or compressed, local or remote."""

import gzip
import importlib
import io
from typing import BinaryIO

from etils import epath

from jaxllm.data.sources import COMPRESSED, remote
from jaxllm.errors import MissingExtra

__all__ = ["COMPRESSED", "open_binary", "optional"]

#: Bytes that are decompressed at once. A block of 4 bytes may hold 128 KiB (RFC 8878, 3.1.1.2.3), so that these make
#: at most 64 MiB, where all of a file could make any number.
SLICE = 1 << 11


def open_binary(path: str) -> BinaryIO:
    """The file's bytes, decompressed if its name ends in .gz or .zst; local or remote."""
    raw = epath.Path(path).open("rb") if remote(path) else open(path, "rb")
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    return raw


class _Zstd(io.RawIOBase):
    """Decompresses frame by frame; zstandard's own reader ends without a word where a file was cut off."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._ready, self._held = raw, b"", b""
        self._new = optional("zstandard", "reading .zst files").ZstdDecompressor().decompressobj
        self._frame = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            chunk = chunk or self._slice()
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame is cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _slice(self) -> memoryview:
        if not self._held:
            self._held = memoryview(self._raw.read(1 << 17))
        found, self._held = self._held[:SLICE], self._held[SLICE:]
        return found

    def close(self) -> None:
        self._raw.close()
        super().close()


def optional(package: str, feature: str):
    """A module of the extra `data`. Raises MissingExtra."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtra(feature, package, "data") from None
