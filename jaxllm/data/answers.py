"""Which tokens of a conversation the assistant says: by the template's marks, or by comparing what it renders."""

import re
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxllm.data.chat import REASONING
from jaxllm.data.conversation import Conversation
from jaxllm.data.shards import digest
from jaxllm.data.template import clock
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError

#: Part of a store's name: a change of what is marked makes new stores.
VERSION = 1
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
#: What `strftime_now` says here, so that ids do not depend on the day they are made; Llama 3's templates name it too.
DAY = datetime(2024, 7, 26)
#: Fields that a template must know where a conversation has them, since it would leave them out without a word.
SHOWN = {"tool_calls": ("tool_calls",)} | {name: REASONING for name in REASONING}


class Marked(NamedTuple):
    """`ids_N` int32; `marks_N` bool, true where the assistant says the token, the end of its turn included."""

    ids_N: np.ndarray
    marks_N: np.ndarray
    untrained: int = 0
    """the assistant's turns without marks, since the template rewrites them when others follow"""


class Answers:
    """Renders conversations with a tokenizer's chat template and marks what the assistant says.

    A template with `{% generation %}` marks says it itself. Without, a turn is what the conversation up to and with it
    has behind the conversation before it with the prompt for an answer (`add_generation_prompt`), up to the token that
    ends the turn. Both are compared byte for byte with the whole conversation: where a template writes a turn anew when
    others follow (reasoning is cut out of earlier turns, say), only the turns that stand as they were said are marked.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @property
    def hash(self) -> str:
        """Of all that ids and marks depend on beside the tokenizer's own hash."""
        return digest([VERSION, self.tokenizer.template_for(None), self.tokenizer.template_for([{}])])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of text of each id."""
        return np.array([len(piece) for piece in self.tokenizer.bytes_of])

    @property
    def by_marks(self) -> bool:
        """Whether the template marks the assistant's words itself."""
        return bool(MARKS.search(self.tokenizer.template or ""))

    def __call__(self, chat: Conversation) -> Marked:
        """Ids and marks. Raises DataError for a conversation that the template cannot show, or not as it is said."""
        source = self.tokenizer.template_for(chat.tools)
        if source is None:
            return self._without_template(chat)
        _check_shown(chat, source)
        token = clock.set(DAY)
        try:
            ids_N, marks_N = self.tokenizer.render_masked(chat.messages, chat.tools)
            whole, untrained = Whole(ids_N, self._bytes), 0
            if not MARKS.search(source):
                marks_N, untrained = self._aligned(chat, whole)
            elif any(message["role"] == "assistant" for message in chat.messages[: chat.first]):
                marks_N = marks_N & ~whole.touches(0, len(self._prompt(chat, chat.first, whole.text)))
        finally:
            clock.reset(token)
        if not marks_N[1:].any():
            raise DataError("the chat template leaves no token of the assistant's to learn")
        return Marked(ids_N, marks_N, untrained)

    def prompt(self, chat: Conversation) -> list[int]:
        """Ids of a conversation that waits for an answer. Raises DataError as a call does."""
        source = self.tokenizer.template_for(chat.tools)
        if source is not None:
            _check_shown(chat, source)
            token = clock.set(DAY)
            try:
                return self.tokenizer.render(chat.messages, chat.tools, add_generation_prompt=True).tolist()
            finally:
                clock.reset(token)
        said = Conversation([*chat.messages, {"role": "assistant", "content": ""}], chat.tools, plain=chat.plain)
        return self._without_template(said).ids_N[:-1].tolist()

    def _without_template(self, chat: Conversation) -> Marked:
        """Begin, prompt, completion, end. Raises DataError for what has roles."""
        if not chat.plain or chat.tools:
            raise DataError(
                "the tokenizer has no chat template, which messages and instructions need; put a chat_template.jinja "
                "into its folder, take an instruct model's tokenizer, or write prompt and completion as two strings"
            )
        if self.tokenizer.eos is None:
            raise DataError(
                "the tokenizer has no end-of-text token, which a completion ends with; give a chat template"
            )
        ids_N, marks_N = self._plain.render_masked(chat.messages)
        before, end = self.tokenizer.before, self.tokenizer.eos
        ids_N = np.concatenate([before, ids_N, [end]], dtype=np.int32, casting="unsafe")
        return Marked(ids_N, np.concatenate([np.zeros(len(before), bool), marks_N, [True]]))

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer with a template that has no roles."""
        return self.tokenizer.with_template(
            "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}"
        )

    def _aligned(self, chat: Conversation, whole: "Whole") -> tuple[np.ndarray, int]:
        marks_N, untrained = np.zeros(len(whole.ids_N), bool), 0
        for k, message in enumerate(chat.messages):
            if k < chat.first or message["role"] != "assistant":
                continue
            turn = whole.text if k + 1 == len(chat.messages) else self._render(chat, k + 1)
            start = len(self._prompt(chat, k, turn))
            stop = start + self._end(turn[start:])
            if whole.text.startswith(turn[:stop]):
                marks_N |= whole.touches(start, stop)
            else:
                untrained += 1
        return marks_N, untrained

    def _prompt(self, chat: Conversation, k: int, turn: bytes) -> bytes:
        """What is rendered before what message k says, which `turn` has to begin with."""
        if k == 0:
            raise DataError(
                "it begins with the assistant, and the chat template does not mark its turns; begin with the user or "
                "the system, or put {% generation %} marks into the template"
            )
        prompt = self._render(chat, k, add_generation_prompt=chat.messages[k]["role"] == "assistant")
        if not turn.startswith(prompt):
            raise DataError(
                f"message {k + 1}: the chat template does not begin the turn with its own prompt for an answer, so "
                "it is not known which tokens are said; put {% generation %} marks into the template"
            )
        return prompt

    def _render(self, chat: Conversation, count: int, **options) -> bytes:
        return Whole(self.tokenizer.render(chat.messages[:count], chat.tools, **options), self._bytes).text

    def _end(self, turn: bytes) -> int:
        """Behind the token that ends the turn, where only white space follows it; else the end of all."""
        ends = [self._bytes[i] for i in self.tokenizer.stop_ids if self._bytes[i]]
        last = max((at + len(end) for end in ends if (at := turn.rfind(end)) >= 0), default=len(turn))
        return len(turn) if turn[last:].strip() else last

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What each id stands for; control tokens have a name that no text can hold, since UTF-8 has neither byte."""
        table = list(self.tokenizer.bytes_of)
        for i in self.tokenizer.control.values():
            table[i] = b"\xfe%d\xff" % i
        return table


class Whole:
    """Ids with the bytes that they stand for."""

    def __init__(self, ids_N: np.ndarray, table: list[bytes]):
        pieces = [table[i] for i in ids_N]
        self.ids_N, self.text = ids_N, b"".join(pieces)
        self.ends_N = np.cumsum([len(piece) for piece in pieces])
        self.starts_N = self.ends_N - [len(piece) for piece in pieces]

    def touches(self, start: int, stop: int) -> np.ndarray:
        """Which tokens hold some of the bytes `[start, stop)`."""
        return (self.starts_N < stop) & (self.ends_N > start)


def _check_shown(chat: Conversation, source: str) -> None:
    if chat.tools and "tools" not in source:
        raise DataError("it has tools, and the chat template shows none; leave them out, or use a template that does")
    for k, message in enumerate(chat.messages, 1):
        for key, names in SHOWN.items():
            if message.get(key) and not any(name in source for name in names):
                raise DataError(
                    f"message {k} has {key}, and the chat template shows none; leave them out, or use a template "
                    "that does"
                )
