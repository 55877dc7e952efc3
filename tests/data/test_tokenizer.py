import io

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from jaxllm.data import sentencepiece_tokenizer, sentencepiece_train
from jaxllm.data.chat import MARKERS
from jaxllm.data.tokenizer import StreamDecoder, Tokenizer
from jaxllm.errors import DataError, SettingsError

NASTY = [
    "",
    " ",
    "  two  leading, two trailing  ",
    "\n\n\n\t\tx\r\n\r",
    "nul \0 and escape \x1b, bom \ufeff",
    "real block ▁ beside space ▁▁ x▁",
    "reserved ▅ and noncharacters \ufdd0\uffff",
    "é e\u0301 ﬁ ½ ﷺ Å İ ß",
    "日本語 עברית العربية 👩‍👩‍👧‍👦 🇩🇪",
    "<bos><eos><pad><unk>" + "".join(MARKERS),
    "<0x41><0xE2> ⁇ ??",
    "x" * 5000 + " " * 3000 + "\t" * 100,
]
LETTERS = list(" \n\t\0▁▅<>|abc1é日😀\u0301\r")


def random_texts(count=200):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(LETTERS, rng.integers(1, 60))) for _ in range(count)]


@pytest.mark.fast
def test_round_trip_is_exact(tokenizer):
    for text in NASTY + random_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_gives_control_ids(tokenizer):
    first_byte = tokenizer.encode("\x01")[0] - 1
    control = set(range(4 + len(MARKERS)))
    assert first_byte == len(control)  # ids below the bytes are exactly the control pieces
    for text in NASTY + random_texts() + [" ".join(MARKERS * 3)]:
        assert not control & set(tokenizer.encode(text).tolist())
    assert tokenizer.encode("a", bos=True, eos=True).tolist()[::2] == [tokenizer.bos, tokenizer.eos]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 2, 3)


def test_control_pieces_in_the_training_text_stay_text():
    texts = [f"{i} <bos><|user|> words and <|end|> {i}\n" for i in range(200)]
    tokenizer = Tokenizer.train(texts, vocab=295)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert tokenizer.encode(texts[0]).min() >= 4 + len(MARKERS)


def test_stream_decoder_gives_whole_characters(tokenizer):
    for text in NASTY[1:] + random_texts(50):
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(int(i)) for i in tokenizer.encode(text)]
        assert "�" not in "".join(parts)
        assert "".join(parts) + stream.flush() == text
    stream = StreamDecoder(tokenizer)
    half = tokenizer.encode("😀")[:2]
    assert [stream.push(int(i)) for i in half] == ["", ""] and stream.flush() == "�"


def test_windows_do_not_change_the_tokens(tokenizer, monkeypatch):
    text = "".join(f"def f{i}(self):\n        return   {i}  \n\n" for i in range(300))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(sentencepiece_tokenizer, "WINDOW", 50)
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_training_is_deterministic_and_saved(tokenizer, texts, tmp_path):
    again = Tokenizer.train(iter(texts), vocab=400, out=tmp_path / "tok")
    assert again.hash == tokenizer.hash == Tokenizer.load(tmp_path / "tok").hash
    assert Tokenizer.load(tmp_path / "tok" / "tokenizer.model").template == tokenizer.template


def test_sample_is_bounded_and_reaches_the_end():
    texts = [f"{i:06d}" * 100 for i in range(1000)]
    kept = sentencepiece_train._sample(texts, 50_000)
    assert 20_000 < sum(map(len, kept)) <= 50_000
    assert int(kept[-1][:6]) > 900 and kept == sentencepiece_train._sample(texts, 50_000)


def test_whitespace_runs_are_single_pieces(tokenizer):
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("12")) == 2  # digits stand alone


@pytest.mark.parametrize("bad", [-1, 400, 5000])
def test_id_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(DataError, match=f"token id {bad} at position 1 is outside the vocabulary of 400"):
        tokenizer.decode([5, bad])
    with pytest.raises(DataError, match=f"token id {bad}"):
        StreamDecoder(tokenizer).push(bad)


def test_bad_input(tokenizer, tmp_path):
    with pytest.raises(DataError, match="character 2 is half a surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="character 2 is half a surrogate"):
        Tokenizer.train(["ab\ud800"])
    with pytest.raises(SettingsError, match=r"vocab=4096: this text gives at most \d+ pieces"):
        Tokenizer.train(["a few words\n"], vocab=4096)
    with pytest.raises(SettingsError, match=r"vocab=260: .* alone need \d+"):
        Tokenizer.train(["a few words\n"], vocab=260)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train([])
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="nowhere.model: no such file"):
        Tokenizer.load(tmp_path / "nowhere.model")
    assert not Tokenizer.found(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(DataError, match="tokenizer.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    assert Tokenizer.found(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 1}')
    with pytest.raises(DataError, match=f"{tmp_path}/tokenizer_config.json: bos_token: 1 is a int"):
        Tokenizer.load(tmp_path)


def test_a_published_model_may_normalise_and_says_so(texts):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=330, byte_fallback=True, minloglevel=2
    )
    assert not Tokenizer({"tokenizer.model": out.getvalue()}).lossless


def test_a_model_of_ours_that_normalises_is_refused(tokenizer):
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(DataError, match="would lose"):
        Tokenizer({"tokenizer.model": proto.SerializeToString()})
