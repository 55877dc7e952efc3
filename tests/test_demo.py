"""The demo's small parts: the clock, and what it tells the user to type next."""

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxllm import cli, demo
from jaxllm.optim.schedules import make_schedule
from jaxllm.train.load import load_run

SUMMARY = {"bits_per_byte": 1.5, "perplexity": 9.0, "params": 3, "tokens": 4}


@pytest.mark.parametrize("overrides", [[], ["optim.schedule.warmup=100"], ["optim.schedule.warmup=null"]])
@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_a_slow_machine_still_gets_a_schedule(name, overrides):
    config, _ = load_run(name, overrides)
    steps = demo.fewest_steps(config)
    rate = make_schedule(demo.with_steps(config, steps).optim, steps)
    assert 20 <= steps <= 200 and rate(steps - 1) < max(map(rate, range(steps)))


@pytest.mark.parametrize("folder", ["runs/demo", "my runs/demo"])
def test_what_to_try_next_can_be_typed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    text = demo.farewell(SimpleNamespace(folder=Path(folder), summary=SUMMARY), 300.0)
    commands = [shlex.split(line) for line in text.partition("Try next:\n")[2].splitlines()]
    assert len(commands) == 3
    for words in commands:
        assert Path(words[0]).absolute().parent == Path(sys.executable).parent
        args = cli.parse(words[1 if words[1] != "-m" else 3 :])
        assert getattr(args, "checkpoint", folder) == folder
        assert all(Path(path).is_file() for source in getattr(args, "data", None) or () for path in source)
    load_run(args.config, args.overrides)


@pytest.mark.parametrize("active", [True, False])
def test_the_command_is_named_as_it_can_be_found(active, tmp_path, monkeypatch):
    script = tmp_path / ".venv/bin/jaxllm"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", os.pathsep.join([str(script.parent)] * active + ["/usr/bin"]))
    assert demo.command_name() == ("jaxllm" if active else ".venv/bin/jaxllm")
    script.unlink()
    assert demo.command_name() == ".venv/bin/python -m jaxllm.cli"


def test_a_second_demo_takes_the_steps_of_the_first_unless_its_time_was_another(tmp_path, monkeypatch):
    clock, trained = iter([0.0, 0.0, 60.0, 0.0, 60.0, 0.0, 90.0, 0.0, 0.0, 60.0]), []
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(demo, "seconds_per_step", lambda config: 0.1)
    monkeypatch.setattr(demo, "RunFolder", lambda config: SimpleNamespace(tokenizer_dir="", open_tokenizer=tokenizer))
    monkeypatch.setattr(demo, "prepare", lambda *_: {})
    tokenizer = lambda _: SimpleNamespace(save=lambda folder: None)  # noqa: E731

    def train(config):
        trained.append(config.train.steps)
        return SimpleNamespace(status="preempted", folder="x", summary={"steps": 1})

    monkeypatch.setattr(demo, "train", train)
    for _ in range(4):  # measured; remembered; remembered, and too slow; measured
        demo.demo(minutes=1.0, out="x", overrides=[f"data.cache={tmp_path}"])
    assert trained == [395] * 4 and next(clock, None) is None, "the clock is read once more to measure"
    demo.remember_steps(config := load_run("demo", [f"data.cache={tmp_path}"])[0], 1.0, 300)
    assert demo.known_steps(config, 1.0) == 300 and demo.known_steps(config, 2.0) is None
    (tmp_path / "demo.json").write_text("[")
    assert demo.known_steps(config, 1.0) is None
