"""The Python standard library's own source, as text that every machine already has."""

import hashlib
import os
import sysconfig
from pathlib import Path

from jaxllm.errors import DataError, nearest

NAME = "python-stdlib"
#: Left out: tests, what pip installed, and the near-duplicate tables of `encodings`.
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
SPLITS = ("all", "train", "heldout")


def matches(path: str) -> bool:
    """Whether a source's path means the standard library: `python-stdlib`, or with `:train` or `:heldout`."""
    return path.partition(":")[0] == NAME


def files(path: str) -> list[str]:
    """The non-empty `.py` files, sorted. Raises DataError for an unknown split, or where Python has no source."""
    split = path.partition(":")[2] or "all"
    if split not in SPLITS:
        raise DataError(f"{path}: no such split{nearest(split, SPLITS)}")
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIP)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found = [f for f in sorted(found) if f.stat().st_size and split in ("all", _split(f.relative_to(root).as_posix()))]
    if not found:
        raise DataError(f"{path}: {root} holds no .py files; this Python came without its source")
    return [str(f) for f in found]


def _split(name: str) -> str:
    """Every twentieth file, by a hash of its name, is held out: the same ones on every machine."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 20 == 0 else "train"
