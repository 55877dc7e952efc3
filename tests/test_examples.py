"""The examples run, in small."""

import importlib
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import small

from jaxllm import config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SOURCES = {"sources": "code", "eval_sources": "prose"}


@pytest.mark.slow
def test_the_notebook_runs(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = small.settings(corpus, "runs/notebook")
    overrides = [f"{section}={json.dumps(value)}" for section, value in raw.items()]
    found = runpy.run_path(str(EXAMPLES / "notebook.py"), init_globals={"overrides": overrides})
    assert found["run"].folder == Path("runs/notebook") and found["run"].summary["steps"] == 8
    assert found["norms"] and all(norm > 0 for norm in found["norms"].values())
    assert found["last"] < found["loss"] and found["after"] != found["before"]
    assert "bits per byte" in capsys.readouterr().out


def test_cells_are_marked():
    """Editors find a cell by `# %%` at the start of a line."""
    cells = (EXAMPLES / "notebook.py").read_text().count("\n# %%")
    assert cells >= 10


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """`sums(seed)`: the lines that examples/arithmetic.py writes, by file."""
    main = runpy.run_path(str(EXAMPLES / "arithmetic.py"))["main"]

    def call(seed):
        folder = tmp_path_factory.mktemp("sums")
        main(str(folder), train=1000, heldout=200, seed=seed)
        return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in folder.iterdir()}

    return call


def test_pairs_are_of_a_right_answer_and_a_wrong_one_that_looks_like_it(sums):
    found = sums(0)
    assert (len(found["pairs"]), len(found["heldout"])) == (1000, 200)
    for pair in found["pairs"] + found["heldout"]:
        a, b = map(int, re.findall(r"\d+", pair["prompt"]))
        assert int(pair["chosen"]) == a + b and len(pair["rejected"]) == len(pair["chosen"])
        assert sum(x != y for x, y in zip(pair["chosen"], pair["rejected"], strict=True)) == 1
    assert found["chats"] == [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in found["pairs"]]


def test_the_answers_alone_do_not_tell_which_one_is_right(sums):
    for lines in (sums(0)["pairs"], sums(0)["heldout"]):
        ways = Counter((pair["chosen"], pair["rejected"]) for pair in lines)
        assert all(ways[wrong, right] == count for (right, wrong), count in ways.items())


def test_held_out_sums_are_no_others_and_the_seed_decides(sums):
    first = sums(0)
    asked = {name: {frozenset(re.findall(r"\d+", p["prompt"])) for p in first[name]} for name in ("pairs", "heldout")}
    assert not asked["pairs"] & asked["heldout"]
    assert sums(0) == first and sums(1)["pairs"] != first["pairs"]
    assert len({pair["prompt"] for pair in first["pairs"] + first["heldout"]}) == 1200


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: a module of scripts/."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


@pytest.mark.slow
def test_the_table_of_preferences_is_made(script, finished, here, tmp_path, capsys):
    small_runs = ("train.steps=12", "train.seq_len=64", "optim.lr=3e-3")
    accuracies = script("dpo_table").main(str(finished.folder), tmp_path / "table", 200, 40, small_runs)
    printed = capsys.readouterr().out
    assert len(accuracies) == 3 and all(0.2 < x < 0.9 for x in accuracies) and len(set(accuracies)) > 1
    assert printed.count("±") == 4 and "40 held-out pairs" in printed


@pytest.mark.slow
def test_the_table_of_distillation_compares_runs_that_differ_in_the_teacher(
    script, finished, corpus, here, tmp_path, capsys
):
    sources = [f"data.{key}=[{{name: {of}, path: '{corpus}/{of}-*.txt'}}]" for key, of in SOURCES.items()]
    student = ["model.embed=16", "model.layers=1", "model.context=64", "train.seq_len=32"]
    student += ["train.steps=4", "optim.schedule.warmup=1"]
    held = script("distill_table").main(str(finished.folder), tmp_path / "table", [*sources, *student], seeds=(3,))
    _, alone, taught, difference = capsys.readouterr().out.splitlines()[2].strip("| ").split(" | ")
    assert float(difference) == pytest.approx(float(taught) - float(alone), abs=2e-4) != 0
    assert held == (float(taught) < float(alone))
    settings = [config.read_yaml(tmp_path / f"table/3/{name}/settings.yaml") for name in ("alone", "taught")]
    assert {key.split(".")[0] for key in config.diff(*settings)} == {"distill", "out"}
    assert settings[0]["train"]["seed"] == settings[0]["data"]["seed"] == 3
    assert list((tmp_path / "table/teacher").iterdir())
