"""A run's own tokenizer: trained once for the same text, and only when nothing is wrong with the files."""

import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.trained import open_tokenizer
from jaxllm.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(f"{i} quick brown foxes {i * k} jump\n" for k in range(60)))
    return tmp_path


def settings(folder, **changes):
    source = Source(name="notes", path=str(folder / "*.txt"))
    return DataConfig(**({"sources": (source,), "vocab": 320, "cache": str(folder / "cache")} | changes))


@pytest.fixture
def opened():
    """`opened(config)`: `(tokenizer, what was said)`."""

    def run(config):
        said = []
        return open_tokenizer(config, said.append), said

    return run


def test_the_same_text_trains_once(folder, opened, monkeypatch):
    first, said = opened(settings(folder))
    assert first.vocab == 320 and said == ["training a tokenizer of 320 pieces"]
    monkeypatch.setattr(Tokenizer, "train", lambda *_, **__: pytest.fail("trained again"))
    again, said = opened(settings(folder, prefetch=0, seed=7))
    assert again.hash == first.hash and said == []
    monkeypatch.undo()
    others = [opened(settings(folder, **change))[0] for change in ({"vocab": 310}, {"heldout": 0.4})]
    (folder / "3.txt").write_text("something else, 7 times\n" * 70)
    others.append(opened(settings(folder))[0])
    assert len({first.hash, *(other.hash for other in others)}) == 4


def test_a_damaged_copy_is_made_again(folder, opened):
    first, _ = opened(settings(folder))
    foreign = Tokenizer.train(["some other text " * 50], 300)
    foreign.save(next((folder / "cache").glob("tokenizer-*")))
    again, said = opened(settings(folder))
    assert again.hash == first.hash and said


def test_what_is_wrong_is_said_before_training_begins(folder, opened):
    one = Source(name="one", path=str(folder / "1.txt"))
    cases = [
        (settings(folder, eval_sources=(Source(name="gone", path=str(folder / "gone.txt")),)), "no file matches"),
        (settings(folder, sources=(one,), heldout=0.1), "one: heldout=0.1 needs two documents"),
    ]
    for config, message in cases:
        said = []
        with pytest.raises(DataError, match=message):
            open_tokenizer(config, said.append)
        assert said == []


def test_a_named_one_is_read(folder, opened, tokenizer):
    tokenizer.save(folder / "tok")
    found, said = opened(settings(folder, tokenizer=str(folder / "tok"), vocab=4096))
    assert found.hash == tokenizer.hash and said == []
