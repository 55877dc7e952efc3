"""`jaxllm bench adapt`: time of a training step, full, with LoRA and with QLoRA, on workload W1 of `bench train`.

The three take steps in turn, in one process, so that what else the machine does reaches all of them; ratios are medians
over steps next to each other.
"""

import json as json_format
import statistics
import time

import jax

from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.bench import WARMUP, WORKLOADS, random_rows
from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import make_sharding
from jaxllm.train.step import make_state, make_train_step

LORA = Change(lora=LoraConfig(rank=16))
#: 64 inputs share a scale, but for the 688 of down, which that does not divide.
NF4 = QuantizeConfig(rules=(QuantizeRule(pattern="**/down", format="nf4", group=16), QuantizeRule(format="nf4")))
WAYS = {"full": (), "LoRA": (LORA,), "QLoRA": (Change(quantize=NF4), LORA)}
BARS = {("LoRA", "full"): 1.0, ("QLoRA", "LoRA"): 1.35}


def runner(changes, steps: int):
    """`() -> seconds` of one more step."""
    workload = WORKLOADS["W1"]
    model = after(build(workload.model, make_sharding(devices=jax.devices()[:1])), changes)
    trainable, tx = TRAINABLE if changes else "**", make_optimizer(OptimConfig(), steps + WARMUP, model.axes)
    state = make_state(model, tx, jax.random.key(0), trainable=trainable)
    step = make_train_step(model, lm, tx, trainable=trainable)
    batches = (model.sharding.batch(batch) for batch in random_rows(workload))

    def run() -> float:
        nonlocal state
        batch = jax.block_until_ready(next(batches))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        return time.perf_counter() - start

    return run


def bench_adapt(*, steps: int = 10, json: bool = False) -> dict[str, float]:
    """Prints (with `json` as JSON) and returns milliseconds a step, and the ratios that have a bar."""
    runs = {name: runner(changes, steps) for name, changes in WAYS.items()}
    seconds = [{name: run() for name, run in runs.items()} for _ in range(steps + WARMUP)][WARMUP:]
    found = {f"{name} ms": statistics.median(row[name] for row in seconds) * 1e3 for name in WAYS}
    ratios = {pair: statistics.median(row[pair[0]] / row[pair[1]] for row in seconds) for pair in BARS}
    found |= {f"{one} / {other}": ratio for (one, other), ratio in ratios.items()}
    if json:
        print(json_format.dumps(found))
        return found
    for name in WAYS:
        print(f"{name:6} {found[f'{name} ms']:8.0f} ms")
    for (one, other), ratio in ratios.items():
        print(f"{one} takes {ratio:.2f} times {other} (goal: at most {BARS[one, other]})")
    return found
