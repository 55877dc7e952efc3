"""`jaxllm bench programs`: training steps compiled for absent TPU slices, beside MaxText's for the same model.

Memory of a device, bytes it sends, the compiler's estimated cycles as seconds, and compile time with tracing, each
program in a process of its own. bfloat16 products of float32 weights, AdamW, fully sharded over all devices.
"""

import dataclasses
import json as json_format
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import ResourceError, SettingsError, nearest


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a slice, and what keeps the same values in both programs."""

    model: str
    topology: str
    rows: int
    """Of a device."""
    tokens: int
    remat: tuple[str, ...] | str
    """Values that the forward pass keeps."""
    maxtext: tuple[str, str] | None = None
    """MaxText's names of the model and of its rematerialisation policy."""


PROJECTIONS = ("q", "k", "v", "attention_out")
ROWS = {
    "llama2-7b-v5p": Row(
        "llama2-7b", "v5p:2x2x2", 4, 4096, (*PROJECTIONS, "gate", "up", "mlp_out"), ("llama2-7b", "minimal")
    ),
    "llama2-7b-v5e": Row("llama2-7b", "v5e:16x16", 4, 2048, "qkv", ("llama2-7b", "save_qkv_proj")),
    "llama2-70b-v5p": Row(
        "llama2-70b", "v5p:4x4x4", 2, 4096, (*PROJECTIONS, "mlp_out"), ("llama2-70b", "save_dot_except_mlpwi")
    ),
    "llama3.1-8b-v5p": Row("llama3.1-8b", "v5p:2x2x2", 2, 8192, "full", ("llama3.1-8b", "full")),
    "llama3.1-70b-v5p": Row("llama3.1-70b", "v5p:4x4x8", 2, 8192, "full", ("llama3.1-70b", "full")),
    "mixtral-8x7b-v5p": Row("mixtral-8x7b", "v5p:4x4x8", 2, 4096, "full"),
}
#: Key of a result, its name in the table, format.
FIGURES = (
    ("memory_gib", "memory, GiB", ".2f"),
    ("wire_gb", "sent, GB", ".1f"),
    ("overlapped_gb", "  beside compute", ".1f"),
    ("cycles_seconds", "cycles, s", ".3f"),
    ("compile_seconds", "compile, s", ".1f"),
)
PEER = Path(__file__).parents[1] / "scripts" / "peer_maxtext_programs.py"


def bench_programs(
    names: Sequence[str] = (), *, maxtext: str | None = None, rounds: int = 1, json: bool = False
) -> list[dict[str, Any]]:
    """Compiles the programs, prints a line of each figure (or of JSON) as it comes, and returns the rows.

    Args:
      names: of ROWS; all of them by default.
      maxtext: the Python of an environment with MaxText; its programs are compiled in turn with ours.
      rounds: pairs of each; the compile times are medians, the other figures do not vary.

    Raises SettingsError for an unknown name, ResourceError when a compiling process dies.
    """
    for name in names:
        if name not in ROWS:
            raise SettingsError(f"no such program: {name}{nearest(name, ROWS)}")
    if maxtext is not None and not PEER.exists():
        raise SettingsError(f"{PEER} is not there: run this in a clone of the repository")
    found = []
    for name in names or ROWS:
        row, ours, theirs = ROWS[name], [], []
        for _ in range(rounds):
            ours.append(_run([sys.executable, "-m", "jaxllm.bench_programs", name]))
            if maxtext is not None and row.maxtext:
                model, remat = row.maxtext
                command = [maxtext, str(PEER), model, row.topology, str(row.rows), str(row.tokens), remat]
                theirs.append(_run(command))
        found.append({"program": name, "ours": _median(ours), "maxtext": _median(theirs) if theirs else None})
        print(json_format.dumps(found[-1]) if json else _lines(found[-1]), flush=True)
    return found


def _run(command: list[str]) -> dict[str, float]:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ResourceError(f"{' '.join(command)}: exit code {done.returncode}: {' '.join(last)}")
    return figures(json_format.loads(lines[-1].removeprefix("RESULT ")))


def figures(program: dict[str, Any]) -> dict[str, float]:
    """The figures of `plan.program.Program.to_dict`, with its compile time."""
    return {
        "memory_gib": program["memory"]["total"] / 2**30,
        "wire_gb": program["wire_bytes"] / 1e9,
        "overlapped_gb": sum(one["overlapped_bytes"] for one in program["collectives"]) / 1e9,
        "cycles_seconds": program["seconds"],
        "compile_seconds": program["compile_seconds"],
    }


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _lines(row: dict[str, Any]) -> str:
    theirs, out = row["maxtext"], [row["program"]]
    for key, label, how in FIGURES:
        ours = row["ours"][key]
        line = f"  {label:18}{ours:>10{how}}"
        if theirs is not None:
            ratio = ours / theirs[key] if theirs[key] else math.nan
            line += f"   MaxText {theirs[key]:>10{how}}   ratio {ratio:.3f}"
        out.append(line)
    return "\n".join(out)


def compile_row(name: str) -> dict[str, Any]:
    """The facts of one program, compiled in this process, with `compile_seconds`."""
    from jaxllm.plan.read import read
    from jaxllm.plan.target import parse_target, prepare_environment

    row = ROWS[name]
    target = parse_target(row.topology)
    prepare_environment(target)

    from jaxllm.plan.bounds import speed_of
    from jaxllm.plan.program import facts
    from jaxllm.train.estimate.step import make_step

    remat = row.remat if isinstance(row.remat, str) else f"[{', '.join(row.remat)}]"
    overrides = [f"model.remat={remat}", f"train.seq_len={row.tokens}", f"train.batch={row.rows * target.devices}"]
    step = make_step(read(row.model, overrides, devices=target.devices).config, target.jax_devices())
    start = time.perf_counter()
    compiled = step.lower().compile()
    seconds = time.perf_counter() - start
    mesh = step.sharding.mesh
    found = facts(compiled, mesh, target.chip, speed_of(target, dict(mesh.shape)))
    return found.to_dict() | {"compile_seconds": seconds}


if __name__ == "__main__":
    print("RESULT " + json_format.dumps(compile_row(sys.argv[1])))
