"""Tokenizers through GGUF metadata and back: the same ids, names and template."""

import json

import numpy as np
import pytest

from jaxllm.data.hf_tokenizer import ALPHABET
from jaxllm.data.rebuild import bpe_from_vocab, sentencepiece_from_pieces
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.gguf_tokenizer import PROBE, TEMPLATE, read_tokenizer, write_tokenizer

MERGES = ["1 2", "12 3", "Ġ t", "h e", "Ġt he", "l l", "Ċ Ċ", "Ġ Ġ", "' l", "'l l", "o r", "w or", "A B"]
SPECIAL = ["<|end|>", "<tool>"]
TEMPLATE_TEXT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


def byte_level(pre: str, **options) -> Tokenizer:
    """A small byte-level tokenizer with one control token and one that text may become."""
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
    types = [1] * (len(tokens) - 2) + [3, 4]
    ids = dict(bos=None, eos=len(tokens) - 2, unk=None, pad=None)
    return bpe_from_vocab(tokens, MERGES, types, pre=pre, template=TEMPLATE_TEXT, **ids | options)


def pieces(prefix: bool) -> Tokenizer:
    """A small SentencePiece tokenizer with bytes."""
    control = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<tool>", 0.0, 4)]
    rows = control + [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    rows += [(piece, -float(i), 1) for i, piece in enumerate(["▁t", "he", "▁the", "▁▁", "▁", "t", "h", "e", "l", "ll"])]
    ids = dict(bos=1, eos=2, unk=0, pad=None)
    return sentencepiece_from_pieces(*zip(*rows, strict=True), add_dummy_prefix=prefix, **ids)


def stored(metadata: dict) -> dict:
    """As a file gives it back: numbers in arrays."""
    arrays = {k: np.asarray(v) for k, v in metadata.items() if k.endswith(("scores", "token_type"))}
    return metadata | arrays


def same(a: Tokenizer, b: Tokenizer) -> bool:
    texts = [PROBE, "the tell<tool>the<|end|> <s>", "", " the", "12345", "▁x"]
    ids = all(np.array_equal(a.encode(t, bos=True), b.encode(t, bos=True)) for t in texts)
    return ids and (a.bos, a.eos, a.control, a.template) == (b.bos, b.eos, b.control, b.template)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "dbrx"])
def test_a_byte_level_tokenizer_comes_back_with_its_way_of_cutting(pre, tmp_path):
    tokenizer = byte_level(pre)
    metadata = write_tokenizer(tokenizer, tokenizer.vocab + 3)
    assert same(read_tokenizer(tmp_path, stored(metadata)), tokenizer)
    found = metadata["tokenizer.ggml.pre"]
    assert found == {"dbrx": "smaug-bpe"}.get(pre, pre)
    assert metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{tokenizer.vocab + i}]" for i in range(3)]


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_tokenizer_comes_back(prefix, tmp_path):
    tokenizer = pieces(prefix)
    metadata = write_tokenizer(tokenizer, tokenizer.vocab)
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert same(read_tokenizer(tmp_path, stored(metadata)), tokenizer)


def test_a_tokenizer_trained_here_comes_back_with_its_template(tmp_path):
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310)
    metadata = write_tokenizer(tokenizer, 320)
    again = read_tokenizer(tmp_path, stored(metadata))
    assert metadata[TEMPLATE] == tokenizer.template == again.template
    chat = [{"role": "user", "content": "the fox <|end|>"}, {"role": "assistant", "content": "a dog"}]
    assert np.array_equal(again.render(chat), tokenizer.render(chat))
    assert np.array_equal(again.encode(PROBE, bos=True), tokenizer.encode(PROBE, bos=True))
    assert again.stop_ids == tokenizer.stop_ids


def test_begin_and_end_default_to_what_llama_cpp_takes(tmp_path):
    metadata = stored(write_tokenizer(pieces(True), 270))
    bare = {k: v for k, v in metadata.items() if not k.endswith(("_id", "add_bos_token", "add_space_prefix"))}
    assert same(read_tokenizer(tmp_path, bare), pieces(True))
    metadata = stored(write_tokenizer(byte_level("llama-bpe", bos=270), 271))
    bare = {k: v for k, v in metadata.items() if not k.endswith("add_bos_token")}
    assert read_tokenizer(tmp_path, bare).bos == 270


def test_what_a_file_cannot_say_is_refused():
    tokenizer = byte_level("qwen2")
    raw = json.loads(tokenizer.files["tokenizer.json"])
    raw["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(SettingsError, match="ways to cut text into words"):
        write_tokenizer(Tokenizer(tokenizer.files | {"tokenizer.json": json.dumps(raw).encode()}), 300)
    with pytest.raises(SettingsError, match="271 ids and the model 270 rows"):
        write_tokenizer(tokenizer, 270)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, "'bert' is not read here; known: llama, gpt2"),
        ({"model": None}, "None is not read"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not known"),
        ({"tokens": 5}, "tokens=5 must be a list"),
        ({"token_type": [1]}, "must be a ndarray"),
        ({"token_type": np.ones(4, int)}, "271 pieces and 4 types"),
        ({"eos_token_id": 9999}, "eos id 9999 is outside"),
        ({"eos_token_id": "x"}, "must be a int"),
        ({"add_eos_token": True}, "an end after every text"),
    ],
)
def test_damaged_metadata_is_refused(change, message, tmp_path):
    metadata = stored(write_tokenizer(byte_level("qwen2"), 271))
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path, metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()})
