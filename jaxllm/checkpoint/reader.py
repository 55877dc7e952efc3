"""Finding the newest whole step of a folder, and reading from it without changing anything there."""

import logging
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxllm.checkpoint import arrays, manifest
from jaxllm.checkpoint.together import first_says
from jaxllm.config import read_yaml
from jaxllm.errors import CheckpointError

log = logging.getLogger("jaxllm")
NEXT = "bring a copy back, or train in another run folder"


class Restored(NamedTuple):
    """What a step held: the state (or a part of it), the metadata saved with it, and its number."""

    state: Any
    meta: dict
    step: int


def load(path, abstract=None, *, step: int | None = None, part: str = arrays.PARAMS) -> Restored:
    """The weights of a checkpoint, without the optimizer's state; nothing in the folder is changed.

    `path`: a run folder, its folder of checkpoints, or one step; the newest whole step is taken unless one is named.
    `abstract`: the tree to fill, leaves with shape, dtype and sharding; None gives nested dicts of numpy arrays.
    `part`: path of the subtree to read, such as `params` or `extra/ema`.
    Raises CheckpointError when there is no whole step, or when the arrays are not those of `abstract`.
    """
    folder, step = locate(path, step)
    step, body, damaged = newest_whole(folder, step, items=(arrays.item_of(part) + "/",))
    for number, why in damaged.items():
        log.warning("%s/%d is damaged (%s): using step %d", folder, number, why, step)
    return Restored(arrays.restore(folder / str(step), body["leaves"], abstract, part), body["meta"], step)


def read_meta(path, step: int | None = None) -> tuple[int, dict]:
    """`(step, meta)` of the newest step with a readable manifest, or of `step`; no array is read or verified."""
    folder, step = locate(path, step)
    step, body, _ = newest_whole(folder, step, items=())
    return step, body["meta"]


def peek(folder: epath.Path) -> dict:
    """The metadata that `read_meta` gives, for one process alone: the others need not ask."""
    return _newest_whole(folder, None, items=())[1]["meta"]


def locate(path, step: int | None = None) -> tuple[epath.Path, int | None]:
    """`(folder of checkpoints, step)` for a run folder, a folder of checkpoints, or the folder of one step.

    The checkpoints of a run may lie elsewhere (`checkpoint.folder`); its settings say so.
    """
    folder = absolute(path)
    if not folder.is_dir():
        if folder.is_file():
            pickled = folder.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")
            why = (
                "a pickle file, which can run code and is not read; convert it to safetensors" if pickled else "a file"
            )
            raise CheckpointError(f"{folder} is {why}; give a run folder, a Hugging Face folder or a .gguf file")
        raise CheckpointError(f"{folder}: no such folder; give a run folder, a Hugging Face folder or a .gguf file")
    if folder.name.isdigit() and manifest.sealed(folder):
        return folder.parent, int(folder.name) if step is None else step
    inside, settings = folder / "checkpoints", folder / "settings.yaml"
    if inside.is_dir():
        return inside, step
    elsewhere = (read_yaml(settings).get("checkpoint") or {}).get("folder") if settings.exists() else None
    return absolute(elsewhere) if elsewhere else folder, step


def absolute(path) -> epath.Path:
    """An absolute path, as orbax wants it; `gs://` paths are already."""
    path = epath.Path(path)
    return path.resolve() if manifest.is_local(path) else path


def steps_in(folder: epath.Path) -> list[int]:
    """The saved steps, oldest first."""
    return [step for step in numbered(folder) if manifest.sealed(folder / str(step))]


def numbered(folder: epath.Path) -> list[int]:
    """The numbers of all step folders, whether finished or not, lowest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def newest_whole(folder: epath.Path, step: int | None, items: tuple[str, ...]) -> tuple[int, dict, dict[int, str]]:
    """`(step, manifest, {damaged newer step: why})` of the newest step whose files are those that were written.

    Only the files of `items` are compared. With a `step`, that one and no other.
    Raises CheckpointError when no step is whole, naming what is wrong with each. All processes get the answer of the
    first one, so that they cannot disagree about a file that one of them fails to read; the damage is its to mend.
    """
    found, body, damaged = first_says(lambda: _newest_whole(folder, step, items))
    return found, body, {int(number): why for number, why in damaged.items() if jax.process_index() == 0}


def _newest_whole(folder: epath.Path, step: int | None, items: tuple[str, ...]) -> tuple[int, dict, dict[int, str]]:
    if step is not None and not manifest.sealed(folder / str(step)):
        raise CheckpointError(f"{folder} has no step {step}; saved: {', '.join(map(str, steps_in(folder))) or 'none'}")
    damaged: dict[int, str] = {}
    for number in steps_in(folder)[::-1] if step is None else [step]:
        try:
            body = manifest.read(folder / str(number))
            manifest.verify(folder / str(number), body, items)
        except manifest.Damaged as error:
            damaged[number] = str(error)
            continue
        return number, body, damaged
    reasons = "; ".join(f"step {number}: {why}" for number, why in damaged.items())
    if reasons:
        raise CheckpointError(f"{folder} has no whole checkpoint ({reasons}): {NEXT}")
    files = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))[:4])
    raise CheckpointError(
        f"{folder} has no whole checkpoint, and no config.json of a published model; "
        + (f"did you mean one of its files: {files}?" if files else "give a run folder, a model folder or a .gguf file")
    )
