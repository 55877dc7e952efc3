"""The three forms of a conversation, and what is said of lines that are none."""

import json

import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.conversation import conversation
from jaxllm.data.prepare import prepare, train_tokenizer
from jaxllm.data.sources import Source
from jaxllm.errors import DataError

pytestmark = pytest.mark.fast
USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
GOOD = json.dumps({"messages": [USER, SAID]})


@pytest.mark.parametrize(
    "record, messages, first",
    [
        ({"messages": [USER, SAID], "prompt": "unused beside messages"}, [USER, SAID], 0),
        ({"messages": None, "prompt": "hi", "completion": "yo", "id": 7}, [USER, SAID], 1),
        ({"prompt": [SAID, USER], "completion": [SAID]}, [SAID, USER, SAID], 2),
        ({"instruction": "hi", "input": "", "output": "yo"}, [USER, SAID], 0),
        ({"instruction": "hi", "output": "yo", "system": None}, [USER, SAID], 0),
        (
            {"instruction": "hi", "input": "you", "output": "yo", "system": "be brief"},
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi\n\nyou"}, SAID],
            0,
        ),
    ],
)
def test_forms(record, messages, first):
    found = conversation(record)
    assert (found.messages, found.first, found.tools) == (messages, first, None)
    assert found.plain == isinstance(record.get("prompt"), str) * ("completion" in record)
    assert found.text == "\n".join(m["content"] for m in messages)


def test_tools_and_their_calls_stay_as_they_are():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    record = {"messages": [USER, call, {"role": "tool", "content": "2"}, SAID], "tools": [{"name": "f"}]}
    found = conversation(record)
    assert found.messages == record["messages"] and found.tools == record["tools"]
    assert conversation({**record, "tools": []}).tools is None


@pytest.mark.parametrize(
    "record, words",
    [
        ([USER, SAID], "in an object, found a list"),
        ({"text": "x"}, "expected messages, or prompt and completion, or instruction and output; found the keys text"),
        ({"mesages": []}, "found the keys mesages; did you mean messages?"),
        ({"prompt": "x", "completoin": "y"}, "prompt stands there without completion .* did you mean completoin"),
        ({"prompt": "x", "completion": [SAID]}, "prompt and completion hold a str and a list, expected two strings or"),
        ({"instruction": "x", "output": 3}, "output holds a int, expected a string"),
        ({"messages": "hi"}, "messages holds a str, expected a list of messages"),
        ({"messages": [USER, "yo"]}, "messages: message 2 holds a str, expected an object with a role"),
        ({"messages": [USER, {"content": "yo"}]}, "message 2: role holds nothing, expected a string"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, SAID]}, "message 1: content holds a list, expected"),
        ({"messages": [USER, {**SAID, "tool_calls": {}}]}, "message 2: tool_calls holds a dict, expected a list"),
        ({"messages": [USER]}, r"no turn of the assistant to learn from \(roles: user\)"),
        ({"messages": []}, "no turn of the assistant"),
        ({"prompt": [USER, SAID], "completion": [USER]}, r"no turn .* \(roles: user\)"),
        ({"messages": [USER, SAID], "tools": "f"}, "tools holds a str, expected a list of JSON schemas"),
    ],
)
def test_what_is_no_conversation(record, words):
    with pytest.raises(DataError, match=words):
        conversation(record)


@pytest.mark.parametrize(
    "line, words",
    [
        (
            json.dumps({"messages": [USER, {**SAID, "role": "asistant"}, SAID]}),
            "message 2: unknown role 'asistant'; did",
        ),
        (json.dumps({"messages": [{"role": "user"}, SAID]}), "message 1, of the role user, has no content"),
        (GOOD[:-3], "byte 1[0-9]+( of the decompressed text)?: not JSON"),
        ("[" * 10_000, "nested too deep"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "surrogate"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_errors_name_the_file_and_the_line(tmp_path, tokenizer, line, words, end):
    import gzip

    data = "\n".join([GOOD, "", line, GOOD]).encode()
    path = tmp_path / f"chats.jsonl{end}"
    path.write_bytes(gzip.compress(data) if end else data)
    source = Source(name="chats", path=str(path), format="chat")
    with pytest.raises(DataError, match=f"chats.jsonl{end}: line 3[:,].*{words}"):
        prepare(DataConfig(sources=(source,), cache=str(tmp_path / "c")), tokenizer, say=lambda line: None)
    assert not list((tmp_path / "c").glob("*/*.docs.npy"))


def test_files_that_hold_no_lines(tmp_path, tokenizer):
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).write_bytes(b"x")
        config = DataConfig(sources=(Source(name="c", path=str(tmp_path / name), format="chat"),))
        with pytest.raises(DataError, match=f"{name}: conversations are read from .jsonl"):
            prepare(config, tokenizer, say=lambda line: None)


def test_a_tokenizer_can_be_trained_on_what_is_said(tmp_path, monkeypatch):
    from jaxllm.data.tokenizer import Tokenizer

    lines = [{"prompt": f"question {i}", "completion": "yes"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, seen = Source(name="a", path=str(tmp_path / "a.jsonl"), format="chat"), []
    monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab, out: seen.extend(texts))
    train_tokenizer((source,), 300, heldout=0.3)
    assert set(seen) < {f"question {i}\nyes" for i in range(50)} and 20 < len(seen) < 50
