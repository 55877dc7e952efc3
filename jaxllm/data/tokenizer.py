"""The tokenizer: text to ids and back. One interface over SentencePiece models and `tokenizer.json` files."""

import codecs
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from etils import epath

from jaxllm.data import chat, special
from jaxllm.data.chat import DEFAULT_TEMPLATE, MARKERS, Rendered
from jaxllm.data.hf_tokenizer import HuggingFace
from jaxllm.data.sentencepiece_tokenizer import SentencePiece, size
from jaxllm.errors import DataError

#: What normalising models change: a first space, runs of spaces, newlines, a ligature, an accent, U+2581 itself.
PROBE = "a  b\n\n ﬁ e\u0301 ▁ "


class Tokenizer:
    """Text to token ids and back.

    `vocab` counts ids, added tokens included. `pad`, `unk` and `eos` are ids or None; `bos` is the id that published
    software puts before a text, None where it puts none (`before` has all, should it put several). `stop_ids` end a
    turn or a text. `lossless` says that `decode(encode(text)) == text` for every string that UTF-8 can hold
    (tokenizers trained here always are).

    Control tokens (begin, end, chat markers, all that the tokenizer's files call special) never come from text,
    whatever it says; only `bos`, `eos` and `render` (the chat template) place them.
    """

    def __init__(self, files: dict[str, bytes]):
        """`files`: `{name: bytes}` of a tokenizer folder (`special.FILES`). Raises DataError for damaged ones."""
        self.files = files
        self._special = special.read(files)
        self._backend = _backend(files, self._special)
        self.vocab: int = self._backend.vocab
        self.pad, self.unk, self.eos = (self._named(f"{name}_token") for name in ("pad", "unk", "eos"))
        if self.eos is None and self._special.ends:
            self.eos = self._special.ends[0]
        self.before = self._prefix()
        self.bos: int | None = self.before[0] if self.before else None
        self.lossless: bool = self._lossless()
        if self._backend.own and not self.lossless:
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

        Ids 0 to 3 are `<pad> <unk> <bos> <eos>`, then the chat markers. At most `max_bytes` of text are used, spread
        evenly over all of it. Raises SettingsError where the text allows fewer pieces or needs more, DataError where
        there is no text. BPE: Sennrich et al. 2016; byte fallback: Kudo and Richardson 2018 (SentencePiece).
        """
        from jaxllm.data.sentencepiece_train import train

        model = train(texts, vocab, max_bytes)
        tokenizer = cls({"tokenizer.model": model, "chat_template.jinja": DEFAULT_TEMPLATE.encode("utf-8")})
        if out is not None:
            tokenizer.save(out)
        return tokenizer

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a folder (ours or a Hugging Face model's), a `.model` file or a tokenizer.json, local or gs://.

        The files beside it (tokenizer_config.json, chat template, ...) count. Raises DataError for a missing or damaged
        one, with its path.
        """
        path = epath.Path(path)
        folder = path if path.is_dir() else path.parent
        names = [name for name in special.FILES if (folder / name).is_file()]
        if (more := folder / special.MORE_TEMPLATES).is_dir():
            names += [f"{special.MORE_TEMPLATES}/{file.name}" for file in sorted(more.glob("*.jinja"))]
        files = {name: (folder / name).read_bytes() for name in names}
        if path.is_file() and path.name != "tokenizer.json":
            files = {"tokenizer.model": path.read_bytes()} | {
                k: v for k, v in files.items() if k not in ("tokenizer.json", "tokenizer.model")
            }
        if not path.is_file() and not cls.found(path):
            file = path / "tokenizer.model" if path.is_dir() else path
            raise DataError(f"{file}: no such file, and no tokenizer.json; make one with jaxllm tokenizer train")
        try:
            return cls(files)
        except DataError as error:
            inside = str(error).startswith(special.FILES)
            file = path / "tokenizer.model" if path.is_dir() else path
            raise DataError(f"{folder}/{error}" if inside else f"{file}: {error}") from None

    @staticmethod
    def found(folder: str | Path) -> bool:
        """Whether a folder holds a tokenizer."""
        return any((epath.Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    def save(self, folder: str | Path) -> None:
        """Writes the files that this tokenizer came from, byte for byte, into `folder`."""
        for name, data in self.files.items():
            path = epath.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def to_hf(self, folder: str | Path) -> None:
        """Writes a folder that transformers' AutoTokenizer loads, with equal ids: `save`, and what it lacks."""
        from jaxllm.data.sentencepiece_export import hf_files

        Tokenizer(self.files | (hf_files(self) if self._backend.own else {})).save(folder)

    def with_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another chat template."""
        return Tokenizer(self.files | {"chat_template.jinja": template.encode("utf-8")})

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of what decides the ids of a text: what stores and checkpoints compare."""
        main = "tokenizer.model" if isinstance(self._backend, SentencePiece) else "tokenizer.json"
        found = hashlib.sha256(self.files[main])
        beside = self._special.added or self._special.names or self._special.add_bos is not None
        if beside and not self._backend.own:
            found.update(json.dumps([sorted(self.control.items()), self.before, self.eos]).encode("utf-8"))
        return found.hexdigest()

    @property
    def template(self) -> str | None:
        """The default chat template, None for a base model without one."""
        return self._special.templates.get("default", DEFAULT_TEMPLATE if self._backend.own else None)

    def template_for(self, tools: list[dict] | None) -> str | None:
        """The template that renders a conversation with these tools: `tool_use` where there is one of this name."""
        named = "tool_use" if tools and "tool_use" in self._special.templates else "default"
        return self._special.templates.get(named, self.template)

    @property
    def control(self) -> dict[str, int]:
        """`{content: id}` of the tokens that no text becomes."""
        return self._backend.control

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a turn or a text: by generation_config.json, or else by the names that are known."""
        ends = self._special.ends or [i for content, i in self.control.items() if content in special.ENDS]
        return tuple(dict.fromkeys([*([] if self.eos is None else [self.eos]), *ends]))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        """int32 ids of the text; `bos` adds what the tokenizer puts before a text, `eos` the end-of-text id, if any.

        Raises DataError for half a surrogate pair.
        """
        size(text)
        ids = self._backend.encode(text)
        if not bos and (not eos or self.eos is None):
            return ids
        after = [self.eos] if eos and self.eos is not None else []
        return np.concatenate([self.before if bos else [], ids, after], dtype=np.int32, casting="unsafe")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continued: bool = False) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. Control tokens are left out, or shown by name.

        `continued`: the ids go on from others, so that a first space is text and not the tokenizer's own.
        Raises DataError for an id outside the vocabulary, with its position.
        """
        ids = [int(i) for i in ids]
        bad = next((k for k, i in enumerate(ids) if not 0 <= i < self.vocab), None)
        if bad is not None:
            raise DataError(f"token id {ids[bad]} at position {bad} is outside the vocabulary of {self.vocab:,} pieces")
        names = {} if skip_special else {i: content.encode("utf-8") for content, i in self.control.items()}
        pieces = [names[i] if i in names else self.bytes_of[i] for i in ids]
        first = next((k for k, i in enumerate(ids) if i not in self.before), None)
        if self.strips and not continued and first is not None and ids[first] not in names:
            pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", errors="replace")

    def render(self, messages: list[dict], tools: list[dict] | None = None, **options) -> np.ndarray:
        """int32 ids of a conversation under the chat template (options: see `render_masked`)."""
        return self.render_masked(messages, tools, **options).ids_N

    def render_masked(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        *,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables,
    ) -> Rendered:
        """The ids, and which of them the template marks as said by the assistant (`{% generation %}`).

        `messages`: `[{"role": "user", "content": "..."}]`; `tools`: JSON schemas; `variables`: what this template takes
        besides (`enable_thinking=False`). Raises DataError where there is no template or it refuses the conversation.
        """
        source = self.template_for(tools)
        if source is None:
            raise DataError("this tokenizer has no chat template: its model is no chat model, or the file is missing")
        given = dict(tools=tools, documents=documents, add_generation_prompt=add_generation_prompt) | variables
        size(json.dumps([messages, given], ensure_ascii=False, default=str))
        return chat.render(self._backend, source, messages, self.control, given, self.names)

    @cached_property
    def names(self) -> dict[str, str]:
        """`{"bos_token": "<s>", ...}`: what templates call the special tokens."""
        return {name: self.piece(i) for name, i in self._backend.names.items()} | self._special.names

    def id(self, piece: str) -> int:
        """The id of a control token such as `<|end|>`. Raises DataError where this tokenizer has none."""
        if piece not in self.control:
            raise DataError(f"this tokenizer has no control piece {piece}")
        return self.control[piece]

    def piece(self, i: int) -> str:
        """How one token is shown to people: `▁def`, `Ġdef`, `<0x0A>`, `<bos>`."""
        return self._backend.pieces[int(i)]

    @property
    def bytes_of(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for; none for control tokens. `strips` takes a first space of a text away."""
        return self._backend.bytes_of

    @property
    def strips(self) -> bool:
        """Whether encoding puts a space of its own before a text."""
        return self._backend.strips

    def _named(self, name: str) -> int | None:
        content = self._special.names.get(name)
        return self.control.get(content, self._backend.names.get(name))

    def _prefix(self) -> tuple[int, ...]:
        bos, flag = self._named("bos_token"), self._special.add_bos
        if flag is None and isinstance(self._backend, HuggingFace):
            return self._backend.ends()[0] if self._special.add_eos is None else ()
        return (bos,) if bos is not None and flag is not False else ()

    def _lossless(self) -> bool:
        return self.decode(self._backend.encode(PROBE)) == PROBE


class StreamDecoder:
    """Decodes ids one at a time and gives text only when whole characters are there: never broken UTF-8."""

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = False):
        """`continued`: see `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._strips = tokenizer.strips and not continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        """The text that one more id completes, often one piece, sometimes nothing."""
        if not 0 <= i < self._tokenizer.vocab:
            raise DataError(f"token id {i} is outside the vocabulary of {self._tokenizer.vocab:,} pieces")
        piece = self._tokenizer.bytes_of[i]
        if self._strips and i not in self._tokenizer.before:
            piece, self._strips = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._utf8.decode(b"", final=True)


def _backend(files: dict[str, bytes], settings: special.Special):
    """tokenizer.json where there is one, as in transformers, except beside a model that was trained here."""
    model = files.get("tokenizer.model", b"")
    if "tokenizer.json" in files and not all(marker.encode("utf-8") in model for marker in MARKERS):
        return HuggingFace(special.parse(files, "tokenizer.json"), settings)
    return SentencePiece(model, settings)
