"""Row 1: runs that are killed and started again."""

import time
from pathlib import Path

from jaxllm.verify.lab import Found, Lab, differences, leftovers, saved_steps, saving, strays, until

#: Of the kills, this share waits for a save to begin.
IN_A_SAVE = 0.8


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
    failures = differences(whole, out) + [f"left behind: {name}" for name in leftovers(out) + strays(whole, out)]
    if during < kills / 2:
        failures.append(f"only {during} of {kills} kills fell into a save, so saves were hardly tried")
    figure = f"{kills} kills, {during} during a save; {steps} losses and gradient norms compared bit by bit"
    return Found(kills, tuple(failures), figure)


def _kill_once(lab: Lab, settings: Path, out: Path) -> bool:
    """Starts the run, kills it somewhere, and says whether a save was being written."""
    with lab.started(settings) as process:
        known = saved_steps(out)
        if lab.random.random() < IN_A_SAVE:
            others = lab.random.choice((0, 0, 1))
            until(process, lambda: len(saved_steps(out) - known) >= others and saving(out), pause=0)
            time.sleep(lab.random.uniform(0, 0.02))
        else:
            until(process, lambda: bool(saved_steps(out) - known))
            time.sleep(lab.random.uniform(0, 0.2))
        process.kill()
        process.wait()
    return saving(out)
