"""What the checks work with: a scratch folder, seeded random numbers, and small runs in processes of their own."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import yaml

from jaxllm import launch
from jaxllm.errors import UserError

log = logging.getLogger("jaxllm")

#: A run of a few seconds: what matters is how it is stopped, not what it learns.
MODEL = {
    "embed": 32,
    "layers": 2,
    "context": 64,
    "pattern": [{"attn": {"heads": 4, "kv_heads": 2}, "mlp": {"ffw": 48}}],
}


#: XLA ends a process whose devices have waited 40 seconds for each other, as they may where cores are busy.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def little_compiling() -> str:
    """XLA_FLAGS with which small programs compile in two thirds of the time, and run slower.

    Not level 0, which gives NaN in the gradient of a soft-capped softmax.
    """
    flags = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=1"
    flags += " --xla_cpu_parallel_codegen_split_count=1"
    if launch.jaxlib() < (0, 12):  # where the older emitters are gone
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check found."""

    cases: int
    failures: tuple[str, ...]
    """One line each; none means that the row holds."""
    figure: str
    """What is published of it."""

    @property
    def passed(self) -> bool:
        return not self.failures and self.cases > 0


@dataclasses.dataclass
class Lab:
    """Everything that a check needs from outside."""

    folder: Path
    seed: int = 0
    long: bool = False
    run_file: str | None = None
    """Settings of the user's own run; a small one by default."""
    say: Callable[[str], None] = print
    random: Random = dataclasses.field(default_factory=lambda: Random(0))

    @contextlib.contextmanager
    def row(self, number: int) -> Iterator["Lab"]:
        """A lab for one row: a folder and random numbers of its own. The folder goes when the row is over."""
        folder = self.folder / f"row-{number}"
        folder.mkdir(parents=True)
        try:
            yield dataclasses.replace(self, folder=folder, random=Random(f"{self.seed}-{number}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def count(self, quick: int, long: int) -> int:
        """Cases to try in this tier."""
        return long if self.long else quick

    @property
    def shared(self) -> Path:
        """A folder that all rows share: text, tokenizer, compiled programs."""
        folder = next(parent for parent in (self.folder, *self.folder.parents) if not parent.name.startswith("row-"))
        (folder / "shared").mkdir(exist_ok=True)
        return folder / "shared"

    @property
    def command(self) -> list[str]:
        """How Python starts the command line."""
        return ["-m", "jaxllm.cli"]

    def module(self, name: str) -> list[str]:
        """How Python starts a module of this package."""
        return ["-m", f"jaxllm.verify.{name}"]

    def corpus(self) -> Path:
        """A folder with text and a tokenizer, made once: a few files of the standard library's source."""
        folder = self.shared / "corpus"
        if not folder.exists():
            from jaxllm.data import stdlib
            from jaxllm.data.tokenizer import Tokenizer

            partial = self.shared / "corpus.partial"
            partial.mkdir()
            files = sorted(stdlib.files(stdlib.NAME), key=lambda name: (len(Path(name).read_bytes()), name))
            for number, name in enumerate(files[200:224]):
                (partial / f"{number}.txt").write_bytes(Path(name).read_bytes())
            texts = [path.read_text("utf-8", "replace") for path in sorted(partial.glob("*.txt"))]
            Tokenizer.train(texts, 400, partial / "tokenizer")
            partial.rename(folder)
        return folder

    def settings(self, out: Path, **changes) -> Path:
        """A settings file for a run in `out`; `train__steps=4` changes `train.steps`."""
        corpus = self.corpus()
        raw: dict = {
            "model": MODEL,
            "data": {
                "sources": [{"name": "text", "path": str(corpus / "*.txt")}],
                "tokenizer": str(corpus / "tokenizer"),
                "cache": str(self.shared / "cache"),
            },
            "train": {"steps": 8, "seq_len": 32, "batch": 8, "self_check": False},
            "optim": {"lr": 1e-2},
            "checkpoint": {"every": 2, "keep": 3},
        }
        if self.run_file is not None:
            from jaxllm.config import to_dict
            from jaxllm.train.load import load_run

            own = to_dict(load_run(self.run_file)[0])
            # What decides how it is computed stays; steps, saves and where they go are the check's.
            own["train"] |= {"steps": raw["train"]["steps"], "stages": []}
            own["checkpoint"] |= {"folder": None} | raw["checkpoint"]
            if own["optim"].get("schedule"):
                own["optim"]["schedule"] |= {"warmup": None}  # which may be longer than the steps of a check
            raw = own
        raw["out"] = str(out)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = raw.get(section, {}) | {name: value} if name else value
        path = out.with_name(out.name + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(raw))
        return path

    def environ(self, devices: int = 1, **more: str) -> dict[str, str]:
        """For processes that train on CPU: their programs are compiled once for all rows."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {PATIENT}"
        ours = {
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAXLLM_LAUNCH": "0",
            "XLA_FLAGS": flags.strip(),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.shared / "xla")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return os.environ | ours | more

    @contextlib.contextmanager
    def started(self, settings: Path, overrides: Sequence[str] = (), *, command: Sequence[str] = (), **options):
        """A process of `jaxllm train`, which does not outlive the block; `process.said()` is what it printed.

        `command`: how Python starts the command line, `self.command` by default.
        """
        said = (self.folder / f"said-{time.monotonic_ns()}").open("w+b")
        argv = [sys.executable, *(command or self.command), "train", str(settings), *overrides]
        process = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT, **{"env": self.environ()} | options)
        process.said = lambda: Path(said.name).read_text("utf-8", "replace")
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            said.close()

    def train(self, settings: Path, overrides: Sequence[str] = (), *, timeout: float = 300, **options) -> str:
        """Runs `jaxllm train` to its end; what it printed. Raises UserError where it does not end with exit code 0."""
        with self.started(settings, overrides, **options) as process:
            code = process.wait(timeout)
            if code:
                raise UserError(f"jaxllm train {settings.name}: exit code {code}: {process.said()[-500:]}")
            return process.said()


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What jaxllm logs within the block, instead of showing it."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, propagate = Keep(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


#: Seconds after which a moment that has not come is not going to.
PATIENCE = 120


def until(process, reached: Callable[[], bool], pause: float = 0.002) -> None:
    """Returns once `reached()` holds. Raises UserError where the process ends before, or nothing happens."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the run ended too early: {process.said()[-500:]}")
        time.sleep(pause)


def saved_steps(out: Path) -> set[int]:
    """The steps of a run that are saved to the end."""
    return {int(path.parent.name) for path in (out / "checkpoints").glob("*/manifest.json")}


def saving(out: Path) -> bool:
    """Whether a step is being written or deleted."""
    return any((out / "checkpoints").glob("*.unfinished"))


def metrics(out: Path) -> dict[int, dict[str, str]]:
    """`{step: {"loss": ..., "grad_norm": ...}}` of a run, to the last bit."""
    rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm")
    return {row["step"]: {key: float.hex(float(row[key])) for key in keys} for row in rows if "loss" in row}


def last_step(out: Path) -> int:
    """The last step that a run has written metrics of; 0 before the first."""
    try:
        return max(metrics(out), default=0)
    except (OSError, json.JSONDecodeError):  # not there yet, or amid a line
        return 0


def differences(whole: Path, other: Path) -> list[str]:
    """Where a run's losses and gradient norms are not those of another, step by step."""
    a, b = metrics(whole), metrics(other)
    out = [] if a else ["the uninterrupted run has no steps"]
    texts = (other / "metrics.jsonl").read_text().splitlines()
    if (said := sum("loss" in json.loads(text) for text in texts)) != len(b):
        out.append(f"{said} lines of metrics for {len(b)} steps")
    out += [f"step {step} is missing" for step in sorted(set(a) - set(b))]
    out += [f"step {step} is one too many" for step in sorted(set(b) - set(a))]
    return out + [f"step {step}: {b[step]}, not {a[step]}" for step in sorted(set(a) & set(b)) if a[step] != b[step]]


def leftovers(out: Path) -> list[str]:
    """What stands in a folder of checkpoints and is no saved step."""
    inside = sorted(path for path in (out / "checkpoints").iterdir() if path.name != ".lock")
    return [path.name for path in inside if not (path.name.isdigit() and (path / "manifest.json").exists())]


def strays(whole: Path, other: Path) -> list[str]:
    """What stands in a run's folder and not in that of an uninterrupted one."""
    return sorted({path.name for path in other.iterdir()} - {path.name for path in whole.iterdir()})
