"""Run folders: what is in them, as a table, and side by side. Loads no jax.

A run folder holds settings.yaml, metrics.jsonl, summary.json, card.md and checkpoints/. What is missing or damaged is
said under the table, and the rest is shown.
"""

import dataclasses
import datetime
import io
import json
import os
from pathlib import Path
from typing import Any

import humanize
from rich import box
from rich.console import Console
from rich.table import Table

from jaxllm import config
from jaxllm.errors import DataError, UserError
from jaxllm.train.writers import read_jsonl

#: What `list_runs` shows of summary.json.
COLUMNS = ("params", "steps", "tokens", "loss", "bits_per_byte", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Run:
    """What could be read of a run folder; `notes` says what could not."""

    folder: Path
    date: datetime.datetime
    settings: dict[str, Any]
    summary: dict[str, Any]
    notes: tuple[str, ...] = ()


def write_summary(folder: Path, status: str, **values: int | float | str | None) -> None:
    """Writes summary.json, whole or not at all: the status (such as finished) and any of COLUMNS or other results."""
    temporary = folder / "summary.json.tmp"
    temporary.write_text(json.dumps({"status": status, **values}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "summary.json")


def read_run(folder: Path) -> Run:
    """Reads a run folder. Without a summary (a run still going, or killed) the last line of metrics stands in.

    Raises DataError when the folder is not there or holds no run.
    """
    names = [name for name in ("settings.yaml", "metrics.jsonl", "summary.json") if (folder / name).is_file()]
    if not names:
        problem = "holds no run (no settings.yaml, metrics.jsonl or summary.json)"
        problem = problem if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {problem}; give a run folder (`jaxllm runs list` shows those in runs)")
    notes: list[str] = []
    settings = _try(notes, folder, config.read_yaml, folder / "settings.yaml")
    summary = {}
    if "summary.json" in names:
        summary = _try(notes, folder, _read_summary, folder / "summary.json")
    if not summary:
        rows = _try(notes, folder, read_jsonl, folder / "metrics.jsonl")
        summary = _last(rows) | {"status": "unfinished"}
    date = datetime.datetime.fromtimestamp(max((folder / name).stat().st_mtime for name in names))
    return Run(folder.resolve(), date, settings or {}, summary, tuple(notes))


def list_runs(root: Path) -> str:
    """A table of the runs in the folder `root` (or of `root` itself if it is a run), oldest first.

    Raises DataError when `root` is not there.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that runs were written to (out=FOLDER/NAME)")
    runs = []
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        try:
            runs.append(read_run(folder))
        except DataError:
            continue
    if not runs:
        return f"no runs in {root}"
    table = _table("run", "date", *COLUMNS, "status")
    for run in sorted(runs, key=lambda run: run.date):
        cells = [_cell(name, run.summary.get(name)) for name in COLUMNS]
        table.add_row(run.folder.name, f"{run.date:%Y-%m-%d %H:%M}", *cells, _cell("status", run.summary.get("status")))
    return _text(table, runs)


def compare_runs(*folders: Path) -> str:
    """The settings in which runs differ, by dotted key, and their results, side by side.

    Raises DataError for fewer than two folders, or one that holds no run.
    """
    if len(folders) < 2:
        raise DataError(
            f"comparing takes two run folders or more, not {len(folders)}; `jaxllm runs list` shows those in runs"
        )
    runs = [read_run(Path(folder)) for folder in folders]
    readable = [run for run in runs if run.settings]
    keys = {key: None for run in readable[1:] for key in config.diff(readable[0].settings, run.settings)}
    settings = _table("setting", *_names(runs))
    for key in sorted(keys):
        settings.add_row(key, *(_setting(run, key) for run in runs))
    results = _table("result", *_names(runs))
    for key in {key: None for run in runs for key in run.summary}:
        results.add_row(key, *(_cell(key, run.summary.get(key)) for run in runs))
    same = (
        "same settings"
        if len(readable) == len(runs)
        else f"settings: only {len(readable)} of {len(runs)} could be read"
    )
    return (_text(settings) if keys else same + "\n") + "\n" + _text(results, runs)


def _try(notes: list[str], folder: Path, read, path: Path):
    """What `read` gives, or None and a note."""
    try:
        return read(path)
    except UserError as error:
        notes.append(f"{folder.resolve().name}: {str(error).replace(str(folder) + os.sep, '')}")
        return None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(summary, dict):
        raise DataError(f"{path}: expected an object, found a {type(summary).__name__}")
    return summary


def _last(rows: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The newest value of each column in the metrics; `step` counts the steps done."""
    newest = {key: value for row in rows or () for key, value in row.items()}
    newest["steps"] = newest.get("step")
    return {key: newest[key] for key in COLUMNS if key in newest}


def _names(runs: list[Run]) -> list[str]:
    """Folder names, or whole paths where two are the same."""
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _setting(run: Run, key: str) -> str:
    flat = config.flatten(run.settings) if run.settings else {}
    return str(flat[key]) if key in flat else "-"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("params", "tokens", "tokens_per_second") and isinstance(value, int | float):
        return humanize.metric(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(*head: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold", justify="right" if name in COLUMNS else "left")
    return table


def _text(table: Table, runs: list[Run] | tuple = ()) -> str:
    """The table as plain text, then the notes of the runs."""
    file = io.StringIO()
    console = Console(file=file, width=200, markup=False, emoji=False, highlight=False, color_system=None)
    console.print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
    return "\n".join(lines + [f"note: {note}" for run in runs for note in run.notes]) + "\n"
