"""`train.init` on a published model: its settings, its tokenizer and its weights are taken over, and checked."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small
import tiny

from jaxllm import api
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError
from jaxllm.hf.export import write_shards
from jaxllm.hf.folder import open_folder
from jaxllm.model.build import build
from jaxllm.parity.tensors import random_model
from jaxllm.train.init import first_weights, origin_of
from jaxllm.train.load import load_run


@pytest.fixture
def published(corpus, tmp_path):
    """A small Llama of the tests' own vocabulary, as a Hugging Face folder."""
    folder, (raw, tensors) = tmp_path / "published", random_model("llama3")
    tensors |= {name: np.resize(tensors[name], (400, 48)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder.mkdir()
    write_shards(folder, tensors.items(), 1 << 30)
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 400}))
    Tokenizer.load(corpus / "tokenizer").save(folder)
    return folder


def settings(corpus, out, published, **changes):
    raw = small.settings(corpus, out, train__init=str(published), **changes)
    del raw["model"], raw["data"]["tokenizer"]
    return raw


def test_settings_and_weights_are_taken_over(corpus, tmp_path, published):
    config, _ = load_run(settings(corpus, tmp_path / "run", published), ["model.remat=full"])
    assert config.model.vocab == 400 and config.model.embed == 48 and config.model.remat == "full"
    assert config.data.tokenizer == str(published)
    tokenizer = Tokenizer.load(published)
    assert tiny.bit_equal(
        first_weights(origin_of(str(published), ()), build(config.model), tokenizer, jax.random.key(0)),
        open_folder(published).load()[1],
    )
    other = build(dataclasses.replace(config.model, norm_eps=1e-3))
    with pytest.raises(CheckpointError, match="holds the weights of another model: norm_eps: 0.02 there, 0.001 here"):
        first_weights(origin_of(str(published), ()), other, tokenizer, jax.random.key(0))
    another = Tokenizer.train(["some other text, a little longer than nothing at all"] * 9, 290)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        first_weights(origin_of(str(published), ()), build(config.model), another, jax.random.key(0))


@pytest.mark.slow
def test_a_published_model_is_fine_tuned_and_written_back(corpus, tmp_path, published):
    result = api.train(settings(corpus, tmp_path / "run", published, train__steps=3), quiet=True)
    loaded = api.load(result.folder)
    assert api.export(loaded, tmp_path / "back") == "llama"
    back = api.load(tmp_path / "back")
    assert tiny.bit_equal(back.params, loaded.params) and back.tokenizer.hash == loaded.tokenizer.hash
    before = open_folder(published).load()[1]
    assert not tiny.bit_equal(before, back.params)


def test_a_gguf_file_is_fine_tuned_with_its_own_tokenizer(corpus, tmp_path, finished):
    """Written by export, and taken as train.init with nothing else said of model or tokenizer."""
    path = tmp_path / "model.gguf"
    api.export(api.load(finished.folder), path, to="gguf", dtype="f32")
    result = api.train(settings(corpus, tmp_path / "run", path, train__steps=1), quiet=True)
    assert result.config.data.tokenizer == str(path) and result.status == "finished"
    assert api.load(result.folder).tokenizer.encode("def f").tolist() == finished.tokenizer.encode("def f").tolist()
