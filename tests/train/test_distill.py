"""Runs that learn from a teacher: the same with and without a cache, and what is refused."""

import pytest
import small

from jaxllm import api
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.train import teacher
from jaxllm.train.load import load_distill

pytestmark = pytest.mark.slow

STUDENT = small.MODEL | {
    "embed": 16,
    "layers": 1,
    "pattern": [{"attn": {"heads": 2, "kv_heads": 1}, "mlp": {"ffw": 16}}],
}


@pytest.fixture(scope="module")
def student(finished, corpus):
    def config(out, **changes):
        raw = small.settings(corpus, out, model=STUDENT, distill={"teacher": str(finished.folder), "top_k": 16})
        raw["distill"] |= changes
        return load_distill(_written(raw, corpus))[0]

    return config


def _written(raw, folder):
    import yaml

    path = folder / "distill.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture(scope="module")
def online(student, tmp_path_factory):
    return api.train(student(tmp_path_factory.mktemp("distill") / "run"), quiet=True)


def test_a_student_learns(online):
    losses = [float.fromhex(x) for x in small.losses(online.folder).values()]
    assert losses[-1] < losses[0] and online.summary["heldout_loss"] > 0


def test_what_the_teacher_said_is_kept_for_other_runs(student, online, tmp_path, monkeypatch):
    """The first run fills the cache, the second one needs no teacher; both learn what the run without one did."""
    cache = str(tmp_path / "cache")
    first = api.train(student(tmp_path / "first", cache=cache), quiet=True)
    monkeypatch.setattr(teacher, "frozen_model", lambda *args: pytest.fail("the teacher was loaded"))
    second = api.train(student(tmp_path / "second", cache=cache), quiet=True)
    assert small.losses(first.folder) == small.losses(second.folder) == small.losses(online.folder)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(student, online, tmp_path, stop_at):
    config = student(tmp_path / "run", cache=str(tmp_path / "cache"))
    stop_at(3)
    assert api.train(config, quiet=True).status == "preempted"
    assert small.losses(api.train(config, quiet=True).folder) == small.losses(online.folder)


def test_what_cannot_teach_is_refused(student, online, corpus, tmp_path):
    with pytest.raises(SettingsError, match="nobody to learn from; set distill.teacher"):
        load_distill("distill")
    Tokenizer.train(["another text, and other pieces of it"] * 9, 300, tmp_path / "tokenizer")
    raw = small.settings(corpus, tmp_path / "run", data__tokenizer=str(tmp_path / "tokenizer"), model=STUDENT)
    raw["distill"] = {"teacher": str(online.folder)}
    with pytest.raises(SettingsError, match="has another tokenizer .*its probabilities are of other tokens"):
        api.train(load_distill(_written(raw, tmp_path))[0], quiet=True)
