"""Row 4: a disk that is full for a while, or to the end. A limit on the size of files stands in for it."""

import re
import resource
from pathlib import Path

from jaxllm.verify.lab import PATIENCE, Found, Lab, differences, last_step, leftovers, saved_steps, until

#: Bytes of a file at most: enough for metrics and figures, too few for the weights of a model that is so wide.
LIMIT = 150_000
EMBED = 128
STEPS = 60


def full(lab: Lab) -> Found:
    """Older steps stay whole, training goes on and says so, and the next save works once there is space."""
    changes = {"train__steps": STEPS, "checkpoint__keep": 100}
    if lab.run_file is None:
        changes |= {"model__embed": EMBED}
    whole, failures = lab.folder / "whole", []
    lab.train(lab.settings(whole, **changes))
    for name, recovers in (("for a while", True), ("to the end", False)):
        out = lab.folder / ("recovers" if recovers else "stays")
        settings = lab.settings(out, **changes)
        problems = _run(lab, settings, out, recovers)
        if not problems:
            lab.train(settings)
            problems = differences(whole, out) + [f"left behind: {text}" for text in leftovers(out)]
        failures += [f"full {name}: {text}" for text in problems[:3]]
    return Found(2, tuple(failures), "for a while and to the end: older steps whole, training went on, said in a line")


def _run(lab: Lab, settings: Path, out: Path, recovers: bool) -> list[str]:
    with lab.started(settings) as process:
        until(process, lambda: saved_steps(out))
        before = saved_steps(out)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        until(process, lambda: "was not saved in" in process.said())
        if recovers:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, text = process.wait(PATIENCE), process.said()
    problems = []
    if not re.search(rf"step \d+ was not saved in {re.escape(str(out))}\S*: .*needs .*are free", text):
        problems.append(f"the message lacks path, need or have: {text[-400:]}")
    if "Traceback" in text:
        problems.append("a traceback instead of a line")
    if missing := before - saved_steps(out):
        problems.append(f"older steps are gone: {sorted(missing)}")
    if (last := last_step(out)) != STEPS:
        problems.append(f"training went on to step {last} of {STEPS}")
    problems += [f"left behind by the failed save: {name}" for name in leftovers(out)]
    if recovers and code:
        problems.append(f"exit code {code} though the last save worked: {text[-300:]}")
    if recovers and STEPS not in saved_steps(out):
        problems.append("no save worked once there was space")
    if not recovers and "the same command goes on" not in text:
        problems.append(f"no word of what to do next: {text[-300:]}")
    if not recovers and code == 0:
        problems.append("exit code 0 though the last save failed")
    return problems
