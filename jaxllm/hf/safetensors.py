"""Tensors of a Hugging Face folder, read lazily: a header says where each one lies, a memory map gives its bytes.

Our own reader of the format (it is a page: https://huggingface.co/docs/safetensors) and not the library's, because the
library's numpy side has no slices of bfloat16 or float8 tensors; writing is the library's.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.errors import DataError, nearest

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100_000_000  # as the reference implementation has it
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""

    def map(self) -> np.ndarray:
        """The tensor as a read-only memory map; bytes are read when they are used."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, mode="r", offset=self.start, shape=self.shape)


class Tensors(Mapping[str, Entry]):
    """`{name: entry}` of a folder with one or several safetensors files.

    Raises DataError for a missing shard, an index that leaves the folder, or a file whose header does not fit it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = self._files()
        self._entries: dict[str, Entry] = {}
        for file, names in files.items():
            found = read_header(file)
            if names is not None and (absent := sorted(names - found.keys())):
                raise DataError(f"{file} has no tensor {absent[0]}, which {INDEX} says it holds; download it again")
            for name in found if names is None else names:
                self._entries[name] = found[name]

    def _files(self) -> dict[Path, set[str] | None]:
        """The files, and the tensors wanted of each (None: all)."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            return self._indexed(index)
        if single.is_file():
            return {single: None}
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return {found[0]: None}
        if found:
            raise DataError(f"{self.folder} has {len(found)} safetensors files and no {INDEX}; download the index too")
        pickles = [path for pattern in PICKLES for path in self.folder.glob(pattern)]
        if pickles:
            raise DataError(
                f"{pickles[0]} is a pickle, which can run code when it is opened, and is not read here; convert it: "
                "load the model with transformers and save it with save_pretrained(folder), which writes safetensors"
            )
        raise DataError(f"{self.folder} has no {SINGLE} and no {INDEX}")

    def _indexed(self, index: Path) -> dict[Path, set[str] | None]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise DataError(f"{index}: weight_map must give a file name for each tensor")
        files: dict[Path, set[str] | None] = {}
        for tensor, name in listed.items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise DataError(f"{index}: {tensor} is said to be in {name!r}, which is not a file of this folder")
            files.setdefault(self.folder / name, set()).add(tensor)
        for file in files:
            if not file.is_file():
                raise DataError(f"{file} is missing, and {INDEX} names it; download it into {self.folder}")
        return files

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise DataError(f"{self.folder} has no tensor {name}{nearest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_json(path: Path) -> dict:
    """A JSON file as a dict. Raises DataError with the place."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be what it says it is") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object with keys, found {type(value).__name__}")
    return value


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises DataError where header and file do not fit."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DataError(
                f"{file}: its header is said to have {length:,} bytes, and the file has {size:,}; it is cut short or "
                "no safetensors file; download it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        check(isinstance(header, dict), "it is not an object")
        header.pop("__metadata__", None)
        data = size - 8 - length
        return {name: _entry(file, 8 + length, data, item) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file}: its header is damaged ({_reason(error)}); download it again") from None


def check(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def _entry(file: Path, base: int, size: int, item: dict) -> Entry:
    check(item["dtype"] in DTYPES, f"dtype {item['dtype']!r} is not known")
    dtype, shape = np.dtype(DTYPES[item["dtype"]]), tuple(item["shape"])
    start, end = item["data_offsets"]
    numbers = (*shape, start, end)
    check(all(type(n) is int and n >= 0 for n in numbers), f"shape {shape} or offsets {start}, {end} are no sizes")
    check(start <= end <= size, f"bytes {start:,} to {end:,} of {size:,} that are there")
    need = math.prod(shape) * dtype.itemsize
    check(end - start == need, f"{end - start:,} bytes for {item['dtype']}{list(shape)}, which needs {need:,}")
    return Entry(file, dtype, shape, base + start)
