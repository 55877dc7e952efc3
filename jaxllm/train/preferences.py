"""A run that learns preferences: its frozen reference and held-out pairs."""

import functools
from collections.abc import Mapping

import jax

from jaxllm.data.loader import Loader
from jaxllm.data.pack import Rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model, Params
from jaxllm.objectives.dpo import dpo
from jaxllm.train import plain
from jaxllm.train.evaluate import LOSS, SAMPLE, Spread
from jaxllm.train.method import Text
from jaxllm.train.reference import frozen_model, load_reference, reference_of, save_reference
from jaxllm.train.step import make_eval_step


class Preferences(Text):
    """Direct preference optimisation: each pair comes with what a frozen reference gives its answers."""

    def loss(self):
        return functools.partial(dpo, config=self.run.config.dpo)

    def plain(self):
        dpo = self.run.config.dpo
        return functools.partial(plain.preference, beta=dpo.beta, smoothing=dpo.label_smoothing)

    def prepare(self, params):
        """Log-probabilities of all pairs under the reference, one pass over the data."""
        run, path, stage = self.run, self.run.config.dpo.reference, self.run.stages[0]
        model = run.model
        if jax.process_count() > 1:
            raise SettingsError(f"dpo runs in one process, not in {jax.process_count()}; set parallel.processes=1")
        if path is not None:
            model, params = frozen_model(path, run.sharding, run.tokenizer, "dpo.reference", stage.seq_len)
        options = dict(length=stage.seq_len, batch=run.rows_of(stage), truncate=run.data.truncate)
        run.show.say(f"log-probabilities of the reference ({path or 'the weights the run starts from'})")
        self._take({name: reference_of(model, params, store, **options) for name, store in run.stores.items()})

    def resume(self):
        self._take(load_reference(self.run.folder.path, self.run.stores, self.run.fingerprint))

    def write(self):
        save_reference(self.run.folder.path, self.reference, self.run.fingerprint)

    def evaluator(self, model, stores, **options):
        return PairEvaluator(model, stores, self.reference, self.objective, **options)

    def _take(self, reference):
        """Puts log-probabilities beside the tokens of each source."""
        self.reference = reference
        for stream in self.run.streams:
            for name, rows in zip(stream.names, stream.sources, strict=True):
                rows.reference = reference[name]


class PairEvaluator:
    """Evaluates weights on held-out pairs: loss, accuracy, margin and rewards, means over the pairs."""

    def __init__(
        self, model: Model, stores: Mapping[str, TokenStore], reference, objective, *, seq_len, batch, truncate
    ):
        self.model, self.batch, self.step = model, batch, make_eval_step(model, objective)
        self.rows = {name: Rows(store, seq_len, shuffle=False, truncate=truncate) for name, store in stores.items()}
        for name, rows in self.rows.items():
            rows.reference = reference[name]

    def samples(self, rows: int | None) -> bool:
        """Whether at most so many rows of each store leave some out."""
        return rows is not None and any(rows < each.per_epoch for each in self.rows.values())

    def __call__(self, params: Params, *, rows: int | None = None, progress=None) -> dict[str, float]:
        """`heldout_loss` (nats a pair), `heldout_accuracy`, `heldout_margin`, ..., over all stores together."""
        sums: dict[str, float] = {}
        for each in self.rows.values():
            stop = min(each.per_epoch, rows or each.per_epoch)
            processes = dict(process=jax.process_index(), processes=jax.process_count())
            loader = Loader(Spread(each, stop), self.batch, stop=stop, prefetch=1, **processes)
            for batch in loader:
                found = jax.device_get(self.step(params, self.model.sharding.batch(batch)))
                sums = {key: sums.get(key, 0.0) + float(value) for key, value in found.items()}
                if progress is not None:
                    progress(min(loader.position, stop), stop)
            loader.close()
        count, of = sums.pop("targets"), SAMPLE if self.samples(rows) else ""
        loss = sums.pop("loss") / count
        return {LOSS + of: loss} | {f"heldout_{key}{of}": value / count for key, value in sums.items()}
