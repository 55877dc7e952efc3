"""`jaxllm bench peers`: who takes part, what is compared with what, and that the peers' programs run."""

import json
import os
import subprocess
import sys

import pytest
import tiny

from jaxllm import bench, bench_peers, launch
from jaxllm.bench_peers import Measured, Peers, contenders, sizes
from jaxllm.errors import ResourceError, SettingsError

TINY = bench.Workload(tiny.config(), rows=2, length=16, steps=3)
ALL = Peers(torch=sys.executable, maxtext=sys.executable, nanodo=".")


def test_who_takes_part():
    torch = ["PyTorch", "torch.compile", "transformers"]
    maxtext = ["MaxText", "MaxText, its defaults"]
    assert list(contenders("W1", ALL)) == ["jaxllm", *torch, *maxtext, "nanodo"]
    assert list(contenders("W2", ALL)) == ["jaxllm", "transformers", *maxtext]
    assert list(contenders("LoRA", ALL)) == ["jaxllm", "peft"]
    assert list(contenders("W3", Peers())) == ["jaxllm"]
    for goals in bench_peers.GOALS.values():
        for name, wanted in goals.items():
            assert set(wanted) <= set(contenders(name, ALL))


def test_ratios_are_of_one_round(monkeypatch, capsys):
    """The machine slows down by and by; within a round it is the same for all."""
    times = {"jaxllm": iter([1.0, 2.0, 4.0]), "PyTorch": iter([1.5, 3.0, 6.0])}
    monkeypatch.setattr(
        bench_peers,
        "contenders",
        lambda *_: {
            who: lambda steps, who=who: Measured(next(times[who]), 130.0 if who == "jaxllm" else 100.0, who)
            for who in times
        },
    )
    monkeypatch.delenv(launch.TUNABLES, raising=False)
    ours, theirs = bench_peers.bench_peers(["W1"], peers=Peers(), rounds=3)
    assert theirs["ratio"] == 1.5 and theirs["memory_ratio"] == 1.3 and ours["step_ms"] == 2000
    assert ours["tokens_per_second"] == 16 * 256 / 2 and theirs["goal"] == 0.9 and theirs["memory_goal"] == 1.3
    said = capsys.readouterr().out
    assert "jaxllm is 1.50 times as fast (goal: at least 0.9), with 1.30 times the memory (goal: at most 1.3)" in said


def test_the_goals_of_the_fast_profile_are_its_own(monkeypatch):
    fast = ":".join(f"{key}={value}" for key, value in launch.FAST_TUNABLES.items())
    monkeypatch.setenv(launch.TUNABLES, fast)
    runs = {"jaxllm": [Measured(1.0, 1.0, "")], "PyTorch": [Measured(1.0, 1.0, "")]}
    _, theirs = bench_peers._rows("W1", runs)
    assert theirs["goal"] == 1.0 and theirs["memory_goal"] is None


def test_peak_memory_is_that_of_the_process():
    text, peak = bench_peers._run([sys.executable, "-c", "x = b'1' * 300_000_000; print('done')"], dict(os.environ))
    assert text == "done\n" and 300 < peak < 400
    with pytest.raises(ResourceError, match="exit code 3: gone"):
        bench_peers._run([sys.executable, "-c", "import sys; print('gone'); sys.exit(3)"], dict(os.environ))


def test_our_own_step_with_adapters(monkeypatch, capsys):
    monkeypatch.setitem(bench.WORKLOADS, "W1", TINY)
    bench_peers.main("LoRA", "2")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["steps"] == 2 and row["step_ms"] > 0 and row["parameters"] > row["active"]


def test_what_a_user_can_get_wrong(tmp_path):
    with pytest.raises(SettingsError, match="no such workload: W4; did you mean W3"):
        bench_peers.bench_peers(["W4"], peers=Peers())
    with pytest.raises(SettingsError, match="rounds=0"):
        bench_peers.bench_peers(["W1"], peers=Peers(), rounds=0)
    with pytest.raises(SettingsError, match=f"--torch {tmp_path}/python: no such file"):
        Peers(torch=str(tmp_path / "python"))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["eager", "transformers", "peft", "experts"])
def test_steps_of_torch(kind):
    """The program of each kind takes its steps and says with what."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    size = sizes(bench.WORKLOADS["W1"]) | {"vocab": 64, "embed": 32, "layers": 1, "heads": 4, "kv_heads": 2, "ffw": 48}
    size |= {"rows": 2, "length": 16} | ({"experts": 4, "experts_per_token": 2} if kind == "experts" else {})
    command = [sys.executable, str(bench_peers.SCRIPTS / "peer_torch.py")]
    command += ["transformers" if kind == "experts" else kind, json.dumps(size), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    row = bench_peers._last(done.stdout)
    assert len(row["seconds"]) == 3 and row["flags"].startswith("torch 2.")
