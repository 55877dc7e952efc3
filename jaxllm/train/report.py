"""What a run leaves for its reader: the loss curve and the run card. Loads no jax."""

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import humanize
import numpy as np

import jaxllm
from jaxllm.errors import DataError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Writes the loss curve; the image's format follows the suffix of `path`. See `draw_loss`."""
    draw_loss(rows, title).savefig(path)


def draw_loss(rows: Sequence[Mapping[str, Any]], title: str = ""):
    """A matplotlib figure of the loss in nats a token against tokens: each step, their running mean, held-out points.

    `rows` of metrics.jsonl, with `tokens` and `loss`, `heldout_loss` or `heldout_loss_sample`; null values leave gaps.
    Raises DataError when there is nothing to draw.
    """
    from matplotlib.figure import Figure  # slow to load
    from matplotlib.ticker import EngFormatter

    train, heldout, sample = (_points(rows, key) for key in ("loss", "heldout_loss", "heldout_loss_sample"))
    if not train.size and not heldout.size and not sample.size:
        raise DataError(f"no loss to draw in the {len(rows)} rows of metrics; train for at least one step")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    if train.size:
        axes.plot(*train.T, color="#9ecae1", linewidth=0.8, label="training, each step")
        axes.plot(
            train[:, 0], running_mean(train[:, 1]), color="#08519c", linewidth=1.6, label="training, running mean"
        )
    if sample.size:
        label = f"held-out sample, last {sample[-1, 1]:.3f}"
        axes.plot(*sample.T, color="#fdae6b", linewidth=1.2, marker="o", markersize=4, label=label)
    if heldout.size:
        label = f"held out, last {heldout[-1, 1]:.3f}"
        axes.plot(*heldout.T, color="#d94801", linewidth=1.2, marker="o", markersize=4, label=label)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twenty-fifth of the values, shorter at the ends; NaN counts as absent."""
    half = len(values) // 50
    there = np.isfinite(values)
    window = np.ones(2 * half + 1)
    total, count = (np.convolve(x, window)[half : half + len(values)] for x in (np.where(there, values, 0.0), there))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    found = [(row["tokens"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    return np.array(found, float).reshape(-1, 2)


def run_card(
    *,
    name: str,
    settings: Mapping[str, Any],
    git: str,
    data: Mapping[str, Any],
    devices: str,
    parameters: Mapping[str, int],
    flops: Mapping[str, float],
    speed: Mapping[str, float],
    memory: Mapping[str, int],
    final: Mapping[str, float],
) -> str:
    """The run card as markdown.

    `settings`: {dotted key: value} that differ from the defaults. `git`: see `git_state`. `data`: fingerprint and
    sizes. `parameters`: total, active. `flops`: per_token, active (weights in matrix products), length. `speed`:
    tokens_per_second, mfu (absent where the chip's peak is unknown). `memory`: host_bytes, device_bytes (absent where
    not reported). `final`: the last metrics.
    """
    sections = [
        f"# {name}",
        "## Result\n" + _table(("metric", "value"), final),
        "## Settings that differ from the defaults\n"
        + (_table(("setting", "value"), settings) if settings else "None: all settings are the defaults."),
        "## Model and speed\n" + _list(_facts(devices, parameters, flops, speed, memory)),
        "## Where it came from\n" + _list({"code": git, **{f"data {key}": value for key, value in data.items()}}),
        "## Versions\n" + _list(versions()),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(devices, parameters, flops, speed, memory) -> dict[str, str]:
    attention = flops["per_token"] - 6 * flops["active"]
    rate = speed.get("tokens_per_second")
    device = memory.get("device_bytes")
    return {
        "parameters": f"{parameters['total']:,} ({parameters['active']:,} active for a token)",
        "FLOPs for a token": f"{flops['per_token']:.4g} = 6 * {flops['active']:,} weights in matrix products "
        f"+ {attention:.4g} in attention (12 * heads * head_dim * keys, summed over the layers; "
        f"causal halved, rows of {flops['length']:,} tokens)",
        "devices": devices,
        "tokens/s": f"{rate:,.0f}, compilation and evaluation left out" if rate else "too few steps to say",
        "MFU": f"{speed['mfu']:.1%}" if "mfu" in speed else "peak unknown",
        "peak memory": f"{_bytes(memory['host_bytes'])} on the host, "
        + (f"{_bytes(device)} on the fullest device" if device else "not reported by the devices"),
    }


def _bytes(count: int) -> str:
    return humanize.naturalsize(count, binary=True)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()])


def _list(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {_cell(value)}" for key, value in rows.items())


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version(), "jaxllm": jaxllm.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def git_state(*folders: Path) -> str:
    """The commit of the first of `folders` that lies in a git repository, and whether it was clean; or why unknown."""
    for folder in folders:
        commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
        if commit is not None and status is not None:
            lines = status.splitlines()
            untracked = sum(line.startswith("??") for line in lines)
            changed = len(lines) - untracked
            state = f"{changed} files changed" if changed else "clean"
            return f"commit {commit}, {state}" + (f", {untracked} untracked" if untracked else "")
    return "commit unknown: git is not installed, or no git repository with a commit here"


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command that only reads, or None where it fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
