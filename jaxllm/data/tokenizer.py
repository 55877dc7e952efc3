"""The tokenizer: SentencePiece BPE with byte fallback, trained here or loaded, lossless on any text."""

import codecs
import hashlib
import io
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from etils import epath

from jaxllm.data.chat import DEFAULT_TEMPLATE, MARKERS, render
from jaxllm.errors import DataError, SettingsError

#: Characters encoded in one call: SentencePiece slows down on long strings (10.7 MB: 2.3 s in pieces, 8 s whole).
WINDOW = 1 << 16
#: SentencePiece writes a space as U+2581, so a real U+2581 in the text is encoded by its three bytes instead.
BLOCK = "▁"
#: What normalising models change: a missing first space, runs of spaces, newlines, a ligature, a decomposed accent.
PROBE = "a  b\n\n ﬁ e\u0301 "


class Tokenizer:
    """Text to token ids and back. `decode(encode(text)) == text` for every string that UTF-8 can hold, NUL included.

    Ids 0 to 3 are `<pad> <unk> <bos> <eos>`, then the chat markers. These are control pieces: `encode` never gives
    their ids, whatever the text says; only `bos`, `eos` and `render` (the chat template) place them.
    """

    def __init__(self, model: bytes, template: str = DEFAULT_TEMPLATE):
        """`model`: the bytes of a SentencePiece `.model`. Raises DataError if they are not one."""
        self.model, self.template = model, template
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({len(model):,} bytes): {error}") from None
        self.vocab: int = self._sp.vocab_size()
        self.pad, self.unk, self.bos, self.eos = (
            getattr(self._sp, f"{name}_id")() for name in ("pad", "unk", "bos", "eos")
        )
        if min(self.bos, self.eos) < 0:
            raise DataError(
                "this SentencePiece model has no begin or no end piece; train one with jaxllm tokenizer train"
            )
        if self.decode(self._sp.encode(PROBE)) != PROBE:
            raise DataError(
                "this SentencePiece model normalises text (spaces, accents or a prefix) and would lose some"
            )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab: int = 4096,
        out: str | Path | None = None,
        *,
        max_bytes: int = 50_000_000,
    ) -> "Tokenizer":
        """A BPE tokenizer of `vocab` pieces, saved into the folder `out` where given; the same texts give the same one.

        At most `max_bytes` of text are used, spread evenly over all of it. Raises SettingsError where the text
        allows fewer pieces or needs more, DataError where there is no text. BPE: Sennrich et al. 2016; byte
        fallback: Kudo and Richardson 2018 (SentencePiece).
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(_sample(texts, max_bytes)),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab,
                control_symbols=list(MARKERS),
                **TRAINER,
            )
        except RuntimeError as error:
            raise _explain(str(error), vocab) from None
        tokenizer = cls(model.getvalue())
        if out is not None:
            tokenizer.save(out)
        return tokenizer

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a folder written by `save`, or a `.model` file, local or gs://.

        Raises DataError for a missing or damaged one.
        """
        path = epath.Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file}: no such file; make one with jaxllm tokenizer train")
        template = file.parent / "chat_template.jinja"
        try:
            return cls(file.read_bytes(), template.read_text() if template.is_file() else DEFAULT_TEMPLATE)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model` and `chat_template.jinja` into `folder`."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)
        (folder / "chat_template.jinja").write_text(self.template)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the model's bytes, in hex: what stores and checkpoints compare."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        """int32 ids of the text, with begin and end pieces on request. Raises DataError for half a surrogate pair."""
        _size(text)
        parts = [[self.bos]] if bos else []
        for i, part in enumerate(text.split(BLOCK)):
            parts += [self._block] if i else []
            parts += [self._sp.EncodeAsNumpy(window) for window in _windows(part)]
        parts += [[self.eos]] if eos else []
        return np.concatenate(parts, dtype=np.int32) if parts else np.zeros(0, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control pieces are left out, bytes that are not UTF-8 become U+FFFD.

        Raises DataError for an id outside the vocabulary, with its position.
        """
        ids = [int(i) for i in ids]
        bad = next((k for k, i in enumerate(ids) if not 0 <= i < self.vocab), None)
        if bad is not None:
            raise DataError(f"token id {ids[bad]} at position {bad} is outside the vocabulary of {self.vocab:,} pieces")
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", errors="replace")

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> np.ndarray:
        """int32 ids of a conversation under the chat template (see chat.render)."""
        return render(self, messages, add_generation_prompt=add_generation_prompt)

    def id(self, piece: str) -> int:
        """The id of a control piece such as `<|end|>`. Raises DataError where this tokenizer has none."""
        i = self._sp.piece_to_id(piece)
        if not self._sp.is_control(i):
            raise DataError(f"this tokenizer has no control piece {piece}")
        return i

    def piece(self, i: int) -> str:
        """How one token is shown to people: `▁def`, `<0x0A>`, `<bos>`."""
        return self._sp.id_to_piece(int(i))

    @cached_property
    def bytes_of(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id stands for; none for control pieces."""
        return tuple(self._bytes(i) for i in range(self.vocab))

    def _bytes(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        return piece.replace(BLOCK, " ").encode("utf-8")

    @cached_property
    def _block(self) -> list[int]:
        ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in BLOCK.encode("utf-8")]
        if not all(self._sp.is_byte(i) for i in ids):
            raise DataError(
                f"the text holds {BLOCK!r} (U+2581), which this tokenizer, without byte fallback, cannot say"
            )
        return ids


class StreamDecoder:
    """Decodes ids one at a time and gives text only when whole characters are there: never broken UTF-8."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        """The text that one more id completes, often one piece, sometimes nothing."""
        if not 0 <= i < self._tokenizer.vocab:
            raise DataError(f"token id {i} is outside the vocabulary of {self._tokenizer.vocab:,} pieces")
        return self._utf8.decode(self._tokenizer.bytes_of[i])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._utf8.decode(b"", final=True)


#: Lossless: no normalisation, spaces kept as they are, bytes for what no piece covers. Pieces may join letters and
#: punctuation: on Python source with 4,096 pieces 3.8 bytes a token, against 3.5 when Unicode scripts split words.
TRAINER = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_by_unicode_script=False,
    split_digits=True,
    byte_fallback=True,
    character_coverage=0.9995,
    max_sentence_length=1 << 16,
    # The model's bytes hold this number, so that it is part of the hash: the same on every machine.
    num_threads=2,
    minloglevel=2,
    **{f"{name}_id": i for i, name in enumerate(("pad", "unk", "bos", "eos"))},
    **{f"{name}_piece": f"<{name}>" for name in ("pad", "unk", "bos", "eos")},
)


def _explain(message: str, vocab: int) -> Exception:
    if fewer := re.search(r"too high .* value <= (\d+)", message):
        return SettingsError(
            f"vocab={vocab}: this text gives at most {fewer[1]} pieces; set vocab={fewer[1]} or add text"
        )
    if more := re.search(r"(\d+) vs (\d+)", message):
        return SettingsError(f"vocab={vocab}: bytes and characters of this text alone need {more[2]}; set vocab higher")
    if "sentences_.empty" in message:
        return DataError("there is no text to train a tokenizer on")
    return DataError(f"SentencePiece could not train on this text: {message}")


def _windows(text: str, size: int = WINDOW) -> Iterable[str]:
    """Cuts long text where no piece can span: before a space that follows something else."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + 1, start + size)
        while cut > start and text[cut - 1] == " ":
            cut -= 1
        cut = cut if cut > start else start + size
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Windows of text, evenly spread: each time too much is held, every other one is dropped and the stride doubles."""
    kept, held, stride = [], 0, 1
    windows = (w for text in texts for w in _windows(text, 4096))
    for i, window in enumerate(windows):
        if i % stride:
            continue
        kept.append(window)
        held += _size(window)
        if held > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            held = sum(_size(w) for w in kept)
    return kept


def _size(text: str) -> int:
    """UTF-8 bytes of a string. Raises DataError for half a surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} is half a surrogate pair, which UTF-8 cannot hold") from None
