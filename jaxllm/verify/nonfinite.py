"""Row 9: NaN, Inf and spikes in a gradient: the step is skipped whole and counted, and the run ends with its documents.

Shapes: B rows, T positions.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.train.spikes import KNOWN
from jaxllm.verify.lab import MODEL, Found, Lab, until

NAN, INF = float("nan"), float("inf")
#: By what the gradient is multiplied.
INJECTED = {"NaN": NAN, "+Inf": INF, "-Inf": -INF, "a spike": 1e4}
#: What a batch says of its gradient in the first row of `reference_BT`, which the objective of text does not read.
FACTOR, WEIGHT, LOSS = 0, 1, 2
ALL = -1.0
DEVIATIONS = 6.0


def nonfinite(lab: Lab) -> Found:
    """Steps in this process with each fault in each place, then runs that meet them."""
    tried, failures = steps(lab)
    more, wrong = runs(lab)
    figure = (
        f"{tried} steps with NaN, Inf or a spike skipped to the bit and counted; {more} runs: skipped, resumed, and "
        f"stopped after {IN_ROW} in a row with their documents"
    )
    return Found(tried + more, (*failures, *wrong), figure)


@jax.custom_vjp
def scaled(x, factor):
    """x, whose gradient is multiplied by the factor."""
    return x


def _backward(factor, gradient):
    return gradient * factor.astype(gradient.dtype), jnp.zeros_like(factor)


scaled.defvjp(lambda x, factor: (x, factor), _backward)


def poisoned(objective):
    """The objective with the fault that its batch asks for: in all weights, in one of them, or in the loss itself."""

    def loss(model, params, batch, key):
        asked_T = batch.reference_BT[0]

        def weight(number, x):
            chosen = (asked_T[WEIGHT] == ALL) | (asked_T[WEIGHT] == number)
            return scaled(x, jnp.where(chosen, asked_T[FACTOR], 1.0))

        leaves, structure = jax.tree.flatten(params)
        params = jax.tree.unflatten(structure, [weight(n, x) for n, x in enumerate(leaves)])
        total, count, metrics = objective(model, params, dataclasses.replace(batch, reference_BT=None), key)
        return total + asked_T[LOSS], count, metrics

    return loss


def asking(batch, factor: float = 1.0, weight: float = ALL, loss: float = 0.0):
    """The batch with a fault in its first row; without by default."""
    asked_BT = np.zeros(batch.tokens_BT.shape, np.float32)
    asked_BT[:, FACTOR] = 1.0
    asked_BT[0, [FACTOR, WEIGHT, LOSS]] = factor, weight, loss
    where = getattr(batch.tokens_BT, "sharding", None)
    return dataclasses.replace(batch, reference_BT=asked_BT if where is None else jax.device_put(asked_BT, where))


def steps(lab: Lab) -> tuple[int, list[str]]:
    """`(cases, what went wrong)`: faulty steps among good ones, beside a run of the good ones alone."""
    bench = Bench()
    state, alone = bench.start(), bench.start()
    for n in range(KNOWN + 8):
        (state, found), (alone, _) = bench.step(state, bench.batch(n)), bench.step(alone, bench.batch(n))
    if found["skipped"]:
        return 0, [f"{found['skipped']:.0f} good steps were skipped"]
    weights = list(range(len(jax.tree.leaves(state.params))))
    places = [ALL, *lab.random.sample(weights, lab.count(3, len(weights)))]
    cases = [(kind, dict(factor=factor, weight=place)) for kind, factor in INJECTED.items() for place in places]
    cases += [(f"{kind} in the loss", dict(loss=INJECTED[kind])) for kind in ("NaN", "+Inf", "-Inf")]
    failures, spikes = [], 0
    for n, (kind, fault) in enumerate(cases):
        where = f"{kind}, {fault}"
        before = kept(state)
        state, found = bench.step(state, asking(bench.batch(1000 + n), **fault))
        spikes += kind == "a spike"
        failures += [f"{where}: {path} has changed" for path in changed(before, kept(state))]
        if (counts := _counts(found)) != (n + 1, 1, spikes):
            failures.append(f"{where}: (skipped, in a row, spikes) is {counts}, not {(n + 1, 1, spikes)}")
        good = bench.batch(KNOWN + 8 + n)
        (state, found), (alone, _) = bench.step(state, good), bench.step(alone, good)
        if found["skipped_in_row"] or not changed(before, kept(state)):
            failures.append(f"{where}: the good step after it was not taken")
    failures += [
        f"after all, {path} is not as if there had been none" for path in changed(kept(state), kept(alone))[:3]
    ]
    for n in range(4):  # a level that stays is not learnt to be normal
        state, found = bench.step(state, asking(bench.batch(2000 + n), 1e4))
    if found["skipped_in_row"] != 4:
        failures.append(f"four spikes in a row were counted as {found['skipped_in_row']:.0f}")
    return len(cases) + 4, failures


def _counts(found) -> tuple[int, int, int]:
    return tuple(int(found[name]) for name in ("skipped", "skipped_in_row", "skipped_spikes"))


class Bench:
    """A tiny model and a jitted step with faults on demand, in two microbatches, with averaged weights."""

    def __init__(self):
        from jaxllm.config import parse
        from jaxllm.model.build import build
        from jaxllm.model.spec import ModelConfig
        from jaxllm.objectives.lm import lm
        from jaxllm.optim.config import OptimConfig
        from jaxllm.optim.optimizers import make_optimizer
        from jaxllm.sharding import make_sharding
        from jaxllm.train import step

        self.model = build(parse(ModelConfig, MODEL | {"vocab": 61}), make_sharding(devices=jax.devices()[:1]))
        self.tx, self.make_state = make_optimizer(OptimConfig(lr=1e-3), 1000, self.model.axes), step.make_state
        options = dict(accumulate=2, ema=0.9, skip_spikes=DEVIATIONS)
        self.step = step.make_train_step(self.model, poisoned(lm), self.tx, **options)

    def start(self):
        return self.make_state(self.model, self.tx, jax.random.key(0), ema=True, skip_spikes=True)

    def batch(self, seed: int):
        """Rows of a noisy sequence, the same for each seed."""
        from jaxllm.data.batch import TokenBatch

        rng, shape = np.random.default_rng(seed), (4, 17)
        tokens = (rng.integers(0, 8, (4, 1)) * 7 + np.arange(17) * 3 + (rng.random(shape) < 0.1)) % 61
        ones, places = np.ones((4, 16), np.int32), np.tile(np.arange(16, dtype=np.int32), (4, 1))
        tokens = tokens.astype(np.int32)
        return asking(TokenBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), places, ones))


def kept(state) -> dict[str, bytes]:
    """The bits of all that a skipped step leaves: weights, optimizer, average, what is known of recent steps."""
    spikes = {name: state.extra["spikes"][name] for name in ("norms", "known")}
    parts = {"params": state.params, "opt": state.opt, "average": state.extra["ema"], "spikes": spikes}
    return {path: np.asarray(x).tobytes() for path, x in tree.flatten(parts).items()}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """One path of each part that differs."""
    paths = (path for path in before if before[path] != after[path])
    return list({path.partition("/")[0]: path for path in paths}.values())


#: The faults of a run, by step; from LAST on there is no other.
FAULTS, LAST, SAVED, IN_ROW = {20: NAN, 70: 1e4, 72: INF, 75: 1e4}, 80, 73, 4


class Faulty(Lab):
    """A lab whose runs meet the faults; with `ends` they die before that step."""

    ends: int = 0

    @property
    def command(self) -> list[str]:
        code = (
            "import sys; from jaxllm.verify import nonfinite; from jaxllm.cli import main\n"
            f"nonfinite.plant({self.ends}); sys.exit(main(sys.argv[1:]))"
        )
        return ["-c", code]


def plant(ends: int) -> None:
    """Makes the batches of runs in this process ask for faults."""
    from jaxllm.train import loop, method

    loss, next_batch = method.Text.loss, loop.Trainer.next_batch

    def faulty(self, loader):
        step = loader.position // self.stages[0].batch + 1
        if step == ends:
            self.checkpoints.wait()
            os._exit(9)
        return asking(next_batch(self, loader), -INF if step >= LAST else FAULTS.get(step, 1.0))

    method.Text.loss = lambda self: poisoned(loss(self))
    loop.Trainer.next_batch = faulty


def runs(lab: Lab) -> tuple[int, list[str]]:
    """`(runs, what went wrong)`: one that meets all faults, and one that also dies amid them and goes on."""
    whole, cut = lab.folder / "whole", lab.folder / "cut"
    options = dict(train__steps=100, train__skip_spikes=DEVIATIONS, train__max_skipped=IN_ROW, checkpoint__every=SAVED)
    said = _run(lab, lab.settings(whole, **options))
    _run(lab, lab.settings(cut, **options), ends=SAVED + 4)
    again = _run(lab, lab.settings(cut, **options))
    rows, others = (counted(out) for out in (whole, cut))
    failures = [
        f"resumed: step {n + 1} is {b}, not {a}" for n, (a, b) in enumerate(zip(rows, others, strict=False)) if a != b
    ][:3]
    failures += [f"resumed: {len(others)} steps, not {len(rows)}"] * (len(rows) != len(others))
    totals = [0, *(row["skipped"] for row in rows)]
    skipped = [n + 1 for n, row in enumerate(rows) if row["skipped"] > totals[n]]
    stopped = LAST + IN_ROW - 1
    if skipped[: len(FAULTS) + IN_ROW] != [*FAULTS, *range(LAST, stopped + 1)]:
        failures.append(f"skipped steps are {skipped}")
    if (spikes := int(rows[-1]["skipped_spikes"])) != 2:
        failures.append(f"{spikes} spikes were counted, not 2")
    for text in (said, again):
        failures += wrong_words(text, stopped)
    failures += not_shown(lab, again)
    return 3, failures


def counted(out: Path) -> list[dict]:
    """What a run wrote of its steps, null for what is not finite, without the clock's part; floats to the last bit."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "grad_norm", "grad_norm_limit", "skipped", "skipped_in_row", "skipped_spikes")
    return [{key: row[key] for key in keys} for row in rows if "loss" in row]


def _run(lab: Lab, settings: Path, ends: int = 0) -> str:
    """What a run with faults said."""
    faulty = Faulty(**{field.name: getattr(lab, field.name) for field in dataclasses.fields(Lab)})
    faulty.ends = ends
    with faulty.started(settings) as process:
        until(process, lambda: process.poll() is not None)
        return process.said()


#: The command that a run names, and what its last words say that it read.
COMMAND, READ = r"`jaxllm (data inspect .*? --step \d+)`", r"which hold \d+ documents?: (.*)"


def wrong_words(said: str, stopped: int) -> list[str]:
    """What is missing in the words of a run: the first skipped step, why it ended, since when, and what it read."""
    wanted = {
        "the first skipped step": r"step \d+ was skipped, since .* It read the rows \d+ to \d+ of train",
        "why it ended": rf"error: step {stopped}: the gradient was not finite in {IN_ROW} steps in a row",
        "since when nothing has changed": f"have not changed since step {LAST - 1}",
        "which documents it read": READ,
        "what shows them": COMMAND,
    }
    return [f"not said: {what}: {said[-300:]}" for what, pattern in wanted.items() if not re.search(pattern, said)]


def not_shown(lab: Lab, said: str) -> list[str]:
    """The documents that the last words name and that the command in them does not show."""
    found, commands = re.search(READ, said), re.findall(COMMAND, said)
    named = re.findall(r"(\S+):? ?", found[1]) if found and commands else []
    named = [name.rstrip(";:.") for name in named if name.startswith("/")]
    if not named:
        return ["no document was named by its file"]
    options = dict(capture_output=True, text=True, env=lab.environ())
    shown = subprocess.run([sys.executable, "-m", "jaxllm.cli", *commands[-1].split()], **options)
    return [f"data inspect does not show {name}: {shown.stderr[-200:]}" for name in named if name not in shown.stdout]
