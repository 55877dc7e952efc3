import os

import pytest
import yaml

from jaxllm.errors import DataError
from jaxllm.train.runs import compare_runs, list_runs, read_run, write_summary
from jaxllm.train.writers import JsonlWriter

SUMMARY = {"params": 3_140_000, "steps": 100, "tokens": 1_638_400, "loss": 2.5, "bits_per_byte": 1.25}
SETTINGS = {"model": {"embed": 256, "pattern": [{"window": 4}]}, "optim": {"lr": 0.001, "name": "adamw"}}


def make_run(root, name, settings=SETTINGS, status="finished", when=0, **summary):
    folder = root / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    writer = JsonlWriter(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.write(step, {"loss": 3.5 - step / 2, "tokens": 64 * step})
    writer.write(3, {"bits_per_byte": 1.75})
    writer.close()
    if status:
        write_summary(folder, status, **SUMMARY | summary)
    for path in folder.iterdir():
        os.utime(path, (1.7e9 + when, 1.7e9 + when))
    return folder


def line(text, word):
    (found,) = (line for line in text.splitlines() if line.split()[:1] == [word])
    return found.split()


def test_list(tmp_path):
    make_run(tmp_path, "newer", when=60, loss=2.25, tokens_per_second=12_345.0)
    make_run(tmp_path, "older", status="preempted")
    make_run(tmp_path, "killed", status=None, when=120)
    (tmp_path / "notes").mkdir()
    text = list_runs(tmp_path)
    head, _, *rows = text.splitlines()
    assert head.split()[:2] == ["run", "date"] and [row.split()[0] for row in rows] == ["older", "newer", "killed"]
    newer = line(text, "newer")
    assert newer[3:] == ["3.14", "M", "100", "1.64", "M", "2.2500", "1.2500", "12.3", "k", "finished"]
    assert line(text, "older")[-2:] == ["-", "preempted"]
    assert line(text, "killed")[3:] == ["-", "3", "192", "2.0000", "1.7500", "-", "unfinished"]


def test_list_of_a_run_itself_of_nothing_and_of_no_folder(tmp_path):
    run = make_run(tmp_path / "runs", "one")
    assert "one" in list_runs(run)
    (tmp_path / "empty").mkdir()
    assert list_runs(tmp_path / "empty").startswith("no runs in")
    with pytest.raises(DataError, match="none: no such folder"):
        list_runs(tmp_path / "none")


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("settings.yaml", b"a: [1\n", "settings.yaml: not valid YAML at line 2"),
        ("settings.yaml", b"\xff", "settings.yaml: not UTF-8 at byte 0"),
        ("settings.yaml", None, "settings.yaml: no such file"),
        ("summary.json", b"{", "summary.json: "),
        ("summary.json", b"[1]", "summary.json: expected an object"),
        ("metrics.jsonl", b"{}\n{}\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", None, "metrics.jsonl: No such file"),
    ],
)
def test_damage_is_said_and_the_rest_is_shown(tmp_path, file, content, words):
    whole = make_run(tmp_path, "whole")
    broken = make_run(tmp_path, "broken", status=None if file == "metrics.jsonl" else "finished")
    (broken / file).unlink() if content is None else (broken / file).write_bytes(content)
    for text in (list_runs(tmp_path), compare_runs(whole, broken)):
        assert f"note: broken: {words}" in text
        assert "whole" in text and "2.5" in text


def test_a_damaged_summary_falls_back_to_the_metrics(tmp_path):
    folder = make_run(tmp_path, "run")
    (folder / "summary.json").write_text("{")
    assert read_run(folder).summary == {
        "steps": 3,
        "tokens": 192,
        "loss": 2.0,
        "bits_per_byte": 1.75,
        "status": "unfinished",
    }


def test_compare_shows_only_the_settings_that_differ(tmp_path):
    a = make_run(tmp_path, "a")
    other = {"model": {"embed": 256, "pattern": [{"window": 8}]}, "optim": {"lr": 0.002, "name": "adamw", "b1": 0.9}}
    b, c = make_run(tmp_path, "b", other, loss=2.25), make_run(tmp_path, "c", SETTINGS, note="x [bold] y")
    text = compare_runs(a, b, c)
    assert line(text, "optim.lr") == ["optim.lr", "0.001", "0.002", "0.001"]
    assert line(text, "optim.b1") == ["optim.b1", "-", "0.9", "-"]
    assert line(text, "model.pattern.0.window")[1:] == ["4", "8", "4"]
    assert line(text, "loss") == ["loss", "2.5000", "2.2500", "2.5000"]
    assert "model.embed" not in text and "optim.name" not in text and "x [bold] y" in text
    assert compare_runs(a, c).startswith("same settings\n")


def test_compare_runs_of_the_same_name_and_refusals(tmp_path):
    a, b = make_run(tmp_path / "x", "run"), make_run(tmp_path / "y", "run")
    assert str(a) in compare_runs(a, b)
    with pytest.raises(DataError, match="not 1"):
        compare_runs(a)
    with pytest.raises(DataError, match="none: no such folder"):
        compare_runs(a, tmp_path / "none")
    with pytest.raises(DataError, match="holds no run"):
        compare_runs(a, tmp_path)
