"""The signals that end a run: a flag between two steps, and an exit where nothing is to be saved."""

import os
import signal

import pytest
from processes import run

from jaxllm.checkpoint import Preemption

LOOP = """
with Preemption() as preemption:
    print("ready", flush=True)
    step = 0
    while not preemption.reached(step):
        time.sleep(0.02)
        step += 1
    print(preemption.signal.name, flush=True)
    if len(sys.argv) > 1:
        time.sleep(60)
time.sleep(60) if len(sys.argv) > 2 else None
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_a_second_one_exits(number):
    gentle, harsh = run(LOOP), run(LOOP, "stay")
    for process in (gentle, harsh):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    harsh.send_signal(number)
    assert gentle.wait(30) == 0 and harsh.wait(30) == 128 + number
    assert "once more to exit at once" in gentle.stderr.read()


#: Minutes within one call into C, as a compilation is: no handler of Python's runs meanwhile.
BUSY = """
import hashlib
with Preemption(idle=sys.argv[1] == "idle", exit_code=3) as preemption:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("idle", ["idle", "at work"])
def test_a_compiler_does_not_hold_signals_up(idle):
    """With nothing new to save the first signal exits, else the second one: at once, not after minutes."""
    process = run(BUSY, idle)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    if idle == "at work":
        assert [process.stderr.readline(), process.stderr.readline()][1].startswith("SIGTERM: saving after this step")
        process.send_signal(signal.SIGTERM)
    code = process.wait(20)
    assert code == (3 if idle == "idle" else 128 + signal.SIGTERM)
    assert ("nothing new to save" in process.stderr.read()) == (idle == "idle")


def test_ctrl_c_before_the_first_step_is_python_s_own():
    """A cell of a notebook that is interrupted must not take the notebook along."""
    with pytest.raises(KeyboardInterrupt), Preemption(idle=True):
        os.kill(os.getpid(), signal.SIGINT)
    with Preemption(idle=True) as preemption:
        preemption.begin()
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached(1)


def test_preemption_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) != before[0] and not preemption.reached(0)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
