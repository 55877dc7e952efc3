"""Runs that learn from a teacher: the same with and without a cache, its own answers, and what is refused."""

import json
from pathlib import Path

import pytest
import small

from jaxllm import api
from jaxllm import config as settings_of
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError
from jaxllm.train import answers, teacher
from jaxllm.train.config import RunConfig
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


@pytest.fixture
def asking(student, tmp_path):
    """A run on prompts in all their forms, and the folder where their answers will be."""
    asked = [{"prompt": f"def f{i}"} for i in range(90)]
    asked += [
        {"messages": [{"role": "user", "content": f"f{i}?"}, {"role": "assistant", "content": "no"}]} for i in range(6)
    ]
    asked += [{"instruction": "Say f", "input": str(i)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))

    def config(name, **distill):
        raw = settings_of.to_dict(student(tmp_path / name))
        raw["distill"] |= distill
        raw["data"] |= {"cache": str(tmp_path / "stores"), "heldout": 0.0, "eval_sources": []}
        raw["data"]["sources"] = [{"name": "asked", "path": str(tmp_path / "prompts.jsonl"), "format": "prompts"}]
        return settings_of.parse(RunConfig, raw, "test")

    return config, tmp_path / "stores" / "answers"


def test_a_student_learns_from_the_answers_of_its_teacher(asking, monkeypatch, capsys):
    config, folder = asking
    hot = {"max_tokens": 32, "temperature": 10.0}  # so that some answers of a barely trained teacher end
    run = api.train(config("run", answers=hot))
    said = capsys.readouterr().err
    assert run.status == "finished" and "prompts are left out" in said and "self-check: " in said
    (file,) = folder.glob("*.jsonl")
    made = [json.loads(line) for line in file.read_text().splitlines()]
    assert 0 < len(made) < 102
    for record in made:
        said = record["completion"]
        assert (said if isinstance(said, str) else said[0]["content"]).strip()
    lists = [record for record in made if not isinstance(record["prompt"], str)]
    assert all(message["content"] != "no" for record in lists for message in record["prompt"])
    monkeypatch.setattr(answers, "frozen_model", lambda *args: pytest.fail("the teacher answered again"))
    assert small.losses(api.train(config("again", answers=hot), quiet=True).folder) == small.losses(run.folder)


def test_answers_that_do_not_end_are_left_out(asking, monkeypatch):
    config, folder = asking
    with pytest.raises(DataError, match="finished none of its 102 answers in 1 tokens; set distill.answers.max_tokens"):
        api.train(config("run", answers={"max_tokens": 1, "temperature": 0.0}), quiet=True)
    with pytest.raises(DataError, match="no prompt has room for an answer of 64 tokens in the teacher's context of 64"):
        api.train(config("run", answers={"max_tokens": 64}), quiet=True)
    assert not Path(config("run").out).exists() and not folder.exists()


def test_prompts_without_a_teacher_are_refused(asking, student, tmp_path):
    config, _ = asking
    raw = settings_of.to_dict(config("run"))
    with pytest.raises(SettingsError, match="format=prompts: a teacher answers them"):
        settings_of.parse(RunConfig, raw | {"distill": None}, "test")
    with pytest.raises(SettingsError, match="distill.answers would be ignored"):
        student(tmp_path / "run", answers={"max_tokens": 3})


def test_what_cannot_teach_is_refused(student, online, corpus, tmp_path):
    with pytest.raises(SettingsError, match="nobody to learn from; set distill.teacher"):
        load_distill("distill")
    Tokenizer.train(["another text, and other pieces of it"] * 9, 300, tmp_path / "tokenizer")
    raw = small.settings(corpus, tmp_path / "run", data__tokenizer=str(tmp_path / "tokenizer"), model=STUDENT)
    raw["distill"] = {"teacher": str(online.folder)}
    with pytest.raises(SettingsError, match="has another tokenizer .*its probabilities are of other tokens"):
        api.train(load_distill(_written(raw, tmp_path))[0], quiet=True)
