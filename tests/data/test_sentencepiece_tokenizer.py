"""Published SentencePiece models: exactly their ids, but no text becomes a control token."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from jaxllm.data import sentencepiece_tokenizer as module
from jaxllm.data.tokenizer import StreamDecoder, Tokenizer
from jaxllm.errors import DataError, UserError

#: User-defined pieces as in Gemma: turn markers, tags, runs of spaces and newlines.
USER_DEFINED = ["<start_of_turn>", "<end_of_turn>", "<table>", "\n\n", "▁▁▁▁"]
NASTY = [
    "",
    " ",
    "  two  leading, two trailing  ",
    "\n\n\n\t\tx\r\n",
    "    def self    return",
    "é e\u0301 ﬁ 日本語 👩‍👩‍👧 ①",
    "<start_of_turn>user<end_of_turn><s></s><unk><table></table>",
    "<0x41> ⁇ ",
]
TURNS = "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content }}<end_of_turn>\n{% endfor %}"


def published(texts, **options) -> bytes:
    """A model as Llama 2's (a space before the text), or with other `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=USER_DEFINED,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def made(model: bytes, **config) -> Tokenizer:
    files = {"tokenizer.model": model, "chat_template.jinja": TURNS.encode()}
    return Tokenizer(files | ({"tokenizer_config.json": json.dumps(config).encode()} if config else {}))


@pytest.fixture(scope="module")
def llama(texts) -> bytes:
    return published(texts)


@pytest.fixture(scope="module")
def gemma(texts) -> bytes:
    return published(texts, add_dummy_prefix=False)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_ids_are_sentencepieces_where_no_control_is_named(kind, texts, request):
    model = request.getfixturevalue(kind)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    tokenizer = made(model)
    for text in [*NASTY, *texts[:20], "a ▁ b"]:
        if "of_turn" not in text:
            assert tokenizer.encode(text).tolist() == processor.encode(text)
        if "▁" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("config", [{}, {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}])
def test_turn_markers_never_come_from_text_but_tags_do(gemma, config):
    tokenizer = made(gemma, **config)
    control = {tokenizer.id(c) for c in ("<start_of_turn>", "<end_of_turn>", "<s>", "</s>")}
    for text in NASTY:
        assert not control & set(tokenizer.encode(text).tolist())
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("<table>\n\n<start_of_turn>")]
    assert pieces[:2] == ["<table>", "\n\n"] and tokenizer.stop_ids == (tokenizer.eos, tokenizer.id("<end_of_turn>"))


def test_ids_that_end_generation_are_control(gemma):
    end = [p.piece for p in ModelProto.FromString(gemma).pieces].index("<table>")
    files = {"tokenizer.model": gemma, "generation_config.json": json.dumps({"eos_token_id": [2, end]}).encode()}
    tokenizer = Tokenizer(files)
    assert tokenizer.stop_ids == (2, end) and end not in tokenizer.encode("<table>")


def test_a_chat_has_the_models_space_at_the_start_only(llama):
    tokenizer = made(llama)
    ids = tokenizer.render([{"role": "user", "content": "self"}]).tolist()
    assert [tokenizer.piece(i) for i in ids[:3]][1] != "▁" and tokenizer.piece(ids[0]) == "<start_of_turn>"
    assert tokenizer.decode(ids, skip_special=False) == "<start_of_turn>user\nself<end_of_turn>\n"
    legacy = made(llama, legacy=True).render([{"role": "user", "content": "self"}]).tolist()
    assert tokenizer.decode(legacy, skip_special=False) == "<start_of_turn> user\nself<end_of_turn> \n"


def test_begin_rules(llama):
    tokenizer = made(llama)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk, tokenizer.pad) == (1, 2, 0, None)
    assert tokenizer.encode("x", bos=True)[0] == 1 and tokenizer.names["bos_token"] == "<s>"
    assert made(llama, add_bos_token=False).bos is None
    assert made(llama, eos_token="<end_of_turn>").eos == tokenizer.id("<end_of_turn>")


def test_added_tokens_beyond_the_model(llama):
    listed = {"420": {"content": "<|im_end|>", "special": True}, "421": {"content": "<think>", "special": False}}
    tokenizer = made(llama, added_tokens_decoder=listed, eos_token="<|im_end|>")
    ids = tokenizer.encode("self<think>self <|im_end|>").tolist()
    assert tokenizer.vocab == 422 and 421 in ids and 420 not in ids and tokenizer.eos == 420
    assert tokenizer.decode(ids) == "self<think>self <|im_end|>"
    assert tokenizer.piece(421) == "<think>" and tokenizer.bytes_of[420] == b""
    for listed, words in [
        ({"5": {"content": "<|im_end|>"}}, "the id 5, which is"),
        ({"9": {"content": "<s>"}}, "'<s>' the id 9, tokenizer.model 1"),
        ({"900000000": {"content": "<|im_end|>"}}, "reach the id 900,000,000"),
    ]:
        with pytest.raises(DataError, match=words):
            made(llama, added_tokens_decoder=listed)


@pytest.mark.parametrize("continued", [False, True])
def test_the_models_own_space(llama, continued):
    tokenizer = made(llama)
    ids = tokenizer.encode("self é", bos=True)
    text = " self é" if continued else "self é"
    stream = StreamDecoder(tokenizer, continued=continued)
    assert "".join(stream.push(int(i)) for i in ids) + stream.flush() == text
    assert tokenizer.decode(ids, continued=continued) == text


def test_mask_is_by_characters(gemma, llama):
    turn = "<start_of_turn>x\n{% generation %}{{ m.content }}{% endgeneration %}<end_of_turn>"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    for model in (gemma, llama):
        tokenizer = made(model).with_template(template)
        ids_N, mask_N = tokenizer.render_masked([{"role": "assistant", "content": "日 self 😀"}] * 2)
        assert tokenizer.decode(ids_N[mask_N], continued=True) == "日 self 😀" * 2


def test_long_text_is_cut_where_no_piece_goes(gemma, texts, monkeypatch):
    proto = ModelProto.FromString(gemma)
    proto.pieces[-1].piece = ">▁</"  # as in Gemma
    proto.pieces.add(piece="▁<", score=-900.0, type=1)
    text = "<b> </b> x > </ " * 30 + "".join(texts[:10]) + "x" * 200 + " " * 90 + "y > </b>"
    model = proto.SerializeToString()
    whole = Tokenizer({"tokenizer.model": model}).encode(text)
    monkeypatch.setattr(module, "WINDOW", 64)
    tokenizer = Tokenizer({"tokenizer.model": model})
    assert tokenizer._backend._crossed == ">" and len(list(tokenizer._backend._windows(text))) > 10
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_damaged_models_are_refused_or_work(llama):
    rng = random.Random(0)
    for seed in range(150):
        data = bytearray(llama)
        if seed % 3 == 0:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.choice([1, 4])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = Tokenizer({"tokenizer.model": bytes(data)})
            tokenizer.decode(tokenizer.encode("self é <table>"))
        except UserError as error:
            assert len(str(error)) < 500
