import json

import pytest

from jaxllm import cli
from jaxllm.data.inspect import inspect, inspect_chat

TURNS = [{"role": "user", "content": "hi <|end|>\n\x1b[31m"}, {"role": "assistant", "content": "yo\n\nman"}]
PLAIN = """  ‹<bos>›‹<|user|>›hi <|end|>⏎
  �[31m‹<|end|>›‹<|assistant|>›[yo⏎
  ⏎
  man‹<|end|>›]"""


def test_inspect_counts_and_shows(make_store, tokenizer):
    texts = ["short one\n", "a rather longer document " * 20, "third"]
    store = make_store(texts)
    text = inspect(store, tokenizer, 2, length=64)
    total = sum(map(len, texts))
    assert f"source notes: 3 documents, {store.tokens:,} tokens, {total:,} bytes" in text
    assert f"{total / store.tokens:.2f} bytes a token" in text and f"longest document 1: {store.lengths[1]}" in text
    assert "document 1:" in text and "document 2:" not in text and "⏎" in text and "segment 1:" in text
    assert "cut" not in text and "1 of 3 documents are longer than 64" in inspect(
        store, tokenizer, length=64, pack=False
    )


def test_a_conversation_with_what_is_learnt(make_chats, tokenizer):
    store = make_chats([{"messages": TURNS}, {"prompt": "hi", "completion": "so " * 40}])
    text = inspect_chat(store, tokenizer, 1)
    learnt = store.targets.tolist()
    assert text.endswith(f"conversation 0: {store.lengths[0]} tokens, {learnt[0]} learnt\n{PLAIN}")
    assert f"{sum(learnt)} tokens an epoch are learnt, found by the template's own marks" in text
    assert "2 conversations" in text and "[learnt]  read  ‹control token›" in text and "longer" not in text
    painted = inspect_chat(store, tokenizer, 1, color=True)
    assert "  man\033[0m\033[32;7m<|end|>\033[0m" in painted and "\033[2;7m<|user|>\033[0m" in painted
    assert "\033[2mhi <|end|>" in painted and "�[31m" in painted
    short = inspect_chat(store, tokenizer, 2, length=24)
    assert f"conversation 1: 25 of {store.lengths[1]} tokens, {25 - 6} learnt" in short
    assert "2 of 2 conversations are longer than 24 and are cut at the end" in short


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A file of conversations, and beside it a tokenizer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    return tmp_path


@pytest.mark.parametrize("terminal, no_color", [(True, ""), (True, "1"), (False, "")])
def test_the_verb_shows_a_file(folder, capsys, monkeypatch, terminal, no_color):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert cli.main(["data", "inspect", "--chat", "chats.jsonl", "--tokenizer", "model"]) == 0
    out = capsys.readouterr().out
    assert "1 conversations" in out and (PLAIN in out) == (not terminal or no_color == "1")
    assert ("\033[32m" in out) == (PLAIN not in out)


def test_the_verb_shows_the_chats_of_a_run(folder, capsys):
    (folder / "notes.txt").write_text("notes\n")
    chats = "{name: chats, path: chats.jsonl, format: chat}"
    run = "model: demo\ntrain: {steps: 1, seq_len: 64, batch: 8}\n"
    text = "{name: notes, path: notes.txt}"
    for name, sources in ("mixed", f"[{chats}, {text}]"), ("text", f"[{text}]"):
        (folder / f"{name}.yaml").write_text(f"{run}data: {{tokenizer: model, sources: {sources}}}\n")
    assert cli.main(["data", "inspect", "mixed.yaml", "--chat"]) == 0
    out = capsys.readouterr().out
    assert PLAIN in out and "source notes" not in out and "rows of 64: 1 an epoch" in out
    assert cli.main(["data", "inspect", "mixed.yaml"]) == 0 and "source notes" in capsys.readouterr().out
    for words, message in [
        (["text.yaml", "--chat"], "no source has format: chat"),
        (["chats.jsonl", "--tokenizer", "model"], "ignore --tokenizer"),
        (["chats.jsonl", "--chat", "--tokenizer", "model", "train.seq_len=3"], "train.seq_len=3 would be ignored"),
        (["chats.jsonl", "--chat"], "say with --tokenizer which model reads them"),
    ]:
        assert cli.main(["data", "inspect", *words]) == 2 and message in capsys.readouterr().err
