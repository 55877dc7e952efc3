"""Row 16: the same losses again, the recorded ones, and the same step however it is split.

`python -m jaxllm.verify.golden` prints what one process with eight CPU devices finds; `--write` records its losses for
the version of jax that is installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.verify.lab import MODEL, Found, Lab, little_compiling

FILE = Path(__file__).with_name("golden.json")
STEPS, AGAIN = 100, 20
ROWS, LENGTH, VOCAB = 8, 32, 64
MOE = {"attn": MODEL["pattern"][0]["attn"], "moe": {"experts": 4, "experts_per_token": 2, "ffw": 32}}
KINDS = {"dense": MODEL, "moe": MODEL | {"pattern": [MOE]}}
#: Rounding differs between processors and versions, and a step carries it on.
TOLERANCE = 1e-5
LOSS, GRADIENT = 1e-6, 1e-5
#: Kind of model, microbatches, mesh.
SPLITS = [
    ("dense", 4, {}),
    ("dense", 1, {"data": 8, "fsdp": 1}),
    ("dense", 1, {"fsdp": 8}),
    ("dense", 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    ("dense", 1, {"context": 2, "fsdp": 4}),
    ("moe", 1, {"expert": 4, "fsdp": 2}),
]


def determinism(lab: Lab) -> Found:
    """Golden losses of 100 steps, again bit for bit, and one step under accumulation and on other devices."""
    environ = lab.environ(devices=8)
    environ["XLA_FLAGS"] = environ["XLA_FLAGS"].replace(little_compiling(), "")  # compiled as when they were recorded
    command = [sys.executable, *lab.module("golden")]
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
    if process.returncode:
        raise UserError(process.stderr[-500:])
    found = json.loads(process.stdout.splitlines()[-1])
    return judge(found, json.loads(FILE.read_text()))


def judge(found: dict, golden: dict) -> Found:
    """What is wrong with what `measure` gave; `golden`: `{version of jax: {kind: losses}}`."""
    version = found["jax"] if found["jax"] in golden else max(golden, key=_numbers)
    failures, worst = [], 0.0
    for kind, expected in golden[version].items():
        losses = found["losses"][kind]
        for step, (a, b) in enumerate(zip(losses, expected, strict=True), 1):
            worst = max(worst, abs(a - b) / b / step)
            if not abs(a - b) <= TOLERANCE * step * b:
                failures.append(f"{kind}, step {step}: loss {a}, recorded {b}")
                break
        if found["again"][kind] != losses[:AGAIN]:
            failures.append(f"{kind}: a second run gives other losses")
    for name, (loss, gradient) in found["splits"].items():
        if not (loss <= LOSS and gradient <= GRADIENT):
            failures.append(f"{name}: the loss is off by {loss:.1e}, a gradient by {gradient:.1e}")
    recorded = f"jax {version}" if version == found["jax"] else f"jax {version}, there being none for {found['jax']}"
    figure = (
        f"{STEPS} losses within {worst:.0e} a step of those of {recorded}, again bit for bit; {len(found['splits'])} "
        f"ways to split a step: loss within {max(x for x, _ in found['splits'].values()):.0e}, gradients within "
        f"{max(x for _, x in found['splits'].values()):.0e}"
    )
    return Found(len(found["losses"]) * STEPS + len(found["splits"]), tuple(failures), figure)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def measure() -> dict:
    """Losses, losses again, and how far split steps are off; needs eight devices."""
    import jax

    losses = {kind: _losses(kind, STEPS) for kind in KINDS}
    again = {kind: _losses(kind, AGAIN) for kind in KINDS}
    splits = {}
    for kind, accumulate, parallel in SPLITS:
        mesh = " x ".join(f"{axis} {size}" for axis, size in parallel.items() if size > 1)
        name = f"{kind}, {f'{accumulate} microbatches' if accumulate > 1 else 'whole'}, {mesh or '1 device'}"
        splits[name] = _difference(_gradients(kind, accumulate, parallel), _gradients(kind, 1, {}))
    return {"jax": jax.__version__, "losses": losses, "again": again, "splits": splits}


def _model(kind: str, parallel: dict):
    import jax

    from jaxllm import config
    from jaxllm.model.build import build
    from jaxllm.model.spec import ModelConfig
    from jaxllm.sharding import ParallelConfig, make_sharding

    devices = jax.devices() if parallel else jax.devices()[:1]
    settings = config.parse(ModelConfig, KINDS[kind] | {"vocab": VOCAB, "dtype": "float32"})
    return build(settings, make_sharding(ParallelConfig(**{"fsdp": 1} | parallel), devices))


def _weights(model):
    """Weights that do not depend on jax's random numbers, so that versions can be compared."""
    import numpy as np

    from jaxllm import tree

    random = np.random.RandomState(0)  # whose stream numpy keeps as it is
    drawn = {
        path: random.standard_normal(leaf.shape).astype(np.float32) / np.sqrt(leaf.shape[-2])
        if len(leaf.shape) > 1
        else np.ones(leaf.shape, np.float32)
        for path, leaf in sorted(tree.flatten(model.abstract).items())
    }
    import jax

    return tree.map_with_path(lambda path, leaf: jax.device_put(drawn[path], leaf.sharding), model.abstract)


def _batch(step: int):
    """Rows of noisy arithmetic sequences, two documents each: something to learn, the same on every machine."""
    import numpy as np

    from jaxllm.data.batch import TokenBatch

    random = np.random.RandomState(step)
    tokens = (random.randint(0, 8, (ROWS, 1)) * 7 + np.arange(LENGTH + 1) * 3) % VOCAB
    tokens = np.where(random.random_sample(tokens.shape) < 0.1, random.randint(0, VOCAB, tokens.shape), tokens)
    cut = LENGTH // 2 - 3
    segments = np.broadcast_to(1 + (np.arange(LENGTH) >= cut), (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH) - cut * (np.arange(LENGTH) >= cut), (ROWS, LENGTH)).astype(np.int32)
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[:, cut - 1] = 0
    return TokenBatch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), mask, positions, segments)


def _losses(kind: str, steps: int) -> list[float]:
    import jax

    from jaxllm.objectives.lm import lm
    from jaxllm.optim.config import OptimConfig
    from jaxllm.optim.optimizers import make_optimizer
    from jaxllm.train.step import make_state, make_train_step

    model = _model(kind, {})
    tx = make_optimizer(OptimConfig(lr=3e-3), STEPS, model.axes)
    state = make_state(model, tx, jax.random.key(0), params=_weights(model))
    step_fn, losses = make_train_step(model, lm, tx), []
    for step in range(steps):
        state, metrics = step_fn(state, model.sharding.batch(_batch(step)))
        losses.append(float(metrics["loss"]))
    return losses


def _gradients(kind: str, accumulate: int, parallel: dict):
    """`(loss, {path: gradient})` of one batch."""
    import jax
    import numpy as np

    from jaxllm import tree
    from jaxllm.objectives.lm import lm
    from jaxllm.train.rows import gradients
    from jaxllm.train.step import traced_on

    model = _model(kind, parallel)
    params = _weights(model)
    chosen, frozen = tree.partition(params, tree.select(params, "**"))

    def of(chosen, frozen, batch, key):
        (loss, (count, _)), grads = gradients(model, lm, chosen, frozen, batch, key, accumulate)
        return loss / count, grads

    loss, grads = jax.jit(traced_on(model, of))(chosen, frozen, model.sharding.batch(_batch(0)), jax.random.key(0))
    return float(loss), {path: np.asarray(g, np.float64) for path, g in tree.flatten(grads).items()}


def _difference(found, expected) -> tuple[float, float]:
    """How far the loss is off, and the worst gradient, relative to its largest entry."""
    import numpy as np

    (loss, grads), (loss_there, grads_there) = found, expected
    off = max(np.max(np.abs(grads[path] - g)) / np.max(np.abs(g)) for path, g in grads_there.items())
    return abs(loss - loss_there) / loss_there, float(off)


def main(argv: list[str]) -> int:
    found = measure()
    if "--write" in argv:
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(known | {found["jax"]: found["losses"]}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
