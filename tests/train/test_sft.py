"""Fine-tuning on conversations: the verb's settings, what is learnt, noise on the embeddings."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny

from jaxllm import api
from jaxllm.errors import SettingsError
from jaxllm.train.load import load_sft

TINY = {"train.steps=6", "train.seq_len=32", "train.batch=8", "train.eval_every=3", "optim.lr=1e-2"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [("add", "jump over"), ("box", "pack my"), ("dogs", "lazy"), ("vex", "five wizards")] * 6
    lines = [{"prompt": f"{question} {i}", "completion": f"{answer} {i}"} for i, (question, answer) in enumerate(turns)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_model_is_fine_tuned_on_conversations(finished, chats, corpus, tmp_path, capsys):
    overrides = [*TINY, f"out={tmp_path / 'run'}", f"data.cache={corpus / 'cache'}", "train.neftune=5"]
    config, _ = load_sft(str(finished.folder), [str(chats)], overrides)
    result = api.train(config)
    said = capsys.readouterr()
    said = said.out + said.err
    assert said.count("self-check: conversations of a row see nothing of each other") == said.count("self-check: ") == 1
    assert "tokens are learnt and no others" in said
    losses = [float.fromhex(x) for x in small.losses(result.folder).values()]
    assert losses[-1] < losses[0]
    (answer,) = api.generate(api.load(result.folder), "hello", max_tokens=4, temperature=0)
    assert answer.ids


@pytest.mark.slow
def test_adapters_leave_the_rest_alone(finished, chats, corpus, tmp_path, capsys):
    overrides = [*TINY, f"out={tmp_path / 'run'}", f"data.cache={corpus / 'cache'}", "lora.rank=2", "train.steps=1"]
    api.train(load_sft(str(finished.folder), [str(chats)], overrides)[0])
    said = capsys.readouterr()
    assert "frozen arrays are as they were after the first step" in said.out + said.err


def test_what_cannot_be_fine_tuned_is_refused(finished, chats, corpus, tmp_path):
    with pytest.raises(SettingsError, match="is a model: give the conversations too"):
        load_sft(str(finished.folder), None)
    with pytest.raises(SettingsError, match="--data is for a model"):
        load_sft("sft", [str(chats)])
    with pytest.raises(SettingsError, match="nothing to fine-tune; set train.init"):
        load_sft("sft", None, [f"data.tokenizer={corpus / 'tokenizer'}", "model=demo"])
    text = f"data.sources=[{{name: code, path: '{corpus}/code-*.txt'}}]"
    with pytest.raises(SettingsError, match="no source holds conversations"):
        load_sft("sft", None, [f"train.init={finished.folder}", text])


@pytest.fixture(scope="module")
def model():
    return tiny.one_device(tiny.config(vocab=tiny.VOCAB))


def test_noise_on_the_embeddings_is_bounded_by_the_length_of_each_document(model):
    """Uniform within alpha / sqrt(L D), none without a key (NEFTune, algorithm 1)."""
    batch, params = tiny.batch(), tiny.weights(model)
    seen = {}
    for alpha in (None, 2.0):
        seen[alpha] = model.apply(params, batch.tokens_BT, **tiny.where(batch), key=jax.random.key(1), neftune=alpha)[0]
    without = model.apply(params, batch.tokens_BT, **tiny.where(batch), neftune=2.0)[0]
    assert np.array_equal(without, seen[None]) and not np.array_equal(seen[2.0], seen[None])
    from jaxllm.model.transformer import _noise

    x_BTD = jnp.zeros((*batch.tokens_BT.shape, 1000))
    context = types.SimpleNamespace(sharding=model.sharding, segments_BT=batch.segments_BT)
    noise = np.abs(_noise(jax.random.key(0), 2.0, x_BTD, context)).max(axis=-1)
    for row, segments in enumerate(np.asarray(batch.segments_BT)):
        for segment in set(segments.tolist()):
            bound = 2.0 / np.sqrt((segments == segment).sum() * 1000)
            assert 0.98 * bound < noise[row, segments == segment].max() <= bound
