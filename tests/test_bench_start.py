"""`jaxllm bench start`: the clock stops at the first line of metrics, and a demo that fails is said."""

import sys
import time

import pytest

from jaxllm import bench_start
from jaxllm.errors import ResourceError


def test_the_clock_stops_at_the_first_step_and_the_run_is_ended():
    """A stand-in for the command: it writes a step after a second, and would go on for a minute."""
    code = "import sys, time, pathlib; out = pathlib.Path(sys.argv[-1]); out.mkdir(); time.sleep(1)\n"
    code += "(out / 'metrics.jsonl').touch(); time.sleep(0.5); (out / 'metrics.jsonl').write_text('{}'); time.sleep(60)"
    start = time.perf_counter()
    assert 1.5 < bench_start._first_step([sys.executable, "-c", code]) < 10
    assert time.perf_counter() - start < 20


def test_a_demo_without_a_step_is_an_error():
    with pytest.raises(ResourceError, match="no step: no room"):
        bench_start._first_step([sys.executable, "-c", "import sys; sys.exit('no room')"])


def test_medians_beside_their_goals(monkeypatch, capsys):
    times = iter([9.0, 7.0, 6.0, 8.0])
    monkeypatch.setattr(bench_start, "_first_step", lambda command: next(times))
    monkeypatch.setattr(bench_start, "_seconds", lambda command: 0.25)
    assert bench_start.bench_start(rounds=3) == {"help": 0.25, "demo": 7.0}, "the first fills the cache"
    assert "7.00 s (goal: at most 8)" in capsys.readouterr().out
