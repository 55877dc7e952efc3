"""The token store: every document of a source, tokenised once, memory-mapped.

Text is `<bos> ... <eos>`, and every token but the first is learnt. A conversation is what its template makes of it,
with a byte beside each token that says whether it is learnt.
"""

import contextlib
import hashlib
import json
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxllm.data.shards import LEARNT, REJECTED, digest, open_answers, open_notes, open_shard, sync
from jaxllm.errors import DataError

#: Part of each store's folder name: a change of format or of how text is cut makes new shards, and reads no old ones.
VERSION = 4


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents of token ids on disk. Opened by `open` or made by `prepare`; cheap to copy and to split."""

    name: str
    tokenizer_hash: str
    vocab: int
    fingerprint: str
    """hash of the tokenizer and of all text, in its order"""
    shards: tuple[np.ndarray, ...]
    """memory maps of uint16, or uint32 where the vocabulary is over 65,536"""
    shard_of: np.ndarray
    start_of: np.ndarray
    lengths: np.ndarray
    """tokens of each document, both ends included"""
    bytes: np.ndarray
    """UTF-8 bytes of each document's text that is learnt"""
    hashes: np.ndarray
    """`text_hash` of each document"""
    marks: tuple[np.ndarray, ...] | None = None
    """of conversations: memory maps of uint8 beside the shards, with the bits of `shards.LEARNT` and `REJECTED`"""
    answers: np.ndarray | None = None
    """of conversations: `[documents, 2]`, tokens to predict, and the assistant's turns that are not learnt"""

    pairs: bool = False
    """whether a document is a pair of conversations, the chosen and then the rejected one"""
    notes: Counter = field(default_factory=Counter)
    """what was counted while the files were read, of all of the store (see `readers.NOTES`)"""
    folder: Path | None = None
    """where it lies; None for one that was not opened"""

    @classmethod
    def open(cls, folder: str | Path, tokenizer=None) -> "TokenStore":
        """Raises DataError for a folder that is no store, a damaged one, or one made by another tokenizer."""
        folder = Path(folder)
        meta = read_meta(folder)
        if meta is None:
            raise DataError(f"{folder}: not a token store; make one with jaxllm data prepare")
        if tokenizer is not None and tokenizer.hash != meta["tokenizer"]:
            raise DataError(
                f"{folder}: made by the tokenizer {meta['tokenizer'][:12]}, not by {tokenizer.hash[:12]}; "
                "use that tokenizer, or run jaxllm data prepare with this one"
            )
        dtype = np.dtype(meta["dtype"])
        opened = [open_shard(folder, key, dtype) for key in meta["shards"]]
        lengths = [docs[:, 0] for _, docs in opened]
        return cls(
            name=meta["name"],
            tokenizer_hash=meta["tokenizer"],
            vocab=meta["vocab"],
            fingerprint=digest([meta["tokenizer"], meta["shards"]]),
            shards=tuple(tokens for tokens, _ in opened),
            shard_of=np.repeat(np.arange(len(opened), dtype=np.int32), [len(x) for x in lengths]),
            start_of=np.concatenate([np.cumsum(x) - x for x in lengths]),
            lengths=np.concatenate(lengths),
            bytes=np.concatenate([docs[:, 1] for _, docs in opened]),
            hashes=np.concatenate([docs[:, 2] for _, docs in opened]),
            **(open_answers(folder, meta["shards"], opened) if meta.get("chat") else {}),
            pairs=meta["source"]["format"] == "pairs",
            notes=open_notes(folder, meta["shards"]),
            folder=folder,
        )

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens, begin and end pieces included."""
        return int(self.lengths.sum())

    @cached_property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that is learnt: what bits per byte divides by."""
        return int(self.bytes.sum())

    @property
    def chat(self) -> bool:
        """Whether the documents are conversations, of which only marked tokens are learnt."""
        return self.answers is not None

    @property
    def targets(self) -> np.ndarray:
        """Tokens of each document that are predicted from those before them."""
        return self.lengths - 1 if self.answers is None else self.answers[:, 0]

    @property
    def untrained(self) -> int:
        """Turns of the assistant that are not learnt, since the chat template rewrites them when others follow."""
        return 0 if self.answers is None else int(self.answers[:, 1].sum())

    def learnt(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """bool: which of the tokens `[start, stop)` of document i are learnt."""
        first, stop = int(self.start_of[i]), int(self.lengths[i]) if stop is None else min(stop, int(self.lengths[i]))
        if self.marks is None:
            return np.ones(stop - start, bool)
        return self.marks[self.shard_of[i]][first + start : first + stop] & LEARNT > 0

    def rejected(self, i: int) -> int:
        """Of a pair: the number of the first token of its rejected conversation."""
        first, length = int(self.start_of[i]), int(self.lengths[i])
        return int(np.argmax(self.marks[self.shard_of[i]][first : first + length] & REJECTED > 0))

    def doc(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `[start, stop)` of document i, a view. Raises DataError for an id outside the vocabulary."""
        length = int(self.lengths[i])
        first, stop = int(self.start_of[i]), length if stop is None else min(stop, length)
        tokens = self.shards[self.shard_of[i]][first + start : first + stop]
        if tokens.size and tokens.max() >= self.vocab:
            k = int(np.argmax(tokens >= self.vocab))
            raise DataError(
                f"token store {self.name}: document {i}, position {start + k}: token id {tokens[k]} is outside the "
                f"vocabulary of {self.vocab:,} pieces; the store is damaged: remove it and run jaxllm data prepare"
            )
        return tokens

    def select(self, documents: np.ndarray) -> "TokenStore":
        """A store of some of the documents, in the given order."""
        return replace(
            self,
            fingerprint=digest(
                [self.fingerprint, hashlib.sha256(np.asarray(documents, np.int64).tobytes()).hexdigest()]
            ),
            shard_of=self.shard_of[documents],
            start_of=self.start_of[documents],
            lengths=self.lengths[documents],
            bytes=self.bytes[documents],
            hashes=self.hashes[documents],
            answers=None if self.answers is None else self.answers[documents],
        )

    def split(self, heldout: float) -> tuple["TokenStore", "TokenStore"]:
        """`(rest, held out)`: a fraction of the documents, the same ones whatever the tokenizer (see `heldout_limit`).

        Raises DataError where there are no two documents of different text.
        """
        out = self.hashes < heldout_limit(self.name, self.hashes, heldout)
        rest, held = self.select(np.flatnonzero(~out)), self.select(np.flatnonzero(out))
        return rest, replace(held, name=f"{self.name}-heldout")


def read_meta(folder: Path) -> dict | None:
    """`store.json`, or None where there is none or it is of another version."""
    try:
        meta = json.loads((folder / "store.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DataError(f"{folder / 'store.json'}: damaged; remove the folder and run jaxllm data prepare") from None
    return meta if meta.get("version") == VERSION else None


def write_meta(folder: Path, meta: dict) -> None:
    """Replaces `store.json` at once; then removes shards that it no longer names, and what killed runs left."""
    temp = folder / f"store.{uuid.uuid4().hex[:12]}.tmp"
    with temp.open("w", encoding="utf-8") as file:
        json.dump({"version": VERSION, **meta}, file, indent=1)
        sync(file)
    temp.replace(folder / "store.json")
    for path in [path for ends in ("tokens", "marks", "docs.npy", "notes.json") for path in folder.glob(f"*.{ends}")]:
        if path.name.split(".")[0] not in meta["shards"]:
            path.unlink(missing_ok=True)
    for path in folder.glob("*.tmp"):
        # Another process may be writing this text too, and finish just now; one silent for an hour is gone.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - 3600:
                path.unlink()


def heldout_limit(name: str, hashes: np.ndarray, heldout: float) -> int:
    """Documents whose `text_hash` lies below this number are held out.

    They are about the fraction `heldout` of all, at least one and never all; copies fall on the same side. Raises
    DataError where there are no two documents of different text.
    """
    if hashes.size == 0 or hashes.min() == hashes.max():
        raise DataError(
            f"source {name}: heldout={heldout} needs two documents of different text, and there is "
            f"{'one' if hashes.size else 'none'}; a text file is one document unless the source sets document: "
            "blank_line (or line); or name eval_sources instead"
        )
    return int(np.clip(int(heldout * 2**32), hashes.min() + 1, hashes.max()))
