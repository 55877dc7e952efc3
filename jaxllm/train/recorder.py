"""What becomes of metrics: files, the progress bar, the speed, and whether the run should stop."""

import importlib.util
import logging
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxllm import config as settings_of
from jaxllm.errors import MissingExtra, UserError
from jaxllm.train.config import RunConfig
from jaxllm.train.evaluate import LOSS, SAMPLE, loss_of
from jaxllm.train.metrics import Lagged, Meter
from jaxllm.train.progress import Show
from jaxllm.train.skips import Skips
from jaxllm.train.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writer

log = logging.getLogger("jaxllm")


#: Steps in a row with an expert above twice its share after which a run says what would help.
CROWDED = 100
#: What is said beside a held-out loss.
BESIDE = {"bits_per_byte": "bits per byte", "heldout_accuracy": "of the pairs in the right order"}


class TrainingStopped(UserError):
    """The run cannot go on: too many steps in a row were skipped."""


class Recorder:
    """Takes each step's metrics and each evaluation; reads a step's metrics only after the next is dispatched."""

    def __init__(self, config: RunConfig, schedule, show: Show, peak: float | None):
        """`peak`: FLOP/s of all devices together, None if unknown. Raises MissingExtra."""
        self.config, self.show, self.steps = config, show, config.train.total_steps
        for wanted, package in ((config.log.tensorboard, "tensorboard"), (config.log.wandb, "wandb")):
            if wanted and importlib.util.find_spec(package) is None:
                raise MissingExtra(f"log.{package}", package, package)
        # On the host, all at once: asking the device for one rate would wait for the step it is computing.
        self.rates = np.asarray(jax.vmap(schedule)(np.arange(self.steps)))
        self.lagged, self.meter = Lagged(), Meter(self.steps, peak)
        self.best: float | None = None
        self.since_best = 0
        self.crowded = 0
        """Steps in a row with an expert above twice its share."""
        self.waits = config.parallel.expert != 1 and config.kernels.experts == "wait" and config.model.dropless
        self.problem: str | None = None
        """Why the run cannot go on."""
        self.problem_at = 0
        """The step at which that was found."""
        self.skips = Skips(config, show)
        self.writers: list[Writer] = []
        self.failing: set[Writer] = set()

    def open(self, folder: Path, resumed_at: int | None) -> None:
        """Opens the metrics files; lines after the resumed step are computed again. Only the first process writes."""
        self.skips.settings = folder / "settings.yaml"
        self.writers = [JsonlWriter(folder / "metrics.jsonl", resumed_at)]
        if self.config.log.tensorboard:
            self.writers.append(TensorBoardWriter(folder / "tensorboard", resumed_at))
        if self.config.log.wandb:
            self.writers.append(WandbWriter(folder, self.config.log.wandb, settings_of.to_dict(self.config)))

    def close(self) -> None:
        for writer in self.writers:
            self._try(writer, "closing", writer.close)

    def push(self, step: int, metrics: dict[str, jax.Array], **host: float) -> None:
        """Takes the metrics of the step just dispatched; `host`: tokens, flops (of the step), tokens_in_all."""
        self._record(self.lagged.push(step, metrics | {f"host/{name}": value for name, value in host.items()}))

    def flush(self) -> None:
        """Waits for the last step and records it."""
        self._record(self.lagged.flush())

    def resume(self, best: float | None, since_best: int) -> bool:
        """Takes what the checkpoint knows of evaluations; True when the run had stopped early."""
        self.best, self.since_best = best, since_best
        return self._out_of_patience()

    def heldout(self, step: int, tokens: int, found: dict[str, float]) -> None:
        """Writes and shows a held-out evaluation."""
        self.meter.skip()
        self._write(step, {"tokens": tokens, **found})
        of = SAMPLE if LOSS + SAMPLE in found else ""
        where = "on a sample of the held-out rows: " if of else "held-out "
        more = [f", {found[key + of]:.4f} {name}" for key, name in BESIDE.items() if key + of in found]
        self.show.say(f"step {step}: {where}loss {loss_of(found):.4f}{''.join(more)}")

    def evaluated(self, step: int, tokens: int, found: dict[str, float]) -> bool:
        """Takes a held-out evaluation, always of the same rows; True when the run should stop early."""
        self.heldout(step, tokens, found)
        loss = loss_of(found)
        if loss < (math.inf if self.best is None else self.best):
            self.best, self.since_best = loss, 0
            return False
        self.since_best += 1
        if self._out_of_patience():
            self.show.say(f"no lower held-out loss in {self.since_best} evaluations: stopping early")
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        return self.config.train.patience is not None and self.since_best >= self.config.train.patience

    def _record(self, lagged: tuple[int, dict[str, float]] | None) -> None:
        if lagged is None:
            return
        step, metrics = lagged
        speed = self.meter.update(step - 1, int(metrics.pop("host/tokens")), metrics.pop("host/flops"))
        # A skipped step does not advance the schedule.
        rate = float(self.rates[max(0, step - 1 - int(metrics["skipped"]))])
        row = {"tokens": int(metrics.pop("host/tokens_in_all")), "lr": rate, **metrics, **speed}
        if step % self.config.log.every == 0:
            self._write(step, row)
        self.show.update(step, row)
        self._look_at_experts(metrics.get("expert_load_max", 0.0))
        if (problem := self.skips.look(step, metrics)) and self.problem is None:
            self.problem, self.problem_at = problem, step

    def _look_at_experts(self, load: float) -> None:
        self.crowded = self.crowded + 1 if load > 2 else 0
        if self.crowded == CROWDED and self.waits:
            self.waits = False
            self.show.say(
                f"an expert had more than twice its share of rows in {CROWDED} steps (expert_load_max {load:.1f}), and "
                "other devices may wait for its own: kernels.experts=lend lets them help where they do"
            )

    def _write(self, step: int, row: dict[str, float]) -> None:
        for writer in self.writers:
            self._try(writer, f"step {step}", lambda writer=writer: writer.write(step, row))

    def _try(self, writer: Writer, what: str, act: Callable[[], None]) -> None:
        """A full disk or a service that is away costs lines of metrics, not the run; said once until it works again."""
        try:
            act()
            self.failing.discard(writer)
        except Exception as error:
            if writer not in self.failing:
                log.error("%s, %s: metrics are being lost: %s", type(writer).__name__, what, error)
            self.failing.add(writer)
