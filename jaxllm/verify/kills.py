"""Row 1: runs that are killed and started again."""

import time
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.lab import Found, Lab, differences, leftovers

#: Of the kills, this share waits for a save to begin.
IN_A_SAVE = 0.8
#: Seconds after which a run that has not saved is not going to.
PATIENCE = 120


def killed(lab: Lab) -> Found:
    """SIGKILL at random instants, chained: what the run ends with is what an uninterrupted one ends with."""
    kills = lab.count(6, 100)
    # More steps than the kills can cost: each lets one or two saves pass.
    steps = 8 * (kills + 2)
    whole, out = lab.folder / "whole", lab.folder / "killed"
    lab.train(lab.settings(whole, train__steps=steps))
    settings = lab.settings(out, train__steps=steps)
    during = sum(_kill_once(lab, settings, out) for _ in range(kills))
    lab.train(settings)
    failures = differences(whole, out) + [f"left behind: {name}" for name in leftovers(out)]
    if during < kills / 2:
        failures.append(f"only {during} of {kills} kills fell into a save, so saves were hardly tried")
    figure = f"{kills} kills, {during} during a save; {steps} losses and gradient norms compared bit by bit"
    return Found(kills, tuple(failures), figure)


def _kill_once(lab: Lab, settings: Path, out: Path) -> bool:
    """Starts the run, kills it somewhere, and says whether a save was being written."""
    with lab.started(settings) as process:
        known, deadline = _saved(out), time.monotonic() + PATIENCE
        if lab.random.random() < IN_A_SAVE:
            wait_for = lab.random.choice((1, 1, 2))
            while len(_saved(out) - known) < wait_for - 1 or not saving(out):
                _still_running(process, deadline)
            time.sleep(lab.random.uniform(0, 0.02))
        else:
            while not _saved(out) - known:
                _still_running(process, deadline)
                time.sleep(0.01)
            time.sleep(lab.random.uniform(0, 0.2))
        process.kill()
        process.wait()
    return saving(out)


def _still_running(process, deadline: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        raise UserError(f"the run ended before it could be killed: {process.said()[-500:]}")


def _saved(out: Path) -> set[str]:
    folder = out / "checkpoints"
    return {path.parent.name for path in folder.glob("*/manifest.json")} if folder.exists() else set()


def saving(out: Path) -> bool:
    return any((out / "checkpoints").glob("*.unfinished"))
