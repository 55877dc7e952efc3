"""Text around generation: whole characters in every piece, and no control pieces."""

import pytest
import tiny

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.generate import tokens
from jaxllm.generate.text import generate_text, stream_text

TEXT = "def parse(text):\n    return text.split('\\n')\n" * 20


@pytest.fixture(scope="module")
def made():
    """`(model, params, tokenizer)`; the model has 10 ids more than the tokenizer."""
    tokenizer = Tokenizer.train([TEXT], vocab=300)
    model = tiny.one_device(tiny.config(vocab=310, layers=1))
    return model, tiny.weights(model), tokenizer


def test_control_pieces_are_never_made_and_the_end_stops(made):
    """At this temperature all ids are about equally likely: 400 draws would hold about 20 without text."""
    made_rows = generate_text(*made, ["def"] * 8, max_tokens=50, temperature=50.0, seed=range(8))
    tokenizer = made[2]
    for row in made_rows:
        text_ids = row.ids[:-1] if row.finish == "stop" else row.ids
        assert (row.ids[-1] == tokenizer.eos) == (row.finish == "stop")
        assert all(i < tokenizer.vocab and tokenizer.bytes_of[i] for i in text_ids)
        assert row.text == tokenizer.decode(text_ids) and len(row.ids) == len(row.logprobs)
    assert {len(row.ids) for row in made_rows} != {1} and len({row.text for row in made_rows}) == 8


def test_streamed_text_is_the_text(made):
    options = dict(max_tokens=40, temperature=2.0, seed=3)
    pieces = list(stream_text(*made, "def", **options))
    assert "".join(pieces) == generate_text(*made, ["def"], **options)[0].text
    assert len(pieces) > 1 and all(pieces)


def test_a_character_split_over_dispatches_comes_whole(made, monkeypatch):
    tokenizer = made[2]
    ids = tokenizer.encode("naïve 😀 text").tolist()
    monkeypatch.setattr(tokens, "stream", lambda *args, **options: (tokens.Chunk([[i]], [[0.0]]) for i in ids))
    pieces = list(stream_text(*made, "x"))
    assert "".join(pieces) == "naïve 😀 text" and "😀" in pieces and not any("\ufffd" in p for p in pieces)
    ids = ids[: ids.index(tokenizer.encode("😀")[0]) + 2]  # the end falls within the character
    assert "".join(stream_text(*made, "x")) == "naïve \ufffd"


def test_bad_input_is_refused_at_the_call(made):
    with pytest.raises(SettingsError, match="context of 64"):
        stream_text(*made, TEXT)
