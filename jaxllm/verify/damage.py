"""Rows 5 and 6: damaged checkpoints, and runs that must not start over."""

import shutil
from pathlib import Path

from jaxllm.verify.crash import state
from jaxllm.verify.lab import Found, Lab, metrics, said


def damaged(lab: Lab) -> Found:
    """Each file of the newest step truncated, emptied, deleted and with a bit flipped: noticed; an older is taken."""
    import jax

    from jaxllm.checkpoint import CheckpointConfig, Checkpoints

    whole = lab.folder / "whole"
    with said(), Checkpoints(whole, CheckpointConfig(keep=9)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"settings": {"lr": 1e-05}, "step": step})
    files = sorted(path.relative_to(whole) for path in (whole / "2").rglob("*") if path.is_file())
    cases = [(name, kind) for name in files for kind in KINDS]
    while len(cases) < 100:  # flipped bits lie elsewhere each time
        cases.append((lab.random.choice(files), "bit flipped"))
    failures = []
    for number, (name, kind) in enumerate(cases):
        folder = lab.folder / str(number)
        shutil.copytree(whole, folder)
        damage(folder / name, kind, lab.random)
        with said() as lines, Checkpoints(folder) as checkpoints:
            try:
                step = checkpoints.restore(jax.eval_shape(lambda: state(0))).step
            except Exception as error:  # a step was whole, so no error is right
                step = type(error).__name__
        warnings = [text for text in lines if "damaged" in text]
        if isinstance(step, str):
            failures.append(f"{name} {kind}: {step} instead of the step before")
        elif step != 1:
            failures.append(f"{name} {kind}: not noticed")
        elif len(warnings) != 1:
            failures.append(f"{name} {kind}: {len(warnings)} lines, not one: {warnings}")
        shutil.rmtree(folder)
    noticed = len(cases) - len(failures)
    figure = f"{len(cases)} kinds of damage to {len(files)} files, {noticed} noticed, the step before taken"
    return Found(len(cases), tuple(failures), figure)


KINDS = ("truncated", "emptied", "deleted", "bit flipped")


def damage(path: Path, kind: str, random) -> None:
    """Does one kind of damage to a file. What has nothing to lose is deleted."""
    data = bytearray(path.read_bytes())
    if kind == "deleted" or not data:
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: random.randrange(len(data))])
    else:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)


def refused(lab: Lab) -> Found:
    """A run whose checkpoints are all damaged or gone, or whose settings differ, never trains from scratch unasked."""
    out = lab.folder / "run"
    lab.train(lab.settings(out))
    failures = []
    for name, spoil in CASES.items():
        folder = lab.folder / name.replace(" ", "-")
        shutil.copytree(out, folder)
        overrides = spoil(folder, lab.random) or []
        settings, before = lab.settings(folder), metrics(folder)
        with lab.started(settings, overrides) as process:
            code = process.wait(120)
        text = process.said()
        if code != 2 or "error: " not in text or "Traceback" in text:
            failures.append(f"{name}: exit code {code}, not a refusal: {text[-300:]}")
        if metrics(folder) != before:
            failures.append(f"{name}: the metrics of the run were written over")
    return Found(
        len(CASES), tuple(failures), f"{len(CASES)} ways to have no checkpoint of these settings, each refused"
    )


def _all_damaged(folder: Path, random) -> None:
    for path in (folder / "checkpoints").glob("*/params/**/*"):
        if path.is_file():
            path.write_bytes(b"")


def _all_gone(folder: Path, random) -> None:
    shutil.rmtree(folder / "checkpoints")


def _no_manifests(folder: Path, random) -> None:
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        path.unlink()


def _other_learning_rate(folder: Path, random) -> list[str]:
    return ["optim.lr=0.5"]


def _other_model(folder: Path, random) -> list[str]:
    return ["model.layers=3"]


def _other_data(folder: Path, random) -> list[str]:
    return ["data.heldout=0.2"]


CASES = {
    "all damaged": _all_damaged,
    "all gone": _all_gone,
    "no manifests": _no_manifests,
    "another learning rate": _other_learning_rate,
    "another model": _other_model,
    "other data": _other_data,
}
