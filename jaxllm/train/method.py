"""What a run learns, as its loop sees it: text here, preferences in `preferences.py`, a teacher in `teacher.py`.

A method has the loss, completes each batch with what the loss compares, keeps what it needs in the run folder, and
says what is looked at before the first step.
"""

import functools
import typing

from jaxllm.objectives.lm import lm
from jaxllm.train import plain
from jaxllm.train.evaluate import Evaluator

if typing.TYPE_CHECKING:
    from jaxllm.data.batch import TokenBatch
    from jaxllm.data.config import DataConfig
    from jaxllm.model.build import Model, Params
    from jaxllm.train.config import Stage
    from jaxllm.train.loop import Trainer


class Text:
    """Predicts the next token of text, or of answers; the other methods change some of this."""

    def __init__(self, run: "Trainer"):
        self.run = run
        self.objective = self.loss()

    def loss(self):
        """The objective: `(model, params, batch, key) -> (loss_sum, count, metrics)`."""
        train = self.run.config.train
        return functools.partial(lm, z_loss=train.z_loss, neftune=train.neftune)

    def plain(self):
        """The same loss as one would write it down, for the self-check (see `plain.py`)."""
        return functools.partial(plain.text, z_loss=self.run.config.train.z_loss)

    def data(self) -> "DataConfig":
        """What the run reads; called once, before anything else."""
        return self.run.config.data

    def prepare(self, params: "Params | None") -> None:
        """Once in a run, before its first step, on the weights that it starts from (None: new ones)."""

    def resume(self) -> None:
        """In the place of `prepare` for a run that goes on."""

    def write(self) -> None:
        """Puts what `prepare` made into the run folder."""

    def begin(self, index: int, stage: "Stage") -> None:
        """Before the first batch of a stage."""

    def complete(self, batch: "TokenBatch", row: int) -> "TokenBatch":
        """The batch, whose first row has the number `row` in the stage, with all that the loss compares."""
        return batch

    def check(self, batch: "TokenBatch") -> list[str]:
        """What else the self-check looks at before the first step. Raises TrainingError for what is not so."""
        return []

    def evaluator(self, model: "Model", stores, **options):
        """What measures held-out data."""
        return Evaluator(model, stores, **options)
