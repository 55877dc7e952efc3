"""Row 3: SIGTERM at random instants, during a compilation and during a save; once and twice."""

import shutil
import signal
import time
from pathlib import Path

from jaxllm.verify.lab import PATIENCE, Found, Lab, differences, last_step, leftovers, saved_steps, saving, until

STEPS = 60
#: A second is short beside a compilation, and long beside what a process needs to end.
AT_ONCE = 2.0
#: What makes a save last longer than that, so that a second signal has something to end.
SLOW = """
import time
from jaxllm.checkpoint import Checkpoints
finish = Checkpoints._finish
Checkpoints._finish = lambda *args: (time.sleep(20), finish(*args))
"""


def stopped(lab: Lab) -> Found:
    """What a signal costs is the rest of a step and one save; what it stops goes on bit for bit."""
    whole = lab.folder / "whole"
    lab.train(lab.settings(whole, train__steps=STEPS))
    failures, cases = [], 0
    for number in range(lab.count(1, 25)):
        for name, case in CASES.items():
            out = lab.folder / f"{case.__name__}-{number}"
            settings = lab.settings(out, train__steps=STEPS)
            problems = case(lab, settings, out)
            if not problems:
                lab.train(settings)
                problems = differences(whole, out) + [f"left behind: {text}" for text in leftovers(out)]
            failures += [f"{name}: {text}" for text in problems[:3]]
            cases += 1
            shutil.rmtree(out, ignore_errors=True)
    return Found(cases, tuple(failures), f"{cases} signals ({', '.join(CASES)}); each run went on to the same bits")


def _in_a_step(lab: Lab, settings: Path, out: Path) -> list[str]:
    with lab.started(settings) as process:
        until(process, lambda: last_step(out) >= 3)
        time.sleep(lab.random.uniform(0, 0.2))
        return _ends_well(process, out)


def _in_a_save(lab: Lab, settings: Path, out: Path) -> list[str]:
    with lab.started(settings) as process:
        until(process, lambda: saving(out))
        return _ends_well(process, out)


def _in_the_first_compilation(lab: Lab, settings: Path, out: Path) -> list[str]:
    """Programs are not found in a cache here, so that there is something to interrupt."""
    environ = lab.environ(JAX_ENABLE_COMPILATION_CACHE="false")
    with lab.started(settings, env=environ) as process:
        until(process, lambda: "attention: " in process.said())  # said while the step is traced
        time.sleep(lab.random.uniform(0, 0.3))
        if last_step(out) >= 1:
            return ["the run was past its compilation when the signal came"]
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.wait(PATIENCE)
        took = time.monotonic() - start
    if took > AT_ONCE:
        return [f"the process took {took:.1f} s to end, with nothing new to save"]
    return [f"step {step} was saved" for step in saved_steps(out)]


def _twice(lab: Lab, settings: Path, out: Path) -> list[str]:
    """The save would take much longer: what ends the process within seconds is the second signal."""
    code = f"import sys{SLOW}from jaxllm.cli import main; sys.exit(main(sys.argv[1:]))"
    with lab.started(settings, command=["-c", code]) as process:
        until(process, lambda: saving(out))
        process.send_signal(signal.SIGTERM)
        until(process, lambda: "once more to exit at once" in process.said())
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, took = process.wait(PATIENCE), time.monotonic() - start
    problems = [] if code == 128 + signal.SIGTERM else [f"exit code {code}: {process.said()[-300:]}"]
    return problems + ([f"the second signal took {took:.1f} s"] if took > AT_ONCE else [])


CASES = {
    "in a step": _in_a_step,
    "in a save": _in_a_save,
    "in the first compilation": _in_the_first_compilation,
    "twice": _twice,
}


def _ends_well(process, out: Path) -> list[str]:
    """One signal: the step in progress is finished and saved, and no other one is begun."""
    process.send_signal(signal.SIGTERM)
    before = last_step(out)  # after the signal, so that a delay here counts for the run and not against it
    code, last = process.wait(PATIENCE), last_step(out)
    problems = [f"exit code {code}: {process.said()[-300:]}"] if code else []
    # The metrics are one step behind what runs; the step that the signal met, and the one already dispatched.
    problems += [f"{last - before} steps after the signal"] if last - before > 3 else []
    saved = max(saved_steps(out), default=0)
    return problems + ([f"step {last} is the last, {saved} was saved"] if saved != last else [])
