"""Hugging Face `tokenizer.json` files, run by the `tokenizers` library."""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import tokenizers

from jaxllm.data.special import Added, Special, added
from jaxllm.errors import DataError

#: Characters encoded in one call, where the text can be cut: a call holds about 180 bytes for each.
WINDOW = 1 << 20


class HuggingFace:
    """A `tokenizer.json`, with what tokenizer_config.json adds.

    `control`: `{content: id}` of the special tokens. The library finds such a token wherever its content stands in a
    text, so that here it knows them by secret names, which no text can hold; the template's own control ids get the
    secret names. Everything else (spaces that a token swallows, prefixes, other added tokens) is as published.
    """

    own = False

    def __init__(self, raw: dict, special: Special):
        """`raw`: the parsed file. Raises DataError for a damaged file, or one of a kind that is not supported."""
        self._kind, self._replaces = _decoder(raw)
        table = _added_tokens(raw, special)
        control = [token for token in table if token.special]
        self._secret = {token.content: f"\ufdd0{secrets.token_hex(16)}\ufdd1" for token in control}
        self._rust = _build(_renamed(raw, table, self._secret))
        self.control = {t.content: self._id(self._secret[t.content], t) for t in control}
        self._plain = {t.content: self._id(t.content, t) for t in table if not t.special}
        ids = {**raw["model"]["vocab"], **self._plain, **self.control}
        self.vocab: int = max(ids.values()) + 1
        if self.vocab > 2 * len(ids) + (1 << 16):
            raise DataError(f"tokenizer.json: ids reach {self.vocab:,}, with {len(ids):,} tokens")
        self._ids = ids
        self.strips = _strips(raw)
        self.names: dict[str, int] = {}
        self._names_by_id = {i: self._secret[content] for content, i in self.control.items()}
        self._cuttable = self._kind == "bytes" and not any(
            t.lstrip or t.rstrip or " " in t.content for t in table if not t.special
        )

    def _id(self, name: str, token: Added) -> int:
        i = self._rust.token_to_id(name)
        if token.id is not None and i != token.id:
            raise DataError(f"tokenizer.json: the added token {token.content!r} has the id {token.id}, and gets {i}")
        return i

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text that stands alone."""
        return self.encode_parts([text])[0]

    def encode_parts(self, parts: Sequence[str | int], spans: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """int32 ids of text with control ids between it; with `spans`, `[ids, 2]` of characters that each id covers.

        A control id counts as one character.
        """
        text = "".join(self._names_by_id[part] if isinstance(part, int) else part for part in parts)
        if not spans:
            ids = [np.asarray(self._call(window).ids, np.int32) for window in self._windows(text)]
            return (np.concatenate(ids) if ids else np.zeros(0, np.int32)), None
        widths = [1 / len(self._names_by_id[p]) if isinstance(p, int) else 1.0 for p in parts]
        lengths = [len(self._names_by_id[p]) if isinstance(p, int) else len(p) for p in parts]
        at = np.rint(np.concatenate([[0], np.cumsum(np.repeat(widths, lengths))])).astype(int)
        encoding = self._call(text)
        return np.asarray(encoding.ids, np.int32), at[np.asarray(encoding.offsets, int).reshape(-1, 2)]

    def _call(self, text: str):
        try:
            return self._rust.encode(text, add_special_tokens=False)
        except Exception as error:
            raise DataError(f"tokenizer.json: cannot encode this text: {error}") from None

    def _windows(self, text: str) -> Iterable[str]:
        """Cuts long text before a space with a letter behind it and none before, where every pre-tokenizer cuts."""
        start = 0
        while self._cuttable and len(text) - start > WINDOW:
            cuts = [
                m.start()
                for m in re.finditer(r"(?<=[a-z.,;:]) (?=[A-Za-z])", text[start + WINDOW - 4096 : start + WINDOW])
            ]
            if not cuts:
                break
            cut = start + WINDOW - 4096 + cuts[-1]
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]

    @cached_property
    def bytes_of(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for; none for control tokens."""
        table = [b""] * self.vocab
        for piece, i in self._ids.items():
            table[i] = self._bytes(piece)
        for content, i in self._plain.items():
            table[i] = content.encode("utf-8")
        for i in self.control.values():
            table[i] = b""
        return tuple(table)

    def _bytes(self, piece: str) -> bytes:
        if self._kind == "bytes":
            try:
                return bytes(ALPHABET[c] for c in piece)
            except KeyError:
                return piece.encode("utf-8")
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[1:-1], 16)])
        return (piece.replace("▁", " ") if self._replaces else piece).encode("utf-8")

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """How each token is shown to people: `Ġdef`, `▁def`, `<0x0A>`, `<|im_end|>`."""
        table = [""] * self.vocab
        for piece, i in self._ids.items():
            table[i] = piece
        return tuple(table)

    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's post-processor puts before and after a text."""
        alone = self._rust.encode("a", add_special_tokens=False).ids
        whole = self._rust.encode("a", add_special_tokens=True).ids
        at = next((k for k in range(len(whole)) if whole[k : k + len(alone)] == alone), 0)
        return tuple(whole[:at]), tuple(whole[at + len(alone) :])


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(rest)}


ALPHABET = _alphabet()


def _parts(section: dict | None, key: str) -> list[dict]:
    """A pipeline section as a flat list of its steps."""
    if section is None:
        return []
    if section.get("type") == "Sequence":
        return [step for part in section[key] for step in _parts(part, key)]
    return [section]


def _decoder(raw: dict) -> tuple[str, bool]:
    """`("bytes", False)` for byte-level models, `("text", replaces U+2581)` for those that follow SentencePiece.

    Raises DataError for other kinds, and for a file without the parts that every tokenizer.json has.
    """
    try:
        kind, vocab = raw["model"].get("type", "BPE"), raw["model"]["vocab"]
        steps = _parts(raw.get("decoder"), "decoders")
        types = {str(step["type"]) for step in steps}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"tokenizer.json: not a tokenizer ({type(error).__name__}: {error})") from None
    if kind != "BPE" or not isinstance(vocab, dict) or not vocab:
        raise DataError(f"tokenizer.json: a model of the type {kind} is not supported; only BPE is")
    if not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in vocab.values()):
        raise DataError("tokenizer.json: the vocabulary holds something else than ids")
    if raw["model"].get("dropout"):
        raise DataError(f"tokenizer.json: dropout {raw['model']['dropout']} makes ids random; set it to null")
    if types == {"ByteLevel"}:
        return "bytes", False
    if types and types <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return "text", bool(types & {"Replace", "Metaspace"})
    raise DataError(
        f"tokenizer.json: the decoder {sorted(types) or None} is not supported; ByteLevel and ByteFallback are"
    )


def _strips(raw: dict) -> bool:
    """Whether a text begins with a space of the tokenizer's own, which decoding takes away."""
    steps = _parts(raw["decoder"], "decoders")
    scheme = [s.get("prepend_scheme", "always") for s in steps if s["type"] == "Metaspace"]
    return any(s["type"] == "Strip" and s.get("start") for s in steps) or any(s != "never" for s in scheme)


def _added_tokens(raw: dict, special: Special) -> list[Added]:
    """The added tokens of both files, in the order of their ids; tokenizer_config.json wins, as in transformers."""
    table = {token.content: token for token in map(added, _list(raw.get("added_tokens")))}
    for content, token in special.added.items():
        old = table.get(content)
        if old is not None and None not in (old.id, token.id) and old.id != token.id:
            raise DataError(
                f"{content!r} has the id {old.id} in tokenizer.json and {token.id} in tokenizer_config.json"
            )
        table[content] = token
    for content in special.control:
        if content in table or content in raw["model"]["vocab"]:
            old = table.get(content) or Added(content, raw["model"]["vocab"][content])
            table[content] = Added(**vars(old) | {"special": True})
    last = max([*raw["model"]["vocab"].values(), *(t.id for t in table.values() if t.id is not None)]) + 1
    return sorted(table.values(), key=lambda token: last if token.id is None else token.id)


def _list(value) -> list:
    if not isinstance(value or [], list):
        raise DataError(f"tokenizer.json: {value!r:.60} is not a list")
    return value or []


def _renamed(raw: dict, table: list[Added], secret: dict[str, str]) -> dict:
    """The file with secret names for control tokens, no padding and no truncation."""
    model = dict(raw["model"])
    if any(content in model["vocab"] for content in secret):
        model["vocab"] = {secret.get(piece, piece): i for piece, i in model["vocab"].items()}
        model["merges"] = [m for m in _list(model.get("merges")) if _joined(m) not in secret]
    tokens = [vars(token) | {"content": secret.get(token.content, token.content)} for token in table]
    return {**raw, "model": model, "added_tokens": tokens, "padding": None, "truncation": None}


def _joined(merge) -> str:
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"tokenizer.json: {merge!r:.60} is not a merge of two pieces")
    return "".join(parts)


def _build(raw: dict) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(raw))
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DataError(f"tokenizer.json: {error}") from None
