"""Where metrics go: metrics.jsonl always; TensorBoard and Weights & Biases where they are asked for. Loads no jax."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from jaxllm.errors import DataError, MissingExtra


class Writer(Protocol):
    """Takes one step's metrics at a time."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a step, on disk as soon as it is written; null for what is not finite.

    A run that resumes after `last_step` loses the lines of later steps (they are computed again) and a last line
    that was cut off. Raises DataError when another line is damaged. The folder must be on a file system that can
    append, so not in an object store.
    """

    def __init__(self, path: Path, last_step: int | None = None):
        keep = [] if last_step is None else _lines_up_to(path, last_step)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(keep), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was cut off. Raises DataError with file and line."""
    return [row for row, _ in _rows(path)]


def _lines_up_to(path: Path, last_step: int) -> list[str]:
    return [line for row, line in _rows(path) if row["step"] <= last_step] if path.exists() else []


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no integer `step`")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(f"{path}, line {number}: {error}; remove the line to go on") from None
        rows.append((row, line if line.endswith("\n") else line + "\n"))
    return rows


class TensorBoardWriter:
    """Scalars in the event files of TensorBoard (`tensorboard --logdir`)."""

    def __init__(self, folder: Path):
        try:
            from tensorboard.summary import Writer as EventWriter
        except ImportError:
            raise MissingExtra("logging to TensorBoard", "tensorboard", "tensorboard") from None
        self.events = EventWriter(str(folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class WandbWriter:
    """A run at Weights & Biases with the run folder's name as its id, so that a resumed run goes on in the same one."""

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise MissingExtra("logging to Weights & Biases", "wandb", "wandb") from None
        self.run = wandb.init(
            project=project, id=folder.name, name=folder.name, dir=str(folder), config=settings, resume="allow"
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()
