"""Where metrics go: metrics.jsonl always; TensorBoard and Weights & Biases where they are asked for. Loads no jax."""

import errno
import json
import math
import os
import uuid
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
    append, so not in an object store. A line that a full disk cuts is taken back, so that later ones can follow.
    """

    def __init__(self, path: Path, last_step: int | None = None):
        keep = [] if last_step is None else _lines_up_to(path, last_step)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(keep), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line, end = (json.dumps({"step": step, **row}) + "\n").encode(), self.file.seek(0, os.SEEK_END)
        if self.file.write(line) != len(line):
            self.file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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
    """Scalars in the event files of TensorBoard (`tensorboard --logdir`).

    Where a run resumes after `last_step`, TensorBoard is told to forget later points: they are computed again.
    """

    def __init__(self, folder: Path, last_step: int | None = None):
        try:
            from tensorboard.summary import Writer as EventWriter
        except ImportError:
            raise MissingExtra("logging to TensorBoard", "tensorboard", "tensorboard") from None
        _mark_start(folder, 0 if last_step is None else last_step + 1)
        self.events = EventWriter(str(folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


def _mark_start(folder: Path, step: int) -> None:
    """TensorBoard takes the second mark and those that follow for restarts, and drops what it has from `step` on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    events = EventFileWriter(str(folder))
    events.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    events.close()


class WandbWriter:
    """A run at Weights & Biases. Its id lies in the run folder, so that a resumed run goes on in the same one."""

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise MissingExtra("logging to Weights & Biases", "wandb", "wandb") from None
        path = folder / "wandb-id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=project, id=path.read_text(), name=folder.name, dir=str(folder), config=settings, resume="allow"
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()
