"""One shard of a token store: its files, written at once and opened as memory maps.

KEY.tokens      the ids
KEY.marks       of conversations: a byte for each id, 1 where it is learnt; in the rejected one of a pair 2 more
KEY.docs.npy    int64, for each document: ids, bytes, hash; of conversations also the ids to predict, and the turns of
                the assistant that are not learnt
KEY.notes.json  what was counted while the files were read (see `readers.NOTES`); absent where there was nothing
"""

import hashlib
import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.errors import DataError

#: Bits of a mark.
LEARNT, REJECTED = 1, 2


class Document(NamedTuple):
    """What a store takes."""

    ids: np.ndarray
    bytes: int
    """UTF-8 bytes of the text that is learnt"""
    hash: int
    """`text_hash`"""
    marks: np.ndarray | None = None
    """of a conversation: uint8, LEARNT where the token is learnt, and REJECTED in the second one of a pair"""
    untrained: int = 0
    """of a conversation: the assistant's turns that are not learnt"""


class ShardWriter:
    """Writes one shard: tokens and marks, then a table of the documents, whose presence says that it is complete."""

    def __init__(self, folder: Path, key: str, dtype: np.dtype, *, chat: bool = False):
        self._folder, self._key, self._dtype, self._docs = folder, key, dtype, []
        self.notes: Counter = Counter()
        # Names of its own for each writer: two processes that prepare the same text write the same bytes twice.
        name = f"{key}.{uuid.uuid4().hex[:12]}"
        self._temps = {"tokens": folder / f"{name}.tmp"} | ({"marks": folder / f"{name}.marks.tmp"} if chat else {})
        self._files = {kind: path.open("wb") for kind, path in self._temps.items()}

    def add(self, document: Document) -> None:
        """One document; with marks where the shard holds conversations."""
        ids, size, hash, marks, untrained = document
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        row = [len(ids), size, hash]
        if marks is not None:
            self._files["marks"].write(marks.tobytes())
            row += [int(np.count_nonzero(marks[1:] & LEARNT)), untrained]
        self._docs.append(row)

    def commit(self) -> None:
        """Makes the shard durable and visible."""
        for kind, file in self._files.items():
            sync(file)
            self._temps[kind].replace(self._folder / f"{self._key}.{kind}")
        temp = self._temps["tokens"]
        if notes := +self.notes:
            with temp.open("w", encoding="utf-8") as file:
                json.dump(notes, file)
                sync(file)
            temp.replace(self._folder / f"{self._key}.notes.json")
        with temp.open("wb") as file:
            np.save(file, np.array(self._docs, np.int64).reshape(-1, 5 if "marks" in self._files else 3))
            sync(file)
        temp.replace(self._folder / f"{self._key}.docs.npy")

    def abort(self) -> None:
        """Removes what is unfinished."""
        for kind, file in self._files.items():
            file.close()
            self._temps[kind].unlink(missing_ok=True)


def has_shard(folder: Path, key: str) -> bool:
    """Whether a complete shard is there."""
    return (folder / f"{key}.docs.npy").is_file() and (folder / f"{key}.tokens").is_file()


def open_shard(folder: Path, key: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`(ids, table of the documents)`. Raises DataError for a damaged one."""
    path = folder / f"{key}.docs.npy"
    try:
        docs = np.load(path, allow_pickle=False)
        tokens = int(docs[:, 0].sum())
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: damaged shard ({error}); remove the folder and run jaxllm data prepare") from None
    return _map(folder / f"{key}.tokens", dtype, tokens), docs


def open_notes(folder: Path, keys: list[str]) -> Counter:
    """What was counted in these shards. Raises DataError for a damaged file."""
    notes: Counter = Counter()
    for key in keys:
        path = folder / f"{key}.notes.json"
        try:
            notes.update(json.loads(path.read_text("utf-8")) if path.exists() else {})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged shard ({error}); remove the folder and run jaxllm data prepare") from None
    return notes


def open_answers(folder: Path, keys: list[str], opened: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """What a store of conversations has beside its tokens. Raises DataError."""
    if any(docs.shape[1:] != (5,) for _, docs in opened):
        raise DataError(f"{folder}: damaged table of documents; remove the folder and run jaxllm data prepare")
    marks = (
        _map(folder / f"{key}.marks", np.dtype(np.uint8), len(ids)) for key, (ids, _) in zip(keys, opened, strict=True)
    )
    return {"marks": tuple(marks), "answers": np.concatenate([docs[:, 3:] for _, docs in opened])}


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        found, wanted = path.stat().st_size, count * dtype.itemsize
    except OSError as error:
        raise DataError(f"{path}: damaged shard ({error}); remove the folder and run jaxllm data prepare") from None
    if found != wanted:
        raise DataError(f"{path}: {found:,} bytes, expected {wanted:,}; remove the folder and run jaxllm data prepare")
    return np.memmap(path, dtype, mode="r") if wanted else np.zeros(0, dtype)


def text_hash(text: bytes) -> int:
    """32 bits of a document's text, by which it is held out or not."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


def digest(value) -> str:
    """A short hash of JSON-like values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()[:32]


def dtype_for(vocab: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab <= 1 << 16 else np.dtype("<u4")


def sync(file) -> None:
    """Closes a file whose bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
