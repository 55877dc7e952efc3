"""Runs that learn preferences: what they learn, the reference that stays, and faults planted."""

import json

import jax
import numpy as np
import pytest
import small

from jaxllm import api, tree
from jaxllm.errors import CheckpointError, SettingsError, TrainingError
from jaxllm.objectives import dpo as objective
from jaxllm.train import preferences
from jaxllm.train.load import load_dpo, load_run

STEPS = ["train.steps=6", "train.seq_len=48", "train.batch=8", "train.eval_every=3", "optim.lr=3e-3"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["jump", "box", "dogs", "vex", "quick", "fox"]
    lines = [{"prompt": f"{w} {i}", "chosen": f"{w} {w}", "rejected": f"{i} {i}"} for i in range(8) for w in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(finished, corpus, pairs):
    def config(out, *more):
        paths = [f"train.init={finished.folder}", f"data.sources.0.path={pairs}", f"data.cache={corpus / 'cache'}"]
        return load_dpo("dpo", [*paths, *STEPS, f"out={out}", "data.heldout=0.2", *more])[0]

    return config


@pytest.fixture(scope="module")
def learnt(run, tmp_path_factory):
    return api.train(run(tmp_path_factory.mktemp("dpo") / "run"), quiet=True)


def rows(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_answers_preferred_are_learnt(learnt):
    """From log 2 down; accuracy of held-out pairs up; the reference is kept with the run."""
    found = rows(learnt)
    losses = [row["loss"] for row in found if "loss" in row]
    assert abs(losses[0] - np.log(2)) < 1e-3 and losses[-1] < 0.6
    held = [row for row in found if "heldout_accuracy" in row]
    assert held[-1]["heldout_accuracy"] > 0.9 and held[-1]["heldout_margin"] > held[0]["heldout_margin"] > 0
    assert sorted(p.name for p in (learnt.folder / "reference").iterdir()) == ["data", "pairs-heldout.npy", "pairs.npy"]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(run, learnt, tmp_path, stop_at):
    config = run(tmp_path / "run")
    stop_at(3)
    assert api.train(config, quiet=True).status == "preempted"
    again = api.train(config, quiet=True)
    assert small.losses(again.folder) == small.losses(learnt.folder)
    for path, value in tree.flatten(learnt.params).items():
        assert np.array_equal(value, tree.flatten(again.params)[path]), path


@pytest.mark.slow
def test_a_lost_reference_stops_the_resume(run, tmp_path, stop_at):
    config = run(tmp_path / "run")
    stop_at(3)
    api.train(config, quiet=True)
    (tmp_path / "run/reference/pairs.npy").unlink()
    with pytest.raises(CheckpointError, match="the reference's log-probabilities cannot be read"):
        api.train(config, quiet=True)


@pytest.mark.slow
def test_another_model_can_be_the_reference(run, finished, learnt, tmp_path):
    """The same weights by their path give the same losses; another model gives others, and no log 2."""
    same = api.train(run(tmp_path / "same", f"dpo.reference={finished.folder}", "train.steps=1"), quiet=True)
    other = api.train(run(tmp_path / "other", f"dpo.reference={learnt.folder}", "train.steps=1"), quiet=True)
    first = [rows(result)[0]["loss"] for result in (learnt, same, other)]
    assert abs(first[0] - first[1]) < 1e-5 and abs(first[2] - first[0]) > 1e-2


def test_a_reference_that_moves_with_the_policy_is_found(run, tmp_path, monkeypatch):
    def moves(model, params, batch, key):
        logprobs = whole(model, params, batch, key)
        return logprobs - jax.lax.stop_gradient(logprobs) + batch.reference_BT

    whole = objective.token_logprobs
    monkeypatch.setattr(objective, "token_logprobs", moves)
    with pytest.raises(TrainingError, match="the reference moves with the policy"):
        api.train(run(tmp_path / "run"), quiet=True)


@pytest.mark.slow
def test_a_reference_that_is_not_the_first_model_is_found(run, tmp_path, monkeypatch):
    whole = preferences.reference_of
    monkeypatch.setattr(preferences, "reference_of", lambda *args, **kwargs: whole(*args, **kwargs) + 0.1)
    with pytest.raises(TrainingError, match="the reference is not the model that the run starts from"):
        api.train(run(tmp_path / "run", "dpo.beta=3"), quiet=True)


def test_what_cannot_be_is_refused(run, corpus, finished, tmp_path):
    for overrides, message in [
        (["train.neftune=5"], "would ignore z_loss and neftune"),
        (["dpo.beta=0"], "must be above 0"),
        (["data.truncate=left"], "a pair that is longer than a row is left out whole"),
        ([f"data.sources=[{{name: a, path: '{corpus}/code-*.txt'}}]"], "has format=auto, and the run wants pairs"),
    ]:
        with pytest.raises(SettingsError, match=message):
            run(tmp_path / "never", *overrides)
    with pytest.raises(SettingsError, match="nothing to start from; set train.init"):
        load_dpo("dpo", STEPS)
    with pytest.raises(SettingsError, match="answers that are compared .jaxllm dpo., not text"):
        load_run("dpo", [f"train.init={finished.folder}", "dpo=null", *STEPS])
