"""Reads a published folder on its own: config.json, and tensors mapped from safetensors files, never loaded whole.

The format: 8 bytes with the length of a JSON header, the header, the data (safetensors' own README).
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.errors import DataError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


class Folder:
    """`folder.config` is config.json as it is, `folder(name)` a mapped array; a name that is absent is a KeyError.

    Raises DataError for a folder without config.json or safetensors files.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        files = sorted(path.glob("*.safetensors"))
        if not (path / "config.json").is_file() or not files:
            raise DataError(f"{path}: no published model here: config.json and *.safetensors are needed")
        self.config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self._entries = {name: entry for file in files for name, entry in _header(file).items()}

    def __call__(self, name: str) -> np.ndarray:
        file, offset, dtype, shape = self._entries[name]
        return np.memmap(file, DTYPES[dtype], "r", offset, tuple(shape))


def _header(file: Path) -> dict[str, tuple]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: (file, 8 + size + item["data_offsets"][0], item["dtype"], item["shape"]) for name, item in header.items()
    }
