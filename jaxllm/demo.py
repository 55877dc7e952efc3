"""`jaxllm demo`: the whole pipeline on the Python standard library's own source, within a few minutes on a CPU."""

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxllm import config as settings_of
from jaxllm.data.batch import TokenBatch
from jaxllm.data.prepare import prepare
from jaxllm.data.store import digest
from jaxllm.errors import SettingsError
from jaxllm.generate.text import generate_text
from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import make_sharding
from jaxllm.train.config import RunConfig
from jaxllm.train.folder import RunFolder
from jaxllm.train.load import load_run
from jaxllm.train.loop import Result, train
from jaxllm.train.step import make_state, make_train_step

PROMPTS = ("def read_lines(path):\n", "class Stack:\n", "import os\nimport sys\n\n")
#: Seconds kept for what follows training: its compilation, the last evaluation, samples and reports.
RESERVE = 35
SET_BY_THE_CLOCK = ("train.steps", "train.eval_every", "checkpoint.every")


def demo(*, moe: bool = False, minutes: float = 5.0, out: str | None = None, overrides=()) -> Result:
    """Trains a small model on the standard library for about `minutes` in all, and shows what it learned.

    The number of steps follows from the speed measured at the start, or is that of a demo before this one which took
    its time; everything else is in configs/runs/demo.yaml.
    """
    started = time.monotonic()
    check_arguments(minutes, overrides)
    out = out or str(free_folder(Path("runs/demo-moe" if moe else "runs/demo")))
    config, _ = load_run("demo-moe" if moe else "demo", [f"out={out}", *overrides])
    print(f"1/4  Text and tokenizer: Python's standard library -> {out}", flush=True)
    folder = RunFolder(config)
    tokenizer = folder.open_tokenizer(print)
    tokenizer.save(folder.tokenizer_dir)
    for name, store in prepare(config.data, tokenizer).items():
        print(f"     {name}: {store.documents} files, {store.text_bytes:,} bytes, {store.tokens:,} tokens")
    if steps := known_steps(config, minutes):
        print(f"2/4  {minutes:g} minutes were enough for {steps} steps before", flush=True)
    else:
        print("2/4  Measuring the speed of a training step", flush=True)
        left = minutes * 60 * 0.95 - (time.monotonic() - started) - RESERVE * min(1.0, minutes / 2)
        steps = max(fewest_steps(config), int(left / seconds_per_step(config)))
        remember_steps(config, minutes, steps)
    print(f"3/4  Training: {steps} steps", flush=True)
    result = train(with_steps(config, steps))
    if not 0.75 < (time.monotonic() - started) / 60 / minutes < 1.1:
        remember_steps(config, minutes, None)
    if result.status != "finished":
        again = f"{command_name()} train {shlex.quote(out)}/settings.yaml"
        print(f"{result.status} at step {result.summary['steps']}; to go on: {again}")
        return result
    print("4/4  What it writes:", flush=True)
    show_samples(result)
    print(farewell(result, time.monotonic() - started))
    return result


def check_arguments(minutes: float, overrides) -> None:
    """Raises SettingsError for settings that the demo would replace."""
    if not minutes > 0:
        raise SettingsError(f"--minutes={minutes}: must be above 0")
    for text in overrides:
        if (key := text.partition("=")[0]) in SET_BY_THE_CLOCK:
            raise SettingsError(f"{key}: the demo sets it by --minutes; to set it by hand: jaxllm train demo {text}")


def free_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist: nothing is written over."""
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


def fewest_steps(config: RunConfig) -> int:
    """However slow the machine: enough for the learning rate to rise and fall again."""
    return max(20, 2 * (config.optim.schedule.warmup or 0))


def known_steps(config: RunConfig, minutes: float) -> int | None:
    """The steps of an earlier demo like this one: its step is found compiled, and need not be measured again."""
    path, key = _memory(config, minutes)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        steps = json.loads(path.read_text()).get(key)
        return steps if isinstance(steps, int) and steps >= fewest_steps(config) else None


def remember_steps(config: RunConfig, minutes: float, steps: int | None) -> None:
    """For the next demo; None forgets."""
    path, key = _memory(config, minutes)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({} if steps is None else {key: steps}))


def _memory(config: RunConfig, minutes: float) -> tuple[Path, str]:
    settings = settings_of.to_dict(dataclasses.replace(config, out=None))
    return Path(config.data.cache).expanduser() / "demo.json", digest([settings, minutes, jax.__version__])


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The settings with this many steps and about eight evaluations."""
    train_config = dataclasses.replace(config.train, steps=steps, eval_every=max(10, steps // 8))
    checkpoint = dataclasses.replace(config.checkpoint, every=max(10, steps // 4))
    return dataclasses.replace(config, train=train_config, checkpoint=checkpoint)


def seconds_per_step(config: RunConfig, steps: int = 4) -> float:
    """Time of the real training step on random tokens: the fastest of a few, and a tenth for what else goes on."""
    model = build(config.model, make_sharding(config.parallel), config.kernels)
    tx = make_optimizer(config.optim, 1000, model.axes)
    # Zeros take as long to compute with as weights do, and nothing needs to be compiled to make them.
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), model.abstract)
    state = make_state(model, tx, jax.random.key(0), params=zeros)
    shape = (config.train.batch, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = model.sharding.batch(TokenBatch(tokens, tokens, ones.astype(np.float32), positions, ones))
    step = make_train_step(model, lm, tx)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return 1.1 * min(times[1:])


def show_samples(result: Result) -> None:
    made = generate_text(
        result.model, result.params, result.tokenizer, PROMPTS, max_tokens=60, temperature=0.7, top_p=0.95, seed=0
    )
    for prompt, sample in zip(PROMPTS, made, strict=True):
        text = (prompt + sample.text).rstrip().replace("\n", "\n     | ")
        print(f"     | {text}\n")


def farewell(result: Result, seconds: float) -> str:
    out, s, command = result.folder, result.summary, command_name()
    run = shlex.quote(str(out))
    return "\n".join(
        [
            f"Held out: {s['bits_per_byte']:.3f} bits per byte, perplexity {s['perplexity']:.1f} "
            f"({s['params']:,} parameters, {s['tokens']:,} tokens, {seconds:.0f} s in all).",
            f"Everything is in {out}: checkpoints/, metrics.jsonl, loss.png, settings.yaml, card.md (the run card).",
            "Try next:",
            f"  {command} generate {run} --prompt 'def parse(' --temperature 0.7",
            f"  {command} eval {run} --data {shlex.quote(str(nearby(Path(__file__))))}",
            f"  {command} train demo train.steps=2000 out=runs/longer",
        ]
    )


def command_name() -> str:
    """What to type for `jaxllm` in this terminal: its path, where the environment is not activated."""
    script = Path(sys.executable).with_name("jaxllm")
    found = shutil.which("jaxllm")
    if found and Path(found).absolute() == script.absolute():
        return "jaxllm"
    if script.exists():
        return shlex.quote(str(nearby(script)))
    return f"{shlex.quote(str(nearby(Path(sys.executable))))} -m jaxllm.cli"


def nearby(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
