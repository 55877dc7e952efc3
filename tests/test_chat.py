"""The terminal chat, driven by scripted lines: what it shows, what it keeps, and what an interrupt stops."""

import json

import pytest
import tiny

from jaxllm import chat as module
from jaxllm.chat import Chat, read_message, run
from jaxllm.data.chat import end_of_turn
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.generate.text import stream_text

TEXT = "the quick brown foxes jump over lazy dogs while five wizards vex judges and pack my box\n" * 20
CONTEXT = 64


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer.train([TEXT], vocab=300)
    model = tiny.one_device(tiny.config(vocab=tokenizer.vocab, layers=1, context=CONTEXT))
    return model, tiny.weights(model), tokenizer


@pytest.fixture
def chat(parts):
    return Chat(*parts, max_tokens=8, seed=1, temperature=1.5, banned_ids=[parts[2].eos, parts[2].id("<|end|>")])


class Terminal:
    """Gives the lines, then Ctrl-D; an exception among the lines is raised in place of one."""

    def __init__(self, *lines):
        self.lines, self.prompts, self.pieces, self.interrupt_after = list(lines), [], [], None

    def read(self, prompt):
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, piece):
        self.pieces.append(piece)
        if self.interrupt_after is not None and len(self.pieces) == self.interrupt_after:
            raise KeyboardInterrupt

    def talk(self, chat):
        run(chat, read=self.read, write=self.write)
        return "".join(self.pieces)


def roles(chat):
    return [message["role"] for message in chat.messages]


def test_answers_are_streamed_and_kept(chat, parts, capsys):
    terminal = Terminal("the quick", "", "   ", "wizards")
    shown = terminal.talk(chat)
    assert roles(chat) == ["user", "assistant"] * 2 and [m["content"] for m in chat.messages[::2]] == [
        "the quick",
        "wizards",
    ]
    answers = [message["content"] for message in chat.messages[1::2]]
    assert shown == "".join(answer + "\n" for answer in answers) and len(terminal.pieces) > 6
    out = capsys.readouterr().out
    assert "/help" in out and "cut at 8 tokens" in out and out.endswith("good-bye\n")
    ids = parts[2].render(chat.messages[:3], add_generation_prompt=True).tolist()
    again = "".join(stream_text(*parts, ids, **{"max_tokens": 8} | chat.options))
    assert again == answers[1], "the second answer is that of the whole conversation under the template"


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, capsys):
    terminal = Terminal("the quick", "wizards")
    terminal.interrupt_after = 2
    terminal.talk(chat)
    assert roles(chat) == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == "".join(terminal.pieces[:2]) and chat.messages[3]["content"]
    assert "[stopped]" in capsys.readouterr().out


def test_ctrl_c_while_the_model_works(chat, monkeypatch, capsys):
    """The interrupt comes from within the stream: before the first piece the message is not kept, later it is."""

    class Interrupted:
        def __init__(self, *pieces):
            self.pieces = list(pieces)

        def __iter__(self):
            yield from self.pieces
            raise KeyboardInterrupt

    streams = [Interrupted(), Interrupted("some ", "text")]
    monkeypatch.setattr(module, "stream_text", lambda *args, **options: streams.pop(0))
    Terminal("one", "two", KeyboardInterrupt()).talk(chat)
    assert chat.messages == [{"role": "user", "content": "two"}, {"role": "assistant", "content": "some text"}]
    out = capsys.readouterr().out
    assert out.count("[stopped]") == 2 and "your message was not kept" in out and out.endswith("good-bye\n")


def test_commands(chat, tmp_path, capsys):
    file = tmp_path / "talk.json"
    lines = ("/system be brief", "the quick", "/system", f"/save {file}", f"/save {file}", "/save", "/save /no/such/x")
    Terminal(*lines, "/rest", "/reset now", "/help", "/reset", "/exit", "never read").talk(chat)
    assert chat.messages == [{"role": "system", "content": "be brief"}] and chat.system == "be brief"
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    out = capsys.readouterr().out
    for text in (
        "system message: be brief\nsystem message: be brief",
        f"3 messages in {file}",
        f"error: {file} is there already",
        "error: /save needs the name of a file",
        "error: /no/such/x cannot be written: No such file",
        "error: unknown command /rest; did you mean /reset?",
        "error: /reset takes nothing after it, and got 'now'",
        "Ctrl-C stops an answer",
        "the conversation starts over, with its system message",
    ):
        assert text in out.replace("[cut at 8 tokens: --max-tokens]\n", "")
    assert "good-bye" not in out


def test_messages_of_several_lines():
    terminal = Terminal("one\\", "two\\", "three", '"""', "first\\", "", "/help", ' """', "last")
    texts = [read_message(terminal.read) for _ in range(3)]
    assert texts == ["one\ntwo\nthree", "first\\\n\n/help", "last"]
    assert terminal.prompts == ["> ", ". ", ". ", "> ", ". ", ". ", ". ", ". ", "> "]


def test_the_oldest_turns_are_left_out_when_the_context_is_full(chat, parts, capsys):
    chat.system = "be brief"
    prompts = []
    whole = module.stream_text
    module.stream_text = lambda *args, **options: prompts.append(args[3]) or whole(*args, **options)
    try:
        Terminal(*["the quick brown foxes jump"] * 5).talk(chat)
    finally:
        module.stream_text = whole
    assert len(chat.messages) == 11 and max(map(len, prompts)) + chat.max_tokens <= CONTEXT
    left_out = chat.unseen
    assert left_out >= 4
    seen = chat.messages[:1] + chat.messages[1 + left_out : 10]
    assert prompts[-1] == parts[2].render(seen, add_generation_prompt=True).tolist()
    out = capsys.readouterr().out
    assert f"the context of {CONTEXT} tokens is full: the first turn is left out" in out
    assert f"the first {left_out // 2} turns are left out" in out
    chat.reset()
    assert chat.unseen == 0


def test_a_message_without_room_is_refused_with_both_lengths_and_not_kept(chat, capsys):
    Terminal("wizards", TEXT[:600], "the quick").talk(chat)
    assert [m["content"] for m in chat.messages[::2]] == ["wizards", "the quick"] and len(chat.messages) == 4
    out = capsys.readouterr().out
    assert "error: the message has" in out and f"the model's context of {CONTEXT}" in out
    with pytest.raises(SettingsError, match="max_tokens=64 fills the model's context of 64"):
        Chat(chat.model, chat.params, chat.tokenizer, max_tokens=CONTEXT)


def test_the_end_of_a_turn_is_read_off_the_template(parts):
    tokenizer = parts[2]
    assert end_of_turn(tokenizer) == tokenizer.id("<|end|>")
    assert Chat(*parts).options["stop_ids"] == sorted({tokenizer.id("<|end|>"), tokenizer.eos})
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer.with_template(plain)) is None
    last = "{% for m in messages %}{{ m.role }}: {{ m.content }} \n<|end|>{% endfor %}"
    assert end_of_turn(tokenizer.with_template(last)) == tokenizer.id("<|end|>")


def test_an_answer_ends_at_the_end_of_a_turn(parts, capsys):
    """A bias makes the end certain: an empty answer is not kept, and nothing is shown of the marker."""
    end = parts[2].id("<|end|>")
    chat = Chat(*parts, max_tokens=8, temperature=0, logit_bias={end: 1e6})
    assert Terminal("wizards").talk(chat) == "\n" and chat.messages == []
    chat = Chat(*parts, max_tokens=8, temperature=0, logit_bias={end: 1e6}, min_tokens=3)
    Terminal("wizards").talk(chat)
    assert len(chat.messages) == 2 and "<|end|>" not in chat.messages[1]["content"]
    assert "cut at" not in capsys.readouterr().out
