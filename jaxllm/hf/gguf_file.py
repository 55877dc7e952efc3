"""Reads a GGUF file lazily: its metadata, and where each tensor lies; a memory map gives the bytes.

The header is read here (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the `gguf` library's reader makes
an array of every token of a vocabulary (0.7 GB and 11 s for 262,144) and trusts the lengths that a file states. What
the quantised types stand for is the library's.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import DataError, MissingExtra

#: Types of metadata by number; 8 is text, 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9
#: Types of tensors that are numbers as they stand.
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
CHUNK = 1 << 22  # numbers that are dequantised at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor; the first axis is the outermost one, as in numpy and unlike in the file."""

    file: Path
    name: str
    kind: Any
    """`gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""
    nbytes: int

    def map(self) -> np.ndarray:
        """The numbers: a read-only memory map, or float32 for quantised types. Raises DataError."""
        if dtype := PLAIN.get(self.kind.name):
            return np.memmap(self.file, dtype, "r", self.start, self.shape)
        rows = math.prod(self.shape[:-1])
        packed = np.memmap(self.file, np.uint8, "r", self.start, (rows, self.nbytes // rows))
        out = np.empty((rows, self.shape[-1]), np.float32)
        step = max(1, CHUNK // self.shape[-1])
        for i in range(0, rows, step):
            out[i : i + step] = dequantize(packed[i : i + step], self.kind)
        return out.reshape(self.shape)

    def slice(self, i: int) -> "Entry":
        """Part i of the first axis, such as one expert of many."""
        size = self.nbytes // self.shape[0]
        return dataclasses.replace(self, shape=self.shape[1:], start=self.start + i * size, nbytes=size)


@dataclasses.dataclass(frozen=True)
class File:
    """What the header of a file says."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, text, lists of text, and arrays of numbers."""
    tensors: dict[str, Entry]


def library():
    """The `gguf` package. Raises MissingExtra."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("a .gguf file", "gguf", "gguf") from None
    return gguf


def dequantize(packed: np.ndarray, kind) -> np.ndarray:
    with np.errstate(all="ignore"):
        return library().dequantize(np.ascontiguousarray(packed), kind)


def read_gguf(path: str | Path) -> File:
    """The header of a file. Raises DataError where header and file do not fit, MissingExtra without `gguf`."""
    path, gguf = Path(path), library()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if size < 24 or stream.read(4) != b"GGUF":
                raise DataError(f"{path} ({size:,} bytes) is no GGUF file: it does not begin with GGUF")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data, gguf).read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


class _Header:
    """Reads forward through the header; every length is checked against what is left of the file."""

    def __init__(self, path: Path, data, gguf):
        self.path, self.data, self.gguf, self.at = path, data, gguf, 4
        self.kinds = {int(kind): kind for kind in gguf.GGMLQuantizationType}

    def read(self) -> File:
        try:
            version, count, keys = self.number("I"), self.number("Q"), self.number("Q")
            if version not in (2, 3):
                raise ValueError(f"version {version} is not read here; known: 2 and 3, little-endian")
            metadata: dict[str, Any] = {}
            for _ in range(keys):
                name = self.text()
                check(name not in metadata, f"{name} is there twice")
                metadata[name] = self.value(self.number("I"))
            found = [self.tensor() for _ in range(count)]
            return File(self.path, metadata, self.placed(found, metadata.get("general.alignment", 32)))
        except (ValueError, struct.error) as error:
            raise DataError(
                f"{self.path}: its header is damaged near byte {self.at:,} ({error}); download it again"
            ) from None

    def take(self, count: int) -> bytes:
        left = len(self.data) - self.at
        check(count <= left, f"{count:,} bytes are said to follow, and {left:,} are there")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str):
        value = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        # 1e-6 is stored as 9.999999974752427e-07: the shortest decimal that gives the same float32 is what was meant.
        return float(str(np.float32(value))) if code == "f" else value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            check(kind in SCALARS, f"metadata type {kind} is not known")
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            check(count * 8 <= len(self.data) - self.at, f"{count:,} texts do not fit")
            return [self.text() for _ in range(count)]
        check(kind in SCALARS, f"arrays of type {kind} are not known")
        dtype = np.dtype("<" + SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self) -> tuple[str, tuple[int, ...], Any, int]:
        name, axes = self.text(), self.number("I")
        check(1 <= axes <= 4, f"tensor {name} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        check(min(shape) > 0, f"tensor {name} has shape {list(shape)}")
        kind = self.number("I")
        check(kind in self.kinds, f"tensor {name} has type {kind}, which the gguf library does not know; update it")
        return name, shape, self.kinds[kind], self.number("Q")

    def placed(self, found, alignment) -> dict[str, Entry]:
        """The tensors in the file: one after the other, each at a multiple of `alignment`."""
        good = type(alignment) is int and 0 < alignment <= 1 << 20 and not alignment & (alignment - 1)
        check(good, f"general.alignment={alignment!r} must be a power of two")
        base, end, entries = -(-self.at // alignment) * alignment, 0, {}
        for name, shape, kind, start in found:
            block, size = self.gguf.GGML_QUANT_SIZES[kind]
            check(name not in entries, f"tensor {name} is there twice")
            check(shape[-1] % block == 0, f"tensor {name} has rows of {shape[-1]} in {kind.name} blocks of {block}")
            nbytes = math.prod(shape) // block * size
            check(start == end, f"tensor {name} is said to begin at byte {start:,} of the data, and {end:,} is next")
            left = len(self.data) - base - start
            check(nbytes <= left, f"tensor {name} needs {nbytes:,} bytes, and {max(left, 0):,} are there")
            entries[name] = Entry(self.path, name, kind, shape, base + start, nbytes)
            end = -(-(start + nbytes) // alignment) * alignment
        self.check_kinds({kind for _, _, kind, _ in found})
        return entries

    def check_kinds(self, kinds) -> None:
        """Asks the library for one block of each type, so that a type it cannot read is found before any weight."""
        for kind in kinds:
            try:
                if kind.name not in PLAIN:
                    dequantize(np.zeros((1, self.gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise DataError(
                    f"{self.path} has tensors of type {kind.name}, which the gguf library cannot turn into floats; get "
                    "the model in another type, such as Q8_0 or F16"
                ) from None


def check(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
