"""The scorecard: each check sees the fault that is planted for it. That rows hold is for `jaxllm verify` to show."""

import json
import logging
import re
import time
from random import Random

import pytest
from labs import few, made, planted

from jaxllm import checkpoint, cli
from jaxllm.errors import DataError, SettingsError
from jaxllm.train.config import RunConfig
from jaxllm.train.load import load_run
from jaxllm.verify import code, crash, damage, disk, files, kills, scorecard, signals, stream, typos
from jaxllm.verify import lab as lab_of
from jaxllm.verify.lab import Found, Lab, said
from jaxllm.verify.page import page
from jaxllm.verify.scorecard import ROWS, Row


def test_rows_are_numbered_described_and_loadable():
    assert len({row.number for row in ROWS}) == len(ROWS) and sorted(row.number for row in ROWS) == [
        row.number for row in ROWS
    ]
    for row in ROWS:
        assert callable(row.load()) and row.promise.endswith(".") and len(row.name) < 29
    with pytest.raises(SettingsError, match="no such row: 99; known: 1 kill -9, 2 exit"):
        scorecard.chosen([99])


def test_a_check_that_breaks_down_or_tries_nothing_has_failed(tmp_path):
    def broken(lab):
        raise ValueError("no luck")

    class Given(Row):
        def load(self):
            return {1: broken, 2: lambda lab: Found(0, (), "nothing"), 3: lambda lab: Found(2, (), "two")}[self.number]

    said = []
    rows = [Given(n, "a", "b.", "") for n in (1, 2, 3)]
    found = scorecard.run(rows, Lab(tmp_path, say=said.append))
    assert [row["passed"] for row in found["rows"]] == [False, False, True]
    assert found["rows"][0]["failures"][0].startswith("ValueError: no luck (broken, line")
    assert sum("FAIL" in text for text in said) == 2 and not list(tmp_path.iterdir()), "scratch folders go"


def test_a_scorecard_goes_on_where_it_was(tmp_path, capsys):
    file = tmp_path / "found.json"
    argv = ["verify", "--resume", "--jobs", "1", "--json", str(file), "--page", str(tmp_path / "page.md")]
    assert cli.main([*argv, "14"]) == 0 and cli.main([*argv, "11"]) == 0
    assert "2 of 2 rows hold" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [row["row"] for row in found["rows"]] == [11, 14]
    # Nothing is left to try; a row that failed keeps its place until it is named.
    rows = [
        {
            "row": row.number,
            "passed": row.number != 3,
            "figure": "f",
            "failures": [],
            "seconds": 1,
            "date": "2020-01-01",
        }
        for row in ROWS
    ]
    file.write_text(json.dumps(found | {"rows": rows}))
    assert cli.main(argv) == 1 and "17 of 18 rows hold" in capsys.readouterr().out
    assert cli.main([*argv, "14"]) == 1
    again = json.loads(file.read_text())["rows"]
    assert [row["figure"] == "f" for row in again] == [row["row"] != 14 for row in again]
    assert f"seed 0, 2020-01-01 to {again[13]['date']}, " in (tmp_path / "page.md").read_text()
    for other, why in (
        ([*argv, "--long"], "tier is quick, and long now"),
        ([*argv, "--seed", "1"], "seed is 0"),
        ([*argv, "--run", "demo"], "run is None"),
    ):
        assert cli.main(other) == 2 and why in capsys.readouterr().err
    file.write_text(file.read_text()[:-20])
    assert cli.main(argv) == 2 and "no file of jaxllm verify --json" in capsys.readouterr().err
    assert cli.main(["verify", "--resume"]) == 2 and "--resume needs --json" in capsys.readouterr().err


def test_the_verb_writes_json_and_a_page_and_says_in_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(typos, "NEAREST", 0.5)
    files = ["--json", str(tmp_path / "found.json"), "--page", str(tmp_path / "page.md")]
    assert cli.main(["verify", "11", "14", "--jobs", "1", *files]) == 0
    assert "2 of 2 rows hold" in capsys.readouterr().out
    text_of_found = (tmp_path / "found.json").read_text()
    found = json.loads(text_of_found)
    text = (tmp_path / "page.md").read_text()
    assert [row["row"] for row in found["rows"]] == [11, 14] and found["versions"]["jax"] in text
    assert all(row.limits in text for row in ROWS)
    assert "Not tried here: rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 17, 18." in text
    found["rows"][0] |= {"passed": False, "failures": ["x was\naccepted | so"]}
    assert "**does not hold**: x was accepted \\| so |\n" in page(found)
    argv = ["verify", "11", "14", "--json", str(tmp_path / "again.json")]
    assert cli.main(argv) == 0, "and two at a time, in processes of their own"
    again = json.loads((tmp_path / "again.json").read_text())
    assert [row["figure"] for row in again["rows"]] == [row["figure"] for row in json.loads(text_of_found)["rows"]]
    assert cli.parse(["verify"]).run_file is None and cli.parse(["verify", "--run", "a.yaml"]).run_file == "a.yaml"
    monkeypatch.setattr(typos, "NEAREST", 1.1)
    assert cli.main(["verify", "11"]) == 1


@pytest.mark.fast
def test_runs_are_compared_to_the_last_bit_and_nothing_may_stay(tmp_path):
    def run(name: str, rows, *others: str):
        for other in ("checkpoints/2/manifest.json", "checkpoints/.lock", *others):
            (tmp_path / name / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / other).touch()
        lines = [json.dumps({"step": step, "loss": loss, "grad_norm": norm}) for step, loss, norm in rows]
        (tmp_path / name / "metrics.jsonl").write_text(
            "\n".join([*lines, json.dumps({"step": 2, "heldout_loss": 1.0})])
        )
        return tmp_path / name

    rows, bit = [(1, 0.5, 1.0), (2, 0.25, 2.0)], 2**-54
    whole = run("whole", rows)
    assert lab_of.differences(whole, run("same", rows)) == [] == lab_of.leftovers(tmp_path / "same")
    for number, other in enumerate([[rows[0], (2, 0.25 + bit, 2.0)], [rows[0], (2, 0.25, 2.0 + 8 * bit)]]):
        assert lab_of.differences(whole, run(f"bit{number}", other))[0].startswith("step 2: "), other
    assert lab_of.differences(whole, run("short", rows[:1])) == ["step 2 is missing"]
    assert lab_of.differences(tmp_path / "short", whole) == ["step 2 is one too many"]
    assert lab_of.differences(whole, run("twice", [(1, 0.7, 1.0), *rows])) == ["3 lines of metrics for 2 steps"]
    assert lab_of.differences(run("none", []), tmp_path / "none") == ["the uninterrupted run has no steps"]
    left = run("left", rows, "checkpoints/4/params/x", "checkpoints/4.unfinished", "settings.tmp")
    assert lab_of.leftovers(left) == ["4", "4.unfinished"] and lab_of.strays(whole, left) == ["settings.tmp"]


@pytest.mark.slow
def test_kills_and_a_resume_that_repeats_a_batch(lab, monkeypatch):
    """Planted: after a kill the run goes on one row too late."""
    few(monkeypatch, 2)
    planted(
        monkeypatch,
        "from jaxllm.train import loop; whole = loop.Trainer.loader\n"
        "loop.Trainer.loader = lambda self, index, done: whole(self, index, done and done + 1)",
    )
    found = kills.killed(lab)
    assert any(re.match(r"step \d+: ", text) for text in found.failures), found


def test_exits_inside_a_save_and_a_marker_that_stays(lab, monkeypatch):
    few(monkeypatch, 8)
    found = crash.exits(Lab(made(lab, "a"), say=lab.say))
    assert found.passed and found.cases == 8, found.failures
    # Planted: what a killed process was writing is not cleared.
    monkeypatch.setattr(checkpoint.Checkpoints, "_remove_unfinished", lambda self: None)
    found = crash.exits(Lab(made(lab, "b"), say=lab.say))
    assert any("left behind: 2.unfinished" in text for text in found.failures), found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads of damage that nobody noticed
def test_damage_and_a_check_that_looks_at_sizes_alone(lab, monkeypatch):
    from jaxllm.checkpoint import manifest

    found = damage.damaged(Lab(made(lab, "a"), say=lab.say))
    assert found.passed and found.cases == 100, found.failures
    monkeypatch.setattr(manifest.zlib, "crc32", lambda *_: 7)
    found = damage.damaged(Lab(made(lab, "b"), say=lab.say))
    assert found.failures and all("bit flipped" in text for text in found.failures), found.failures


@pytest.mark.slow
def test_refusals_and_a_run_that_starts_over(lab, monkeypatch):
    planted(
        monkeypatch,
        "from jaxllm.checkpoint import Checkpoints; from jaxllm.errors import CheckpointError\n"
        "from jaxllm.train.folder import RunFolder; restore = Checkpoints.restore\n"
        "def lenient(self, abstract):\n"
        "    try:\n"
        "        return restore(self, abstract)\n"
        "    except CheckpointError:\n"
        "        return None\n"
        "Checkpoints.restore, RunFolder.refuse_to_start_over = lenient, lambda self: None\n"
        "RunFolder._check = lambda self, saved, where: None",
    )
    found = damage.refused(lab)
    accepted = {text.partition(":")[0] for text in found.failures}
    assert accepted >= {"all damaged", "all gone", "no manifests", "another learning rate"}, found.failures


def test_streams_and_a_loader_that_starts_a_row_late(lab, monkeypatch):
    from jaxllm.data import loader, mixture

    few(monkeypatch, 60)
    found = stream.position(Lab(made(lab, "a"), say=lab.say))
    assert found.passed and found.cases >= 60, found.failures
    with monkeypatch.context() as patch:  # planted: each stage begins at the first row
        patch.setattr(mixture.Mixture, "reached", lambda self, row: {})
        failures = stream.position(Lab(made(lab, "stages"), say=lab.say)).failures
        assert failures and all(text.startswith("a stage boundary: ") for text in failures), failures
    init = loader.Loader.__init__
    monkeypatch.setattr(
        loader.Loader,
        "__init__",
        lambda self, *a, start=0, **k: init(self, *a, start=start + (start > 0), **k),
    )
    assert not stream.position(Lab(made(lab, "b"), say=lab.say)).passed


@pytest.mark.fast
def test_typos_and_settings_that_swallow_unknown_keys(lab, monkeypatch):
    found = typos.typos(lab)
    assert found.passed and found.cases == 300, found.failures
    known = {path for path, _ in typos.paths(RunConfig)}
    assert {"optim.lr", "model.prefix.0.moe.ffw", "train.stages.0.steps", "qat.rules.0.format"} <= known
    monkeypatch.setattr(typos.settings_of, "merge", lambda *_: None)
    assert len(typos.typos(lab).failures) >= 150, "as overrides"
    monkeypatch.setattr(typos.settings_of, "parse", lambda *_: None)
    assert len(typos.typos(lab).failures) >= 300, "and in a file"


@pytest.mark.fast
@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "yaml.load(file)",
        "np.load(file, allow_pickle=True)",
        "def f():\n    return compile(text, '', 'exec')",
    ],
)
def test_what_runs_text_is_found(source):
    assert len(list(code.unsafe(source, "x.py"))) == 1


@pytest.mark.fast
def test_code_templates_and_paths(lab, monkeypatch):
    found = code.no_code(Lab(made(lab, "a"), say=lab.say))
    assert found.passed, found.failures
    assert not list(code.unsafe("step.compile(); re.compile('x'); model.eval(); yaml.safe_load(x)", "x.py"))
    assert not list(code.unsafe("np.load(x, allow_pickle=False)", "x.py"))
    from jaxllm.data import template
    from jaxllm.hf import peft, safetensors

    monkeypatch.setattr(template, "run", lambda text, variables: "<class 'str'>")
    monkeypatch.setattr(safetensors, "Tensors", lambda folder: None)
    read = peft.read_config

    def follows(path):
        """Looks for the base where the adapter says that it is."""
        base = path.parent / json.loads(path.read_text())["base_model_name_or_path"]
        for file in [base] if base.is_file() else base.rglob("adapter_config.json") if base.is_dir() else []:
            file.read_bytes()
        return read(path)

    monkeypatch.setattr(peft, "read_config", follows)
    found = code.no_code(Lab(made(lab, "b"), say=lab.say))
    assert sum("an adapter that names" in text for text in found.failures) == 4, found.failures
    assert len(found.failures) == len(code.ESCAPES) + len(code.PATHS) + 4


@pytest.mark.slow
def test_signals_and_a_run_that_goes_on_after_one(lab, monkeypatch):
    few(monkeypatch, 1)
    planted(
        monkeypatch,
        "from jaxllm.checkpoint import Preemption\nPreemption.reached = lambda self, step: False",
    )
    found = signals.stopped(lab)
    assert any("steps after the signal" in text for text in found.failures), found


@pytest.mark.slow
def test_a_second_signal_that_is_ignored(lab, monkeypatch):
    """Planted: the process ends with its save, which takes seconds, and not at once."""
    fault = "import os, types; from jaxllm.checkpoint import preemption\n"
    fault += "preemption.os = types.SimpleNamespace(**{**vars(os), '_exit': lambda code: None})\n"
    monkeypatch.setattr(signals, "SLOW", signals.SLOW.replace("20", "3") + fault)
    out = lab.folder / "run"
    found = signals._twice(lab, lab.settings(out, train__steps=signals.STEPS), out)
    assert found[0].startswith("exit code 0: ") and found[1].startswith("the second signal took "), found


@pytest.mark.slow
def test_a_signal_in_the_first_compilation_that_waits_for_it(lab, monkeypatch):
    """Planted: nobody knows that there is nothing new to save."""
    planted(
        monkeypatch,
        "from jaxllm.train import loop; whole = loop.Preemption\n"
        "loop.Preemption = lambda idle, exit_code: whole(exit_code=exit_code)",
    )
    out = lab.folder / "run"
    found = signals._in_the_first_compilation(lab, lab.settings(out, train__steps=signals.STEPS), out)
    assert found and ("was saved" in found[0] or "with nothing new to save" in found[0]), found


@pytest.mark.slow
def test_a_full_disk_and_a_failure_that_nobody_hears_of(lab, monkeypatch):
    planted(
        monkeypatch,
        "import logging\nlogging.getLogger('jaxllm').addFilter(lambda record: record.levelno < logging.ERROR)",
    )
    monkeypatch.setattr(disk, "PATIENCE", 30)
    with pytest.raises(ValueError, match="ended too early"):
        disk.full(lab)


@pytest.mark.slow
def test_a_full_disk_and_a_save_that_leaves_something_and_is_forgotten(lab, monkeypatch):
    """Planted: what a failed save wrote stays, and the exit code does not know of it."""
    planted(
        monkeypatch,
        "import dataclasses; from jaxllm.checkpoint import Checkpoints; from jaxllm.train import loop\n"
        "fail, finish = Checkpoints._fail, loop.finish\n"
        "Checkpoints._fail = lambda self, step, error: (fail(self, step, error), self._marker(step).touch())\n"
        "Checkpoints._sweep = lambda self: None\n"
        "loop.finish = lambda *args: dataclasses.replace(finish(*args), saved=True)",
    )
    out = lab.folder / "run"
    settings = lab.settings(out, train__steps=disk.STEPS, checkpoint__keep=100, model__embed=disk.EMBED)
    found = disk._run(lab, settings, out, recovers=False)
    assert found.pop() == "exit code 0 though the last save failed", found
    assert found.pop().startswith("no word of what to do next: "), found
    assert found and all(text.startswith("left behind by the failed save: ") for text in found), found


def test_what_is_logged_is_kept_from_the_screen_and_given(capsys):
    with said() as lines:
        logging.getLogger("jaxllm").warning("a line")
    assert lines == ["a line"] and "a line" not in capsys.readouterr().err


def test_readers_that_crash_hang_or_take_too_much_are_found(monkeypatch):
    def raises(error):
        raise error

    assert files.attempt(lambda: raises(DataError("damaged")), 10) == (None, True)
    assert files.attempt(lambda: None, 10) == (None, False)
    assert files.attempt(lambda: raises(KeyError("w")), 10) == ("KeyError: 'w'", False)
    assert files.attempt(lambda: bytes(30 << 20), 1 << 20)[0].startswith("held 31,")
    monkeypatch.setattr(files, "SECONDS", 0.05)
    assert files.attempt(lambda: time.sleep(0.1), 10)[0] == "took 0.1 s"
    assert "it hangs" in files.attempt(lambda: time.sleep(60), 10)[0], "and does not hang the scorecard"


def test_damage_is_damage():
    """Every kind changes the file; JSON stays JSON where its values are changed."""
    data, random = json.dumps({"a": [1, {"b": "c"}], "d": 2.5}).encode(), Random(0)
    made = [files.mutate(data, random, True) for _ in range(300)]
    assert sum(one != data for one in made) > 290 and len(set(made)) > 200
    assert sum(files._another(json.loads(data), random) != json.loads(data) for _ in range(100)) > 95


def test_ones_own_run_keeps_its_model_and_gets_the_saves_of_a_check(lab):
    lab.run_file = "demo"
    given, _ = load_run("demo")
    found, _ = load_run(lab.settings(lab.folder / "x", train__steps=60))
    assert found.model == given.model and found.data == given.data and found.optim.name == given.optim.name
    assert (found.train.steps, found.checkpoint.every, found.out) == (60, 2, str(lab.folder / "x"))
    load_run(lab.settings(lab.folder / "y"))  # a few steps, and a warmup that fits


def test_ones_own_text_is_cut_too(lab, monkeypatch, tmp_path):
    lab.run_file = str(lab.settings(tmp_path / "mine"))
    monkeypatch.setattr(stream, "_streams", lambda lab: {"your own run": stream._own(lab)})
    few(monkeypatch, 6)
    found = stream.position(lab)
    assert found.cases >= 6 and all("fell inside" in text for text in found.failures), found
    read = stream._read
    monkeypatch.setattr(stream, "_read", lambda stages, start, *of: read(stages, start + (start > 0), *of))
    assert any(text.startswith("your own run: cut after") for text in stream.position(lab).failures)


def test_only_rows_that_are_made_for_it_get_ones_own_run(tmp_path):
    given, lab = {}, Lab(tmp_path, run_file="demo", say=lambda text: None)

    class Given(Row):
        def load(self):
            return lambda lab: given.update({self.number: lab.run_file}) or Found(1, (), "")

    rows = [Given(row.number, row.name, row.promise, "", own=row.own) for row in ROWS]
    scorecard.run(rows, lab)
    assert [number for number, run_file in given.items() if run_file] == [1, 3, 4, 6, 8] and len(given) == len(ROWS)


@pytest.mark.fast
def test_rows_are_listed_and_a_file_that_cannot_be_written_is_said_before_they_run(capsys, tmp_path):
    assert cli.main(["verify", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(ROWS) and all(row.promise in text for row, text in zip(ROWS, listed, strict=True))
    assert cli.main(["verify", "11", "--json", str(tmp_path / "no" / "a.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.fast
def test_ones_own_run_that_is_not_there_is_an_error_at_once(capsys):
    assert cli.main(["verify", "1", "--run", "nope.yaml"]) == 2
    assert "no such settings file: nope.yaml" in capsys.readouterr().err
