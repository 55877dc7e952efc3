"""A conversation in the terminal: history that fits the context, commands, streamed answers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from jaxllm.data.chat import end_of_turn
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError, UserError, nearest
from jaxllm.generate.text import stream_text
from jaxllm.model.build import Model, Params

HELP = '''/system TEXT  set the system message (without TEXT: show it)
/reset        forget the conversation
/save FILE    write the messages as JSON
/help         this
/exit         leave (as Ctrl-D does)
A line that ends with \\ goes on in the next one; a line with only """ begins and ends a block of lines.
Ctrl-C stops an answer, and leaves at the prompt.'''
COMMANDS = ("/system", "/reset", "/save", "/help", "/exit")


class Chat:
    """A conversation with a model: `answer` adds a turn to `messages`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        **options,
    ):
        """`max_tokens`: of one answer; default: a quarter of the context, at most 1,024. `options`: see `stream_text`.

        Raises SettingsError where an answer would fill the context, DataError for a tokenizer without chat template.
        """
        self.model, self.params, self.tokenizer, self.options = model, params, tokenizer, options
        self.max_tokens = max_tokens if max_tokens is not None else min(1024, max(1, model.config.context // 4))
        if self.max_tokens >= model.config.context:
            raise SettingsError(
                f"max_tokens={self.max_tokens} fills the model's context of {model.config.context}; set fewer"
            )
        self.messages = [{"role": "system", "content": system}] if system else []
        self.unseen = 0
        """Messages that no longer fit into the context, from the oldest on (the system message always fits)."""
        ends = {end_of_turn(tokenizer), *tokenizer.stop_ids} - {None}
        self.options = {"stop_ids": sorted(ends), "chunk": 2, "continued": False} | options

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages, self.unseen = self.messages[: self.system is not None], 0

    def answer(self, text: str, notice: Callable[[str], None] = print) -> Iterator[str]:
        """The answer to `text`, piece by piece. What was said until it is closed stays in the history.

        Calls `notice` when turns are left out for lack of room and when an answer is cut or empty. Raises SettingsError
        for a message that has no room even alone; that message, as any without an answer, is not kept.
        """
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            prompt = self._prompt(notice)
            options = {"max_tokens": self.max_tokens} | self.options
            stream = stream_text(self.model, self.params, self.tokenizer, prompt, **options)
            for piece in stream:
                said += piece
                yield piece
            if stream.result().finish == "length":
                notice(f"[cut at {self.max_tokens} tokens: --max-tokens]")
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
                notice("[no answer, so your message was not kept]")

    def _prompt(self, notice: Callable[[str], None]) -> list[int]:
        """The ids of as many of the last turns as leave room for an answer."""
        first, context = self.system is not None, self.model.config.context
        for unseen in range(self.unseen, len(self.messages) - first, 2):
            seen = self.messages[:first] + self.messages[first + unseen :]
            ids = self.tokenizer.render(seen, add_generation_prompt=True).tolist()
            if len(ids) + self.max_tokens <= context:
                break
        else:
            raise SettingsError(
                f"the message has {len(ids)} tokens with the chat template, and with an answer of {self.max_tokens} it "
                f"passes the model's context of {context}; shorten it, or set fewer --max-tokens"
            )
        if unseen > self.unseen:
            turns = unseen // 2
            which = "the first turn is" if turns == 1 else f"the first {turns} turns are"
            notice(f"[the context of {context} tokens is full: {which} left out from here on]")
            self.unseen = unseen
        return ids


def run(chat: Chat, *, read: Callable[[str], str] | None = None, write: Callable[[str], None] | None = None) -> None:
    """Talks until the user leaves. `read` gives a line for a prompt (default: `input`), `write` takes what is said."""
    with contextlib.suppress(ImportError):  # lines can be edited and found again where the platform has it
        import readline  # noqa: F401
    console = Console(highlight=False, soft_wrap=True)
    read, write = read or input, write or (lambda piece: print(piece, end="", flush=True))

    def notice(text: str) -> None:
        console.print(text, style="dim", markup=False)

    notice(f"context of {chat.model.config.context:,} tokens; /help shows the commands, Ctrl-D leaves")
    while True:
        try:
            text = read_message(read)
        except (EOFError, KeyboardInterrupt):
            notice("\ngood-bye")
            return
        if text.strip() == "/exit":
            return
        try:
            if text.startswith("/"):
                notice(command(chat, text))
            elif text.strip():
                _reply(chat, text, write, notice)
        except UserError as error:
            notice(f"error: {error}")


def _reply(chat: Chat, text: str, write: Callable[[str], None], notice: Callable[[str], None]) -> None:
    """Streams an answer; an interrupt ends it and nothing else."""
    later = []
    try:
        with contextlib.closing(chat.answer(text, later.append)) as pieces:
            for piece in pieces:
                write(piece)
    except KeyboardInterrupt:
        later.append("[stopped]")
    finally:
        write("\n")
        for line in later:
            notice(line)


def read_message(read: Callable[[str], str]) -> str:
    """One message: a line, lines that end with a backslash and the next one, or lines between two of three quotes."""
    lines = [read("> ")]
    if lines[0].strip() == '"""':
        while (line := read(". ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines[1:])
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)


def command(chat: Chat, text: str) -> str:
    """Does what a line that begins with a slash says; the text to show. Raises UserError for one that is unknown."""
    name, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if name == "/system":
        chat.system = rest or chat.system
        return f"system message: {chat.system}" if chat.system else "no system message"
    if name == "/save":
        return save(chat, rest)
    if rest and name in COMMANDS:
        raise SettingsError(f"{name} takes nothing after it, and got {rest!r}")
    if name == "/reset":
        chat.reset()
        return "the conversation starts over" + (", with its system message" if chat.system else "")
    if name == "/help":
        return HELP
    raise SettingsError(f"unknown command {name}{nearest(name, COMMANDS)}; a message may begin with a space")


def save(chat: Chat, name: str) -> str:
    """Writes the messages into a new JSON file. Raises SettingsError where that cannot be."""
    if not name:
        raise SettingsError("/save needs the name of a file: /save talk.json")
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(chat.messages, file, ensure_ascii=False, indent=1)
    except FileExistsError:
        raise SettingsError(f"{path} is there already; choose another name") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    return f"{len(chat.messages)} messages in {path}"
