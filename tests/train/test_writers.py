import importlib.util
import json
import subprocess
import sys

import pytest

from jaxllm.errors import DataError, MissingExtra
from jaxllm.train.writers import JsonlWriter, TensorBoardWriter, WandbWriter, read_jsonl


def write(path, steps, last_step=None):
    writer = JsonlWriter(path, last_step)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    writer.close()


def test_a_line_is_on_disk_before_close(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"loss": 2.5, "tokens": 8})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 2.5, "tokens": 8}\n'
    writer.close()


def test_what_is_not_finite_is_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(0, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    writer.close()
    strict = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert strict == {"step": 0, "loss": None, "grad_norm": None, "lr": 0.1}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole.jsonl", range(8))
    write(tmp_path / "parts.jsonl", range(6))
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    write(tmp_path / "parts.jsonl", range(4, 8), last_step=3)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_resume_before_the_first_line_and_a_fresh_run_start_empty(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [0, 1], last_step=7)
    write(path, [0], last_step=-1)
    assert len(read_jsonl(path)) == 1
    write(path, [5])
    assert [row["step"] for row in read_jsonl(path)] == [5]


def test_a_cut_off_last_line_is_left_out_and_a_whole_one_without_newline_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert read_jsonl(path) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1}')
    write(path, [2], last_step=1)
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 2]


def test_a_line_that_a_full_disk_cuts_is_taken_back(tmp_path):
    """The file may grow to 100 bytes, then to any size."""
    code = """
import resource, sys, pathlib
from jaxllm.train.writers import JsonlWriter
writer = JsonlWriter(pathlib.Path(sys.argv[1]))
writer.write(1, {"loss": 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    writer.write(2, {"x" * 100: 0.5})
    sys.exit("the disk was not full")
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(3, {"loss": 0.5})
"""
    path = tmp_path / "m.jsonl"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', ""])
def test_damage_elsewhere_names_file_and_line(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="m.jsonl, line 2"):
        read_jsonl(path)
    with pytest.raises(DataError, match="m.jsonl, line 2"):
        JsonlWriter(path, last_step=0)
    assert path.read_text().count("\n") == 3


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b'{"step": 0}\n\xff\n')
    with pytest.raises(DataError, match="byte 12"):
        read_jsonl(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "package, make",
    [("tensorboard", TensorBoardWriter), ("wandb", lambda folder: WandbWriter(folder, "project", {}))],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.summary", None)
    with pytest.raises(MissingExtra, match=rf"jaxllm\[{package}\]"):
        make(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra [tensorboard]")
def test_tensorboard_events_read_back(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write(3, {"loss": 1.5})
    writer.write(4, {"loss": 9.0})
    writer.close()
    writer = TensorBoardWriter(tmp_path, 3)  # the run resumes after step 3
    writer.write(4, {"loss": 1.25})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("loss")]
    assert values == [(3, 1.5), (4, 1.25)]


def test_wandb_gets_folder_settings_and_steps(tmp_path, monkeypatch):
    calls = []

    class Wandb:
        def init(self, **kwargs):
            calls.append(kwargs)
            return self

        def log(self, metrics, step):
            calls.append((step, metrics))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    (tmp_path / "run7").mkdir()
    writer = WandbWriter(tmp_path / "run7", "project", {"lr": 1})
    writer.write(2, {"loss": 0.5})
    writer.close()
    opened, *rest = calls
    assert (opened["name"], opened["resume"], opened["config"]) == ("run7", "allow", {"lr": 1})
    assert rest == [(2, {"loss": 0.5}), "finish"]
    for folder in ("run7", "other/run7"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        WandbWriter(tmp_path / folder, "project", {})
    assert calls[-2]["id"] == opened["id"] != calls[-1]["id"], (
        "resumed in the same one; another run of that name is not"
    )
