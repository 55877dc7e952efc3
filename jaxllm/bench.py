"""`jaxllm bench train`: speed and memory of real training steps on three fixed workloads.

Tokens are random and rows are full, so a step costs the same every time. Each workload runs in a process of its own,
which makes peak memory and time to the first step its own too. All in float32, AdamW with clipping, untied head:

| | embed | layers | heads / kv | ffw | vocabulary | tokens x rows | parameters (active) | GFLOP a step |
|---|---|---|---|---|---|---|---|---|
| W1 | 256 | 6 | 8 / 4 | 688 | 4096 | 256 x 16 | 6.45 M | 142 |
| W2 | 256 | 6 | 8 / 4 | 8 experts of 344, top 2 | 4096 | 256 x 16 | 16 M (5.4 M) | 143 |
| W3 | 768 | 12 | 12 / 4 | 2048 | 32000 | 512 x 4 | 125 M | 1288 |
"""

import dataclasses
import json as json_format
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxllm import launch
from jaxllm.errors import ResourceError, SettingsError, nearest
from jaxllm.model.spec import AttnSpec, LayerSpec, MlpSpec, ModelConfig, MoeSpec

if TYPE_CHECKING:
    from jaxllm.adapt.changes import Changes


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the shape of its batch."""

    model: ModelConfig
    rows: int
    length: int
    steps: int
    """Steps that are timed when nothing else is asked for."""


def _workload(embed, layers, heads, kv_heads, vocab, rows, length, steps, **ffw) -> Workload:
    layer = LayerSpec(attn=AttnSpec(heads=heads, kv_heads=kv_heads), **ffw)
    model = ModelConfig(vocab=vocab, embed=embed, layers=layers, pattern=(layer,), context=length)
    return Workload(model, rows, length, steps)


WORKLOADS = {
    "W1": _workload(256, 6, 8, 4, 4096, 16, 256, 10, mlp=MlpSpec(ffw=688)),
    "W2": _workload(256, 6, 8, 4, 4096, 16, 256, 10, moe=MoeSpec(experts=8, experts_per_token=2, ffw=344)),
    "W3": _workload(768, 12, 12, 4, 32_000, 4, 512, 5, mlp=MlpSpec(ffw=2048)),
}

#: Steps before the clock starts.
WARMUP = 2

#: Line of the table: key of a row, what it is, format.
LINES = (
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("step_ms", "step, ms (median)", ",.0f"),
    ("step_ms_min", "  fastest", ",.0f"),
    ("step_ms_max", "  slowest", ",.0f"),
    ("gflops_per_second", "GFLOP/s", ",.0f"),
    ("matmul_share", "share of the matmul peak", ".0%"),
    ("peak_mb", "peak memory, MB", ",.0f"),
    ("temporaries_mb", "XLA temporaries, MB", ",.0f"),
    ("compile_seconds", "compilation, s", ",.1f"),
    ("first_step_seconds", "start to first step, s", ",.1f"),
)


def bench_train(
    workloads: Sequence[str] = tuple(WORKLOADS), *, steps: int | None = None, json: bool = False, fast: bool = False
) -> list[dict]:
    """Measures the workloads one after another, prints a table (or a line of JSON for each) and returns the rows.

    `steps` are timed after two that are not; by default as many as the workload says. `fast`: as with `--cpu-fast`.

    A row holds tokens_per_second and gflops_per_second at the median step, step_ms (median) with min and max,
    matmul_share (of matmul_gflops, what NumPy's float32 matrix product reaches on all cores just before; null on an
    accelerator), peak_mb (of the process), temporaries_mb (XLA's plan for one step), compile_seconds (tracing
    included) and first_step_seconds (from the start of the process to the end of the first step).
    FLOPs are those of `train.metrics.flops_per_token`.

    Raises SettingsError for an unknown workload, ResourceError when a measuring process dies.
    """
    for name in workloads:
        if name not in WORKLOADS:
            raise SettingsError(f"no such workload: {name}{nearest(name, WORKLOADS)}")
    if steps is not None and steps < 1:
        raise SettingsError(f"steps={steps} must be at least 1")
    rows = []
    for name in workloads:
        rows.append(_in_own_process(name, steps or WORKLOADS[name].steps, fast))
        if json:
            print(json_format.dumps(rows[-1]), flush=True)
    if not json:
        print_table(rows)
    return rows


def _in_own_process(name: str, steps: int, fast: bool) -> dict[str, Any]:
    peak = matmul_gflops()
    # A cached program would make compile_seconds a reading time.
    environ = launch.environment(os.environ, fast) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command_of(name, steps), stdout=subprocess.PIPE, text=True, env=environ)
    if done.returncode:
        cause = "; it was killed, likely for lack of memory" if done.returncode == -9 else ""
        raise ResourceError(f"{name}: the measuring process ended with exit code {done.returncode}{cause}")
    row = json_format.loads(done.stdout.splitlines()[-1])
    on_cpu = row["platform"] == "cpu"
    share = row["gflops_per_second"] / peak if on_cpu else None
    return row | {"matmul_gflops": peak if on_cpu else None, "matmul_share": share}


def command_of(name: str, steps: int) -> list[str]:
    """The command whose last line of output is the row of one workload."""
    return [sys.executable, "-m", "jaxllm.bench", name, str(steps)]


def matmul_gflops(size: int = 2048, repeats: int = 8) -> float:
    """GFLOP/s of the best of a few float32 products of two `size` by `size` matrices, by NumPy on all cores."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    out, best = np.empty_like(a), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def measure(workload: Workload, steps: int, changes: "Changes" = ()) -> dict[str, Any]:
    """The row of `bench_train` for one workload, all but the share of the peak, measured in this process.

    changes: to its model, such as adapters, which alone are trained then; FLOPs are those without.
    """
    import jax
    import psutil

    from jaxllm.adapt.changes import after
    from jaxllm.adapt.lora import TRAINABLE
    from jaxllm.model.build import active_parameters, build
    from jaxllm.objectives.lm import lm
    from jaxllm.optim.config import OptimConfig
    from jaxllm.optim.optimizers import make_optimizer
    from jaxllm.sharding import make_sharding
    from jaxllm.train.metrics import flops_per_token, peak_memory
    from jaxllm.train.step import make_state, make_train_step

    config = workload.model
    model = after(build(config, make_sharding(devices=jax.devices()[:1])), changes)
    trainable = TRAINABLE if changes else "**"
    tx = make_optimizer(OptimConfig(), steps + WARMUP, model.axes)
    state = make_state(model, tx, jax.random.key(0), trainable=trainable)
    batches = (model.sharding.batch(batch) for batch in random_rows(workload))

    start = time.perf_counter()
    step = make_train_step(model, lm, tx, trainable=trainable).lower(state, next(batches)).compile()
    compile_seconds, seconds = time.perf_counter() - start, []
    for index in range(steps + WARMUP):
        batch = jax.block_until_ready(next(batches))
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
        if index == 0:
            first_step_seconds = time.time() - psutil.Process().create_time()

    timed = seconds[WARMUP:]
    tokens, median = workload.rows * workload.length, statistics.median(timed)
    total, active = active_parameters(config, model.abstract)
    layers = [(s.attn.heads, config.attention_dim(s.attn), s.attn.window) for s in config.layer_specs]
    flops = flops_per_token(active, layers, workload.length) * tokens
    return {
        "tokens_per_second": tokens / median,
        "step_ms": median * 1e3,
        "step_ms_min": min(timed) * 1e3,
        "step_ms_max": max(timed) * 1e3,
        "gflop_per_step": flops / 1e9,
        "gflops_per_second": flops / median / 1e9,
        "peak_mb": peak_memory()["host_bytes"] / 1e6,
        "temporaries_mb": step.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_seconds": compile_seconds,
        "first_step_seconds": first_step_seconds,
        "loss": float(metrics["loss"]),
        "parameters": total,
        "active": active,
        "steps": steps,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }


def random_rows(workload: Workload):
    """Batches without end: random tokens, one document a row, every target counts."""
    import numpy as np

    from jaxllm.data.batch import TokenBatch

    rng, shape = np.random.default_rng(0), (workload.rows, workload.length)
    ones, positions = np.ones(shape, np.int32), np.broadcast_to(np.arange(workload.length, dtype=np.int32), shape)
    while True:
        tokens = rng.integers(0, workload.model.vocab, (workload.rows, workload.length + 1), np.int32)
        yield TokenBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One column for each workload."""
    print(f"{'':26}" + "".join(f"{row['workload']:>10}" for row in rows))
    for key, label, how in LINES:
        cells = (format(row[key], how) if row[key] is not None else "-" for row in rows)
        print(f"{label:26}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    print(json_format.dumps({"workload": sys.argv[1]} | measure(WORKLOADS[sys.argv[1]], int(sys.argv[2]))))
