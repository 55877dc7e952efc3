"""Fine-tuning on conversations: the verb's settings, what is learnt, and the self-check with faults planted."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny

from jaxllm import api
from jaxllm.errors import SettingsError, TrainingError
from jaxllm.model.build import Model
from jaxllm.train import selfcheck
from jaxllm.train.load import load_sft
from jaxllm.train.selfcheck import Frozen, check_first_batch

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
    assert said.count("self-check: ") == 2 and "tokens are learnt; the others have no gradient" in said
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


def test_the_check_passes_on_what_is_right(model):
    found = check_first_batch(model, tiny.weights(model), tiny.batch())
    assert len(found) == 2 and "3 in a row" in found[0]


def test_conversations_that_see_each_other_stop_the_run(model, monkeypatch):
    whole = Model.apply

    def leaks(self, params, tokens, *, segments_BT, **kwargs):
        return whole(self, params, tokens, segments_BT=jnp.minimum(segments_BT, 1), **kwargs)

    monkeypatch.setattr(Model, "apply", leaks)
    with pytest.raises(TrainingError, match="reaches another conversation at row"):
        check_first_batch(model, tiny.weights(model), tiny.batch())


def test_later_tokens_that_are_seen_stop_the_run(model, monkeypatch):
    whole = Model.apply

    def looks_ahead(self, params, tokens, **kwargs):
        hidden, cache, aux = whole(self, params, tokens, **kwargs)
        return hidden + jnp.roll(hidden, -1, axis=1), cache, aux

    monkeypatch.setattr(Model, "apply", looks_ahead)
    with pytest.raises(TrainingError, match="reaches an(other|) "):
        check_first_batch(model, tiny.weights(model), tiny.batch())


def test_a_mask_that_is_ignored_stops_the_run(model, monkeypatch):
    whole = selfcheck.cross_entropy
    monkeypatch.setattr(selfcheck, "cross_entropy", lambda m, h, x, t, mask: whole(m, h, x, t, jnp.ones_like(mask)))
    with pytest.raises(TrainingError, match="the masked token at row 0, position 0 has a gradient"):
        check_first_batch(model, tiny.weights(model), tiny.batch())
    empty = dataclasses.replace(tiny.batch(), mask_BT=jnp.zeros((4, 16)))
    with pytest.raises(TrainingError, match="holds no token to learn"):
        check_first_batch(model, tiny.weights(model), empty)


def test_experts_that_nothing_balances_stop_the_run(monkeypatch):
    model = tiny.one_device(tiny.config(moe={}))
    assert "balanced by a loss" in check_first_batch(model, tiny.weights(model), tiny.batch())[-1]
    whole = Model.apply

    def unbalanced(self, *args, **kwargs):
        hidden, cache, aux = whole(self, *args, **kwargs)
        return hidden, cache, aux | {"loss_B": jnp.zeros_like(aux["loss_B"])}

    monkeypatch.setattr(Model, "apply", unbalanced)
    with pytest.raises(TrainingError, match="the loss that balances the experts is zero"):
        check_first_batch(model, tiny.weights(model), tiny.batch())


def test_a_frozen_weight_that_moves_in_its_last_bit_is_found():
    params = {"a": jnp.arange(12.0), "b": {"c": jnp.ones((3, 4), jnp.int8), "d": jnp.ones(3, jnp.bfloat16)}}
    frozen = Frozen(params, "a")
    moved = params | {"a": params["a"] + 1}
    assert frozen.check(moved) == ["2 frozen arrays are as they were after the first step"]
    for path, value in [("c", params["b"]["c"].at[1, 2].set(2)), ("d", params["b"]["d"][::-1].at[0].add(2**-7))]:
        with pytest.raises(TrainingError, match=f"b/{path} is frozen and has moved"):
            frozen.check(params | {"b": params["b"] | {path: value}})


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
