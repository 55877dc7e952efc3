"""Row 18: what grows by a little in each step, or stays open after each save, is found."""

import pytest
from labs import few, planted

from jaxllm.verify import soak
from jaxllm.verify.soak import Sample, judge

LEAK = """
import os, threading
from jaxllm.checkpoint import store
from jaxllm.train.recorder import Recorder
push, finish, kept = Recorder.push, store.Checkpoints._finish, []
def leaky_push(self, *args, **named):
    kept.append(b"x" * 200_000)
    return push(self, *args, **named)
def leaky_finish(self, *args):
    finish(self, *args)
    os.open("/dev/null", os.O_RDONLY)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
Recorder.push, store.Checkpoints._finish = leaky_push, leaky_finish
"""


@pytest.mark.slow
def test_memory_threads_and_files_that_leak_are_found(lab, monkeypatch):
    few(monkeypatch, 600)
    planted(monkeypatch, LEAK)
    found = soak.soak(lab)
    assert [text.split(" grew")[0] for text in found.failures if "grew" in text] == ["resident memory"], found
    assert any("threads" in text for text in found.failures) and any("files" in text for text in found.failures)


@pytest.mark.fast
def test_windows_are_compared_and_a_short_look_is_no_look():
    flat = [Sample(step, 100 << 20, 30 + step % 7, 9 + step % 20) for step in range(2000)]
    assert judge(flat, 2000) == ("2000 steps, 100 saves: 100 MiB, +0.0%, no more threads and files", [])
    warm = [Sample(step, (50 if step < 200 else 100) << 20, 1 if step < 200 else 30, 9) for step in range(2000)]
    assert not judge(warm, 2000)[1], "what a process needs at first is no leak"
    grown = [Sample(step, (100 << 20) + 2000 * step, 30 + step // 100, 9 + step // 200) for step in range(2000)]
    figure, failures = judge(grown, 2000)
    assert figure.endswith("+3.0%") and [text.split(" ")[0] for text in failures] == ["resident", "32", "10"], failures
    assert judge(flat[:1500], 2000)[1] == ["200 and 0 looks at the first and the last 200 steps"]
