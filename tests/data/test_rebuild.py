"""Tokenizers from the lists of a GGUF file, and ours as Hugging Face's files."""

import json

import numpy as np
import pytest
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data.rebuild import PATTERNS, bpe_from_vocab, sentencepiece_from_pieces
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError

NASTY = [
    "",
    " ",
    "  a  b ",
    "\n\n\tx\r\n",
    "nul \0 ▁ ▁▁",
    "é e\u0301 ﬁ 日本 👩‍👩‍👧",
    "<bos><|user|><0x41>",
    "x" * 300,
    "def f0(self)",
]


def test_a_sentencepiece_model_from_its_pieces(tokenizer, texts):
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    pieces, scores, types = zip(*((p.piece, p.score, p.type) for p in proto.pieces), strict=True)
    types = [3 if kind == 2 else kind for kind in types]  # some files call the unknown piece control
    ids = dict(bos=2, eos=3, unk=1, pad=0)
    again = sentencepiece_from_pieces(pieces, scores, types, **ids, add_dummy_prefix=False, template="x")
    assert (again.bos, again.eos, again.unk, again.pad, again.template) == (2, 3, 1, 0, "x")
    for text in NASTY + texts[:20]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert not set(again.control.values()) & set(again.encode("<bos><|user|><unk>").tolist())
    for change, words in [
        (dict(bos=400), "bos id 400 is outside the vocabulary of 400"),
        (dict(scores=scores[:-1]), "400 pieces and 399 scores"),
        (dict(types=types[:-1]), "400 pieces and 399 types"),
        (dict(types=[9] * 400), "type 9"),
        (dict(pieces=["a", *pieces[1:-1], "a"]), "'a' twice"),
    ]:
        given = dict(pieces=pieces, scores=scores, types=types, **ids) | change
        with pytest.raises(DataError, match=words):
            sentencepiece_from_pieces(**given)


def test_spaces_in_user_defined_pieces_are_escaped_again(tokenizer):
    proto = ModelProto.FromString(tokenizer.files["tokenizer.model"])
    pieces, scores, types = map(list, zip(*((p.piece, p.score, p.type) for p in proto.pieces), strict=True))
    pieces, scores, types = [*pieces, "     "], [*scores, 0.0], [*types, 4]
    again = sentencepiece_from_pieces(pieces, scores, types, bos=2, eos=3, unk=1, pad=0, add_dummy_prefix=False)
    assert again.encode("     ").tolist() == [400] and again.decode([400]) == "     "


@pytest.fixture(scope="module")
def lists(texts):
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False))
    raw = json.loads(rust.to_str())["model"]
    tokens = [*sorted(raw["vocab"], key=raw["vocab"].get), "<|end|>", "<think>", "[PAD]"]
    return rust, tokens, [" ".join(merge) for merge in raw["merges"]], [1] * (len(tokens) - 3) + [3, 4, 5]


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_byte_level_model_from_its_vocabulary(lists, texts, pre):
    rust, tokens, merges, types = lists
    end = tokens.index("<|end|>")
    tokenizer = bpe_from_vocab(tokens, merges, types, pre=pre, bos=None, eos=end, unk=None, pad=None)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab, tokenizer.stop_ids) == (None, end, len(tokens), (end,))
    for text in NASTY + texts[:20]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text or pre == "qwen2" and "\u0301" in text
        if pre == "gpt-2":
            assert ids.tolist() == rust.encode(text).ids
    assert end not in tokenizer.encode("<|end|>") and end + 1 in tokenizer.encode("<think>")
    digits = {"smollm": 1, "qwen2": 1, "tekken": 1, "llama-bpe": 3, "deepseek-v3": 3, "gpt-4o": 3}
    if pre in digits:
        words = tokenizer._backend._rust.pre_tokenizer.pre_tokenize_str("x=1234567")
        assert [w for w, _ in words if w[0].isdigit()][0] == "123"[: digits[pre]]


def test_an_unknown_pre_tokenizer_is_refused(lists):
    _, tokens, merges, types = lists
    with pytest.raises(DataError, match="'llama-bpf' is not known; did you mean llama-bpe"):
        bpe_from_vocab(tokens, merges, types, pre="llama-bpf", bos=None, eos=None, unk=None, pad=None)


def test_ours_as_hugging_face_files(tokenizer, texts, tmp_path):
    tokenizer.to_hf(tmp_path)
    rust = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.encode_special_tokens = True
    for text in NASTY + texts[:20]:
        assert rust.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
        assert rust.encode(text).ids == tokenizer.encode(text, bos=True).tolist()
        assert rust.decode(tokenizer.encode(text).tolist()) == text
    assert rust.token_to_id("<|end|>") == tokenizer.id("<|end|>")
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash and again.template == tokenizer.template
    (tmp_path / "tokenizer.model").unlink()
    from_json = Tokenizer.load(tmp_path)
    assert (from_json.bos, from_json.eos, from_json.stop_ids) == (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids)
    for text in NASTY:
        np.testing.assert_array_equal(from_json.encode(text), tokenizer.encode(text))
