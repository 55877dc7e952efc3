"""Files to documents of ids: text between begin and end, conversations by their template."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxllm.data.answers import Answers
from jaxllm.data.conversation import Conversation, conversation, pair
from jaxllm.data.readers import documents, located, records
from jaxllm.data.shards import LEARNT, REJECTED, Document, dtype_for, text_hash
from jaxllm.data.sources import TURNS, Source, files
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError


class Encoder:
    """Encodes the files of one source; may be called by several threads."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        if source.format == "prompts":
            raise DataError(f"source {source.name}: a teacher answers the prompts, once jaxllm distill runs")
        self.source, self.tokenizer = source, tokenizer
        self.answers = Answers(tokenizer) if source.format in TURNS else None
        self.dtype = dtype_for(tokenizer.vocab)

    @property
    def chat(self) -> bool:
        """Whether it reads conversations."""
        return self.answers is not None

    @property
    def template(self) -> list[str]:
        """Hash of what the ids of a conversation depend on beside source and tokenizer; none for text."""
        return [self.answers.hash] if self.answers else []

    def __call__(
        self, path: str, start: int = 0, stop: int | None = None, notes: Counter | None = None
    ) -> Iterator[Document]:
        """The documents of one file, or of a range of its bytes. Raises DataError with the file and the place.

        `notes`: where to count what is no error (see `readers.NOTES`).
        """
        made = {"chat": self._chats, "pairs": self._pairs}.get(self.source.format, self._texts)
        notes, count = Counter() if notes is None else notes, 0
        for document in made(path, start, stop, notes):
            count += 1
            yield document
        notes["nothing"] += not count and stop is None

    def _texts(self, path: str, start: int, stop: int | None, notes: Counter) -> Iterator[Document]:
        for text in documents(self.source, path, start, stop, notes):
            data, ids = text.encode("utf-8"), self.tokenizer.encode(text, bos=True, eos=True)
            # Without a begin-of-text token nothing predicts the first one: its bytes are not in what is measured.
            first = len(self.tokenizer.bytes_of[ids[0]]) if self.tokenizer.bos is None and len(ids) else 0
            yield Document(ids, len(data) - first, text_hash(data))

    def _chats(self, path: str, start: int, stop: int | None, notes: Counter) -> Iterator[Document]:
        for offset, chat in _conversations(path, start, stop, notes):
            with located(path, offset):
                ids_N, marks_N, untrained = self.answers(chat)
            notes["nul"] += "\0" in chat.text
            yield self._document(ids_N, marks_N, text_hash(chat.key), untrained)

    def _pairs(self, path: str, start: int, stop: int | None, notes: Counter) -> Iterator[Document]:
        for offset, both in _both(path, start, stop, notes):
            with located(path, offset):
                made = [self.answers(chat) for chat in both]
            notes["nul"] += any("\0" in chat.text for chat in both)
            ids_N = np.concatenate([one.ids_N for one in made])
            marks_N = np.concatenate([made[0].marks_N * LEARNT, made[1].marks_N * LEARNT | REJECTED])
            yield self._document(ids_N, marks_N, text_hash(both[0].key), sum(one.untrained for one in made))

    def _document(self, ids_N, marks_N, hash: int, untrained: int) -> Document:
        said = int(self.answers.sizes[ids_N[marks_N & LEARNT > 0]].sum())
        return Document(ids_N, said, hash, marks_N.astype(np.uint8), untrained)


def texts(source: Source) -> Iterator[tuple[str, int]]:
    """The text of each document of a source, and the hash by which it is held out."""
    for path in files(source):
        if source.format == "pairs":
            for _, both in _both(path):
                yield from ((chat.text, text_hash(both[0].key)) for chat in both)
        elif source.format == "chat":
            yield from ((chat.text, text_hash(chat.key)) for _, chat in _conversations(path))
        else:
            yield from ((text, text_hash(text.encode("utf-8"))) for text in documents(source, path))


def _conversations(path: str, *span) -> Iterator[tuple[int, Conversation]]:
    """`span`: as for `records`."""
    for offset, record in records(path, *span):
        with located(path, offset):
            chat = conversation(record)
        yield offset, chat


def _both(path: str, *span) -> Iterator[tuple[int, tuple[Conversation, Conversation]]]:
    for offset, record in records(path, *span):
        with located(path, offset):
            both = pair(record)
        yield offset, both
