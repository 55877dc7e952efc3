"""What is said of skipped steps: once when the first one is, and why a run ends that skips too many in a row."""

from collections.abc import Sequence
from pathlib import Path

from jaxllm.data.mixture import Mixture
from jaxllm.data.origin import named
from jaxllm.train.config import RunConfig
from jaxllm.train.progress import Show
from jaxllm.train.streams import rows_of_step


class Skips:
    """Follows the counts that a step gives."""

    def __init__(self, config: RunConfig, show: Show):
        self.train, self.show = config.train, show
        self.settings = Path(config.out or "RUN.yaml")
        """The file that `jaxllm data inspect` is to read."""
        self.said = False
        self.spikes = 0
        """Spikes before the present row of skipped steps."""

    def look(self, step: int, metrics: dict[str, float]) -> str | None:
        """Takes a step's metrics; says why the run cannot go on, where it cannot."""
        in_row, spikes = int(metrics["skipped_in_row"]), int(metrics.get("skipped_spikes", 0))
        if not in_row:
            self.spikes = spikes
            return None
        what = _what(in_row, min(in_row, spikes - self.spikes))
        if not self.said:
            self.said = True
            self.show.say(
                f"step {step} was skipped, since {what}{_height(metrics)}. It read {rows_text(self.train, step)} "
                f"(`{self.command(step)}` shows them), and changed nothing; later ones are counted in the metrics"
            )
        if in_row < self.train.max_skipped:
            return None
        return (
            f"step {step}: {what} in {in_row} steps in a row (train.max_skipped); the weights have not changed since "
            f"step {step - in_row}. Lower optim.lr in another run folder, or look at the data with "
            f"`{self.command(step)}`"
        )

    def command(self, step: int) -> str:
        """What shows the documents of a step."""
        return f"jaxllm data inspect {self.settings} --step {step}"


def rows_text(train, step: int) -> str:
    """`the rows 32 to 39 of train`, counted from 0 in the stage."""
    index, rows = rows_of_step(train.resolved_stages, step)
    return f"the rows {rows[0]} to {rows[-1]} of {train.resolved_stages[index].name}"


def documents_text(train, streams: Sequence[Mixture], step: int) -> str:
    """A sentence with some of the documents that a step reads."""
    index, rows = rows_of_step(train.resolved_stages, step)
    return f"Step {step} read {rows_text(train, step)}, which hold {named(streams[index], rows)}."


def _what(in_row: int, spikes: int) -> str:
    if not spikes:
        return "the gradient was not finite"
    above = "far above those of the steps before (train.skip_spikes)"
    return (
        f"the gradient's norm was {above}" if spikes == in_row else f"the gradient was not finite, or its norm {above}"
    )


def _height(metrics: dict[str, float]) -> str:
    limit = metrics.get("grad_norm_limit")
    return (
        f" ({metrics['grad_norm']:.3g}, and {limit:.3g} is the limit)" if limit and metrics["grad_norm"] > limit else ""
    )
