"""Text around generation: whole characters in every piece, stop strings, and no control pieces."""

import pytest
import tiny

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.generate import tokens
from jaxllm.generate.beam import beam_search
from jaxllm.generate.text import beam_text, generate_text, stream_text

TEXT = "def parse(text):\n    return text.split('\\n')\n" * 20


@pytest.fixture(scope="module")
def made():
    """`(model, params, tokenizer)`; the model has 10 ids more than the tokenizer."""
    tokenizer = Tokenizer.train([TEXT], vocab=300)
    model = tiny.one_device(tiny.config(vocab=310, layers=1))
    return model, tiny.weights(model), tokenizer


@pytest.fixture
def scripted(made, monkeypatch):
    """`scripted(*texts)`: the model makes these texts, token by token; gives the stream that it comes from."""

    class Script(tokens.Stream):
        def __init__(self, rows):
            self.rows, self.given_up, self.stopped = rows, [], [False] * len(rows)

        def __next__(self):
            if not any(self.rows):
                raise StopIteration
            new = [[ids.pop(0)] if ids else [] for ids in self.rows]
            return tokens.Chunk(new, [[-1.0] * len(ids) for ids in new], [[] for _ in new])

        def end(self, row):
            self.rows[row] = []
            self.given_up.append(row)

    def script(*texts):
        rows = [made[2].encode(text).tolist() if isinstance(text, str) else text for text in texts]
        chunks = Script(rows)
        monkeypatch.setattr(tokens, "stream", lambda *args, **options: chunks)
        return chunks

    return script


def test_control_pieces_are_never_made_and_the_end_stops(made):
    """At this temperature all ids are about equally likely: 400 draws would hold about 20 without text."""
    made_rows = generate_text(*made, ["def"] * 8, max_tokens=50, temperature=50.0, seed=range(8))
    tokenizer = made[2]
    for row in made_rows:
        text_ids = row.ids[:-1] if row.finish == "stop" else row.ids
        assert (row.ids[-1] in tokenizer.stop_ids) == (row.finish == "stop")
        assert all(i < tokenizer.vocab and tokenizer.bytes_of[i] for i in text_ids)
        assert row.text == tokenizer.decode(text_ids) and len(row.ids) == len(row.logprobs)
    assert {len(row.ids) for row in made_rows} != {1} and len({row.text for row in made_rows}) == 8


def test_streamed_text_is_the_text(made):
    options = dict(max_tokens=40, temperature=2.0, seed=3, stop=["no such text"])
    stream = stream_text(*made, "def", **options)
    pieces = list(stream)
    assert stream.result() == generate_text(*made, ["def"], **options)[0]
    assert "".join(pieces) == stream.result().text and len(pieces) > 1 and all(pieces)


def test_a_prompt_may_be_token_ids(made):
    ids = made[2].encode("def", bos=True).tolist()
    one, other = generate_text(*made, ["def", ids], max_tokens=5, temperature=0)
    assert one == other


def test_a_character_split_over_dispatches_comes_whole(made, scripted):
    scripted("naïve 😀 text")
    pieces = list(stream_text(*made, "x"))
    assert "".join(pieces) == "naïve 😀 text" and "😀" in pieces and not any("\ufffd" in p for p in pieces)
    ids = made[2].encode("naïve 😀").tolist()[:-2]  # the end falls within the character
    scripted(ids)
    assert "".join(stream_text(*made, "x")) == "naïve \ufffd"


@pytest.mark.parametrize("stop", ["(text):\n    ret", ["nothing", "(t", "text"]])
def test_a_stop_string_that_spans_tokens_ends_the_text_and_the_work(made, scripted, stop):
    chunks = scripted(TEXT, "short")
    stopped, other = generate_text(*made, ["x", "y"], stop=stop)
    assert stopped.text == "def parse" and stopped.finish == "stop" and chunks.given_up[0] == 0
    whole = made[2].decode(stopped.ids)
    assert any(s in whole for s in ([stop] if isinstance(stop, str) else stop))
    assert made[2].decode(stopped.ids[:-1]).startswith("def parse") and len(stopped.logprobs) == len(stopped.ids)
    assert not any(s in made[2].decode(stopped.ids[:-1]) for s in ([stop] if isinstance(stop, str) else stop))
    assert other.text == "short" and other.finish == "length"
    scripted(TEXT)
    assert "".join(stream_text(*made, "x", stop=stop)) == "def parse"


def test_the_first_min_tokens_tokens_are_not_searched(made, scripted):
    first = len(made[2].encode("def parse(text):\n"))
    scripted(TEXT)
    (row,) = generate_text(*made, ["x"], stop="text", min_tokens=first)
    assert row.text == "def parse(text):\n    return "


def test_a_stop_string_ends_real_rows(made):
    """The text of the unstopped rows tells where each one must end."""
    options = dict(max_tokens=40, temperature=5.0, seed=[1, 2], n=2)
    free = generate_text(*made, ["def", "x"], **options)
    stop = [free[0].text[4:6], free[2].text[7:9]]
    stopped = generate_text(*made, ["def", "x"], stop=stop, **options)
    for row, whole in zip(stopped, free, strict=True):
        ends = [at for s in stop if (at := whole.text.find(s)) >= 0]
        assert row.text == (whole.text[: min(ends)] if ends else whole.text)
        assert row.ids == whole.ids[: len(row.ids)] and (row.finish == "stop") >= bool(ends)
    assert len(stopped[0].ids) < len(free[0].ids)


def test_a_tokenizer_may_have_ids_that_the_model_lacks(made):
    """Control tokens added after the pieces: no stop or ban can name what the model cannot make."""
    smaller = tiny.one_device(tiny.config(vocab=290, layers=1))
    (row,) = generate_text(smaller, tiny.weights(smaller), made[2], [[2, 100]], max_tokens=20, temperature=50.0)
    assert max(row.ids) < 290 and row.text


def test_beams_give_text(made):
    ids = made[2].encode("def", bos=True).tolist()
    rows = beam_text(*made, ["def", "x"], max_tokens=5, beams=3, n=2)
    banned = [i for i in range(310) if i >= made[2].vocab or not made[2].bytes_of[i]]
    options = dict(max_tokens=5, beams=3, n=2, stop_ids=made[2].stop_ids)
    wanted = beam_search(*made[:2], [ids], banned_ids=sorted({*banned} - {*made[2].stop_ids}), **options)
    assert [row.ids for row in rows[:2]] == [row.ids for row in wanted] and len(rows) == 4
    assert rows[0].text == made[2].decode(rows[0].ids)


def test_bad_input_is_refused_at_the_call(made):
    with pytest.raises(SettingsError, match="context of 64"):
        stream_text(*made, TEXT)
    with pytest.raises(SettingsError, match="stop string ''"):
        stream_text(*made, "x", stop=["a", ""])
