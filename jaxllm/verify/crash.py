"""Row 2: a process that ends at each point inside a save and the deletion that follows it."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.lab import Found, Lab, said

#: Exit code of a process that ended where it was told to.
ENDED = 9


def exits(lab: Lab) -> Found:
    """Ends a process at lines of the code that saves and deletes, and opens what it leaves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxllm.checkpoint"])
    lines = _save(context, lab.folder / "whole", 0)
    wanted = min(lab.count(24, lines), lines)
    points = [1 + int(lines * (part + lab.random.random()) / wanted) for part in range(wanted)]  # one in each part
    failures, ended, newest = [], 0, 0
    for point in points:
        folder = lab.folder / str(point)
        _save(context, folder, point)
        committed = 2 if (folder / "2/manifest.json").exists() else 1
        ended, newest = ended + 1, newest + (committed == 2)
        failures += [f"line {point} of {lines}: {text}" for text in _opened(folder, committed)]
    if not 0 < newest < ended:
        failures.append(f"{newest} of {ended} points lie after the commit: one side was not tried")
    figure = (
        f"{ended} of {lines} points; {newest} after the commit, {ended - newest} before it; each opened at its commit"
    )
    return Found(ended, tuple(failures), figure)


def _save(context, folder: Path, point: int) -> int:
    """Saves twice in a process of its own, which ends at the `point`-th line of the second; lines until the end."""
    folder.mkdir()
    process = context.Process(target=_child, args=(str(folder), point))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"a save hung at point {point}")
    if process.exitcode not in (0, ENDED):
        raise RuntimeError(f"the saving process ended with {process.exitcode} at point {point}")
    counted = folder / "lines"
    return int(counted.read_text()) if counted.exists() else 0


def state(step: int) -> dict:
    import jax.numpy as jnp

    return {"params": {"w": jnp.full((64, 64), step, jnp.float32)}, "opt": {"m": jnp.full(64, -step, jnp.float32)}}


def _child(folder: str, point: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jaxllm.checkpoint as package
    from jaxllm.checkpoint import CheckpointConfig, Checkpoints

    inside, count = str(Path(package.__file__).parent), 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(inside):
            return None
        if event == "line":
            count += 1
            if count == point:
                os._exit(ENDED)
        return trace

    with Checkpoints(folder, CheckpointConfig(keep=1, keep_best=False)) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        threading.settrace(trace)
        sys.settrace(trace)
        checkpoints.save(2, state(2), {})
        checkpoints.wait()
        sys.settrace(None)
        threading.settrace(None)
    Path(folder, "lines").write_text(str(count))


def _opened(folder: Path, committed: int) -> list[str]:
    """What is wrong with a folder once it is opened again."""
    import jax
    import numpy as np

    from jaxllm.checkpoint import Checkpoints

    (folder / "lines").unlink(missing_ok=True)
    out = []
    try:
        with said(), Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(jax.eval_shape(lambda: state(0)))
    except UserError as error:
        return [str(error)]
    if restored is None or restored.step != committed:
        return [f"opened at {restored and restored.step}, not at {committed}"]
    for name, array in (("params", restored.state["params"]["w"]), ("opt", restored.state["opt"]["m"])):
        if not (np.asarray(array) == (committed if name == "params" else -committed)).all():
            out.append(f"{name} are not those of step {committed}")
    inside = {path.name for path in folder.iterdir()} - {".lock", "1", "2"}
    return out + [f"left behind: {name}" for name in sorted(inside)]
