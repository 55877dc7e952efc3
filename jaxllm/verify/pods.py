"""Row 17: two processes that train as one, and lose one of them."""

import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.lab import Found, Lab, differences, last_step, leftovers, until

STEPS = 20
#: Seconds in which the process that is left has ended.
A_MINUTE = 60


def lost(lab: Lab) -> Found:
    """A process is killed: the other says so and ends within a minute; both go on to the same bits."""
    whole = lab.folder / "whole"
    whole.mkdir()
    _to_the_end(lab, whole)
    failures, slowest, cases = [], 0.0, 0
    for number in range(lab.count(1, 10)):
        for victim in (1, 0):
            out = lab.folder / f"{number}-{victim}"
            out.mkdir()
            problems, seconds = _lose(lab, out, victim)
            slowest, cases = max(slowest, seconds), cases + 1
            if not problems:
                _to_the_end(lab, out)
                problems = differences(whole / "run0", out / "run0")
                # The tokenizer of the run stands there, for hosts that share nothing else.
                problems += [f"left behind: {name}" for name in leftovers(out) if name != "tokenizer"]
            failures += [f"process {victim} killed: {text}" for text in problems[:3]]
    figure = f"{cases} kills of the first or the second; the other ended within {slowest:.1f} s; the same bits after"
    return Found(cases, tuple(failures), figure)


@contextlib.contextmanager
def pair(lab: Lab, out: Path, command: Sequence[str] = (), **changes):
    """Two processes of one run on this machine, with folders of their own and one of checkpoints, as in a pod."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"parallel": {"processes": 2}, "train__steps": STEPS, "checkpoint__folder": str(out / "checkpoints")}
    options |= changes
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                lab.started(
                    lab.settings(out / f"run{rank}", **options),
                    command=command,
                    env=lab.environ(JAX_COORDINATOR_ADDRESS=address, JAX_PROCESS_ID=str(rank)),
                )
            )
            for rank in (0, 1)
        ]


def _to_the_end(lab: Lab, out: Path) -> None:
    with pair(lab, out) as processes:
        for process in processes:
            if code := process.wait(120):
                raise UserError(f"exit code {code} of one of two processes: {process.said()[-500:]}")


def _lose(lab: Lab, out: Path, victim: int) -> tuple[list[str], float]:
    """Kills one of two somewhere; what is wrong with how the other ends, and after how many seconds it did."""
    with pair(lab, out) as processes:
        until(processes[0], lambda: last_step(out / "run0") >= lab.random.randrange(3, STEPS // 2))
        time.sleep(lab.random.uniform(0, 0.05))
        processes[victim].kill()
        start, other = time.monotonic(), processes[1 - victim]
        try:
            code = other.wait(A_MINUTE)
        except Exception:
            return [f"the other was still there after {A_MINUTE} s"], A_MINUTE
        seconds, text = time.monotonic() - start, other.said()
    line = f"error: process {victim} of 2 is gone"
    if code == 0 or line not in text or "Traceback" in text or "Check failure" in text:
        return [f"exit code {code} and no clear line: {text[-300:]}"], seconds
    return [], seconds
