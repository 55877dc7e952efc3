"""Row 7: a checkpoint opens on other devices, meshes and numbers of processes, to the same bits."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.golden import KINDS
from jaxllm.verify.lab import MODEL, Found, Lab, metrics, saved_steps
from jaxllm.verify.pods import pair

STEPS = 10
#: How far the next loss may be off, relative: devices add in other orders.
LOSS = 1e-6
#: `(model, the links of a chain)`; a link is `(devices, overrides)` and goes on where the one before it was.
CHAINS = {
    "1 to 8, tensor and context, 2 and 1": (
        MODEL,
        [(1, []), (8, []), (8, ["parallel.tensor=2", "parallel.context=2"]), (2, []), (1, [])],
    ),
}
MORE = {
    "8 to 1 with experts": (KINDS["moe"], [(8, ["parallel.expert=4"]), (1, []), (8, []), (4, ["parallel.tensor=2"])]),
    "tensor to context to data": (
        MODEL,
        [(4, ["parallel.tensor=2"]), (8, ["parallel.context=2"]), (2, ["parallel.fsdp=1", "parallel.data=2"])],
    ),
    "tensor to tensor": (MODEL, [(2, ["parallel.tensor=2"]), (8, ["parallel.tensor=2"]), (4, []), (8, [])]),
}


def moved(lab: Lab) -> Found:
    """1 to 8 to 2 to 1 devices, other meshes, 2 processes to 1: the same state, and the next loss within 1e-6."""
    failures, moves, worst = [], 0, 0.0
    for name, (model, links) in (CHAINS | (MORE if lab.long else {})).items():
        before = None
        for number, (devices, overrides) in enumerate(links):
            out = lab.folder / name.replace(" ", "-") / str(number)
            _run(lab, out, model, devices, overrides, before, step=2 * number)
            if before is not None:
                problems, off = _compare(before, out, 2 * number)
                failures += [f"{name}, link {number}: {text}" for text in problems]
                moves, worst = moves + 1, max(worst, off)
            before = out
    problems, off = _two_to_one(lab)
    failures += [f"2 processes to 1: {text}" for text in problems]
    moves, worst = moves + 1, max(worst, off)
    figure = (
        f"{moves} moves between meshes, one of them from 2 processes to 1: the same bits; next loss within {worst:.0e}"
    )
    return Found(moves, tuple(failures), figure)


def _run(lab: Lab, out: Path, model, devices: int, overrides: Sequence[str], before: Path | None, step: int) -> None:
    """Trains to the end on these devices, from the step that the run `before` saved, or from none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if before is not None:
        shutil.copytree(before, out, ignore=shutil.ignore_patterns("states"))
        for other in saved_steps(out) - {step}:
            shutil.rmtree(out / "checkpoints" / str(other))
    settings = lab.settings(out, model=model, train__steps=STEPS, checkpoint__keep=9)
    with lab.started(settings, overrides, env=lab.environ(devices), command=_noting(lab, out)) as process:
        if code := process.wait(300):
            raise UserError(f"{out.parent.name} on {devices} devices: exit code {code}: {process.said()[-500:]}")


def _noting(lab: Lab, out: Path) -> list[str]:
    return [*lab.module("states"), str(out / "states")]


def _compare(before: Path, after: Path, step: int) -> tuple[list[str], float]:
    """What one run restored beside what the other saved, and their losses at the step after."""
    saved, restored = (
        json.loads((out / f"states/{name}-{step}.json").read_text())
        for out, name in ((before, "saved"), (after, "restored"))
    )
    problems = [f"{path} is not what was saved" for path in saved | restored if saved.get(path) != restored.get(path)]
    a, b = (float.fromhex(metrics(out)[step + 1]["loss"]) for out in (before, after))
    off = abs(a - b) / abs(a)
    if not off <= LOSS:
        problems.append(f"the loss of step {step + 1} is {b}, and {a} where it was saved")
    return problems, off


def _two_to_one(lab: Lab) -> tuple[list[str], float]:
    out, alone = lab.folder / "two", lab.folder / "one"
    out.mkdir()
    options = dict(train__steps=STEPS, checkpoint={"every": 2, "keep": 9, "folder": str(out / "checkpoints")})
    with pair(lab, out, command=_noting(lab, out / "run0"), **options) as processes:
        for process in processes:
            if code := process.wait(300):
                raise UserError(f"exit code {code} of one of two processes: {process.said()[-500:]}")
    shutil.copytree(out / "run0", alone, ignore=shutil.ignore_patterns("states"))
    for other in saved_steps(out) - {4}:
        shutil.rmtree(out / "checkpoints" / str(other))
    settings = lab.settings(alone, **options)
    with lab.started(settings, env=lab.environ(), command=_noting(lab, alone)) as process:
        if code := process.wait(300):
            raise UserError(f"one process after two: exit code {code}: {process.said()[-500:]}")
    return _compare(out / "run0", alone, 4)
