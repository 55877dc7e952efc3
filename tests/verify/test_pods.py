"""Row 17: a run that waits for a process that is gone is found; and how a process hears of it."""

import subprocess
import sys

import pytest
from labs import planted

from jaxllm.verify import pods

QUIET = "from jaxllm.train.lifeline import Lifeline\nLifeline._watch = lambda self: None"


@pytest.mark.slow
def test_a_loss_that_nobody_hears_of_is_found(lab, monkeypatch):
    planted(monkeypatch, QUIET)
    monkeypatch.setattr(pods, "A_MINUTE", 15)
    monkeypatch.setattr(pods, "STEPS", 8)
    found = pods.lost(lab)
    assert len(found.failures) == 2 and not found.passed, found


ONE = """
import os, sys, time, threading
import jax
jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[2]))
from jaxllm.train.lifeline import Lifeline
from jaxllm.errors import UserError
with Lifeline():
    print("up", flush=True)
    if sys.argv[2] == "2":
        sys.stdin.readline()
        if sys.argv[3] == "error":
            raise UserError("no such file")
        os._exit(9)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "error"])
def test_the_others_hear_of_it_from_the_first(how):
    """Three processes, of which the last two are not connected to each other."""
    import os
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([sys.executable, "-c", ONE, address, str(rank), how], env=environ, **pipe) for rank in range(3)
    ]
    try:
        for process in started:
            while process.stdout.readline() != "up\n":
                assert process.poll() is None, process.stderr.read()
        started[2].stdin.write("\n")
        started[2].stdin.flush()
        for process in started[:2]:
            _, err = process.communicate(timeout=30)
            line = next(text for text in err.splitlines() if text.startswith("error: "))
            assert process.returncode == 1 and "process 2 of 3 is gone" in line, err
            assert ("(no such file)" in line) == (how == "error")
    finally:
        for process in started:
            process.kill()
            process.wait()
