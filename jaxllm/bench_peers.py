"""`jaxllm bench peers`: training speed and memory on CPU beside other codebases, in one run on one machine.

All train in float32 with AdamW on the workloads of `bench train`, random tokens and full rows, with the same allocator
settings. Each round measures every contender once, in a process of its own; times are medians, and a ratio is the
median over the rounds of the ratios within a round.

- PyTorch: a plain decoder (`scripts/peer_torch.py`), eager and compiled, with fused AdamW; transformers' Llama and
  Mixtral; peft's LoRA. No clipping, which ours has.
- MaxText: its trainer with its defaults, and without rematerialisation; dense experts, its faster form on CPU.
- nanodo: its model and recipe. It has no grouped-query attention, no gated feed-forward and tied embeddings, so it gets
  an ungated layer of as many parameters, and no experts.
"""

import dataclasses
import json as json_format
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm import launch
from jaxllm.bench import WARMUP, WORKLOADS, Workload
from jaxllm.errors import ResourceError, SettingsError, nearest

SCRIPTS = Path(__file__).parents[1] / "scripts"
#: W1 with adapters of rank 8 on all linear layers, and nothing else trained.
LORA = "LoRA"
RANK = 8
NAMES = (*WORKLOADS, LORA)

#: Goals by workload and contender: how many times as fast, with huge pages alone and with `--cpu-fast`.
GOALS = {
    False: {"W1": {"PyTorch": 0.9, "MaxText": 2.0}},
    True: {
        "W1": {"PyTorch": 1.0, "torch.compile": 0.9, "MaxText": 2.3, "nanodo": 2.0},
        "W2": {"transformers": 1.0, "MaxText": 2.2},
        "W3": {"transformers": 0.85},
        LORA: {"peft": 1.0},
    },
}
#: At most so many times the peak memory, on W1 with huge pages alone.
MEMORY_GOAL = {"PyTorch": 1.3}


@dataclasses.dataclass(frozen=True)
class Peers:
    """Where the others are: interpreters of their environments. What is None takes no part."""

    torch: str | None = None
    """With torch, and with transformers and peft for what is theirs."""
    maxtext: str | None = None
    nanodo: str | None = None
    """A checkout; it runs in our own environment."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (path := getattr(self, field.name)) and not Path(path).exists():
                raise SettingsError(f"--{field.name} {path}: no such file or folder")
            # Processes start in folders of their own. Links stay: an environment's Python is one.
            object.__setattr__(self, field.name, path and os.path.abspath(path))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One process of one contender."""

    seconds: float
    """Of a step, median."""
    peak_mb: float
    flags: str
    """What its environment sets for its compiler, beside the allocator."""


def bench_peers(
    workloads: Sequence[str] = NAMES, *, peers: Peers, rounds: int = 3, steps: int = 6, json: bool = False
) -> list[dict[str, Any]]:
    """Measures the workloads one after the other; prints a table of each (or lines of JSON) and returns the rows.

    A row: workload, contender, tokens_per_second, step_ms, peak_mb, flags; for another than jaxllm also `ratio`, how
    many times as fast jaxllm is, `memory_ratio`, jaxllm's peak over its own, and the `goal`s where there are some.

    Raises SettingsError for an unknown workload or without a clone of the repository, ResourceError when a measuring
    process dies.
    """
    for name in workloads:
        if name not in NAMES:
            raise SettingsError(f"no such workload: {name}{nearest(name, NAMES)}")
    if not SCRIPTS.exists():
        raise SettingsError(f"{SCRIPTS} is not there: run this in a clone of the repository")
    if rounds < 1 or steps < 1:
        raise SettingsError(f"rounds={rounds} and steps={steps} must be at least 1")
    rows = []
    for name in workloads:
        who = contenders(name, peers)
        found: dict[str, list[Measured]] = {contender: [] for contender in who}
        for number in range(rounds):
            for contender, measure in who.items():
                found[contender].append(measure(steps))
                said = f"{name} round {number + 1} {contender}: {found[contender][-1].seconds * 1e3:,.0f} ms"
                print(said, file=sys.stderr, flush=True)
        table = _rows(name, found)
        print("\n".join(map(json_format.dumps, table)) if json else _table(name, table), flush=True)
        rows += table
    return rows


def contenders(name: str, peers: Peers) -> dict[str, Callable[[int], Measured]]:
    """`steps -> Measured` of each that takes part in a workload, jaxllm first."""
    lora = name == LORA
    workload = WORKLOADS["W1" if lora else name]
    moe = workload.model.pattern[0].moe
    out: dict[str, Callable[[int], Measured]] = {"jaxllm": lambda steps: _ours(name, steps)}
    if peers.torch:
        kinds = {"peft": "peft"} if lora else {"transformers": "transformers"}
        if not lora and not moe:
            kinds = {"PyTorch": "eager", "torch.compile": "compile"} | kinds
        for contender, kind in kinds.items():
            out[contender] = lambda steps, kind=kind: _torch(peers.torch, kind, workload, steps)
    if peers.maxtext and not lora:
        out["MaxText"] = lambda steps: _maxtext(peers.maxtext, workload, steps, {"remat_policy": "none"})
        out["MaxText, its defaults"] = lambda steps: _maxtext(peers.maxtext, workload, steps, {})
    if peers.nanodo and not lora and not moe:
        out["nanodo"] = lambda steps: _nanodo(peers.nanodo, workload, steps)
    return out


def _rows(name: str, found: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    workload = WORKLOADS["W1" if name == LORA else name]
    fast, ours, rows = is_fast(os.environ), found["jaxllm"], []
    for contender, runs in found.items():
        seconds, peak = (statistics.median(getattr(run, key) for run in runs) for key in ("seconds", "peak_mb"))
        row = {
            "workload": name,
            "contender": contender,
            "tokens_per_second": workload.rows * workload.length / seconds,
            "step_ms": seconds * 1e3,
            "peak_mb": peak,
            "flags": runs[0].flags,
        }
        if contender != "jaxllm":
            pairs = list(zip(runs, ours, strict=True))
            row["ratio"] = statistics.median(theirs.seconds / mine.seconds for theirs, mine in pairs)
            row["memory_ratio"] = statistics.median(mine.peak_mb / theirs.peak_mb for theirs, mine in pairs)
            row["goal"] = GOALS[fast].get(name, {}).get(contender)
            row["memory_goal"] = MEMORY_GOAL.get(contender) if name == "W1" and not fast else None
        rows.append(row)
    return rows


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    def goal(value, word):
        return f" (goal: {word} {value})" if value is not None else ""

    allocator = os.environ.get(launch.TUNABLES, "as it is")
    lines = [f"{name}: median steps in float32; allocator: {allocator}"]
    for row in rows:
        line = f"  {row['contender']:22}{row['tokens_per_second']:>7,.0f} tokens/s{row['step_ms']:>8,.0f} ms"
        line += f"{row['peak_mb']:>8,.0f} MB"
        if "ratio" in row:
            line += f"   jaxllm is {row['ratio']:.2f} times as fast{goal(row['goal'], 'at least')}"
            line += f", with {row['memory_ratio']:.2f} times the memory{goal(row['memory_goal'], 'at most')}"
        lines.append(line)
        if row["flags"]:
            lines.append(f"    {row['flags']}")
    return "\n".join(lines)


def is_fast(environ) -> bool:
    """Whether these are the allocator settings of `--cpu-fast`."""
    return all(f"{key}={value}" in environ.get(launch.TUNABLES, "") for key, value in launch.FAST_TUNABLES.items())


MARK = "peak of the process: "
#: Prints the peak of a command too. Linux counts for a process what its parent had: so a small one starts it.
MEASURED = f"""
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
sys.stdout.flush()
print("{MARK}" + str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), end="")
sys.exit(code)
"""


def _run(command: Sequence[str], environ: dict[str, str]) -> tuple[str, float]:
    """What a command prints, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        small = [sys.executable, "-c", MEASURED, *command]
        done = subprocess.run(
            small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, cwd=folder, text=True
        )
    text, _, peak = done.stdout.rpartition(MARK)
    if done.returncode:
        last = " ".join(text.strip().splitlines()[-3:])
        raise ResourceError(f"{' '.join(map(str, command))}: exit code {done.returncode}: {last[-1000:]}")
    return text, int(peak) * 1024 / 1e6


def _environ(xla: bool) -> dict[str, str]:
    """Ours, without a cache of programs; `xla`: with the user's flags for XLA, which are for our own step."""
    root = str(SCRIPTS.parent)
    quiet = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    out = dict(os.environ) | quiet | ({"PYTHONPATH": root} if xla else {})
    if not xla:
        out.pop("XLA_FLAGS", None)
    return out


def _last(text: str) -> dict[str, Any]:
    return json_format.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def _ours(name: str, steps: int) -> Measured:
    environ = _environ(xla=True)
    text, peak = _run([sys.executable, "-m", "jaxllm.bench_peers", name, str(steps)], environ)
    row, flags = _last(text), environ.get("XLA_FLAGS")
    return Measured(row["step_ms"] / 1e3, peak, f"jax {row['jax']}" + (f", XLA_FLAGS={flags}" if flags else ""))


def _torch(python: str, kind: str, workload: Workload, steps: int) -> Measured:
    command = [
        python,
        str(SCRIPTS / "peer_torch.py"),
        kind,
        json_format.dumps(sizes(workload)),
        str(steps + WARMUP),
    ]
    text, peak = _run(command, _environ(xla=False))
    row = _last(text)
    return Measured(statistics.median(row["seconds"][WARMUP:]), peak, row["flags"])


def _nanodo(checkout: str, workload: Workload, steps: int) -> Measured:
    script = str(SCRIPTS / "peer_nanodo.py")
    shape = json_format.dumps(sizes(workload))
    text, peak = _run([sys.executable, script, checkout, shape, str(steps + WARMUP)], _environ(xla=False))
    row = _last(text)
    return Measured(statistics.median(row["seconds"][WARMUP:]), peak, row["flags"])


def _maxtext(python: str, workload: Workload, steps: int, settings: dict[str, str]) -> Measured:
    """Step times as MaxText logs them."""
    settings = maxtext_settings(workload, steps + WARMUP) | settings
    with tempfile.TemporaryDirectory() as folder:
        settings["base_output_directory"] = folder
        arguments = [f"{key}={value}" for key, value in settings.items()]
        text, peak = _run([python, "-m", "maxtext.trainers.pre_train.train", *arguments], _environ(xla=False))
    seconds = [float(s) for s in re.findall(r"completed step: \d+, seconds: ([\d.]+)", text)]
    if len(seconds) <= WARMUP:
        raise ResourceError(f"MaxText logged no steps: {text[-1000:]}")
    remat = settings.get("remat_policy")
    return Measured(statistics.median(seconds[WARMUP:]), peak, f"remat_policy={remat}" if remat else "")


def sizes(workload: Workload) -> dict[str, int]:
    """The numbers that a peer's program builds its model from."""
    model, (layer,) = workload.model, workload.model.pattern
    return {
        "vocab": model.vocab,
        "embed": model.embed,
        "layers": model.layers,
        "heads": layer.attn.heads,
        "kv_heads": layer.attn.kv_heads,
        "ffw": (layer.mlp or layer.moe).ffw,
        "experts": layer.moe.experts if layer.moe else 0,
        "experts_per_token": layer.moe.experts_per_token if layer.moe else 0,
        "rows": workload.rows,
        "length": workload.length,
        "rank": RANK,
    }


def maxtext_settings(workload: Workload, steps: int) -> dict[str, object]:
    size, moe = sizes(workload), workload.model.pattern[0].moe
    settings = {
        "run_name": "bench",
        "hardware": "cpu",
        "skip_jax_distributed_system": "true",
        "dataset_type": "synthetic",
        "steps": steps,
        "decoder_block": "llama2",
        "base_emb_dim": size["embed"],
        "base_num_decoder_layers": size["layers"],
        "base_num_query_heads": size["heads"],
        "base_num_kv_heads": size["kv_heads"],
        "head_dim": size["embed"] // size["heads"],
        "base_mlp_dim": size["ffw"],
        "vocab_size": size["vocab"],
        "max_target_length": size["length"],
        "per_device_batch_size": size["rows"],
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
    }
    if moe:
        settings |= {"decoder_block": "mixtral", "num_experts": moe.experts, "base_moe_mlp_dim": moe.ffw}
        settings |= {"num_experts_per_tok": moe.experts_per_token, "megablox": "false", "sparse_matmul": "false"}
    off = ("enable_checkpointing", "enable_tensorboard", "log_config", "save_config_to_gcs", "gcs_metrics")
    off += ("enable_goodput_recording", "monitor_goodput")
    return settings | dict.fromkeys(off, "false")


def main(name: str, steps: str) -> None:
    """Measures our own step of one workload in this process; the last line is JSON."""
    from jaxllm.adapt.changes import Change
    from jaxllm.adapt.lora import LoraConfig
    from jaxllm.bench import measure

    changes = (Change(lora=LoraConfig(rank=RANK)),) if name == LORA else ()
    print(json_format.dumps(measure(WORKLOADS["W1" if changes else name], int(steps), changes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
