"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Mapping

import jax

from jaxllm.data.loader import Loader
from jaxllm.data.pack import Row, Rows
from jaxllm.data.store import TokenStore
from jaxllm.data.truncate import Truncate
from jaxllm.errors import DataError
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import lm
from jaxllm.train.step import make_eval_step

LOSS = "heldout_loss"
#: How the names of metrics end that stand for a part of the held-out rows only.
SAMPLE = "_sample"


def loss_of(found: dict[str, float]) -> float:
    """The held-out loss of an evaluation, of a sample or of all rows."""
    return found[LOSS + SAMPLE] if LOSS + SAMPLE in found else found[LOSS]


class Evaluator:
    """Evaluates weights on token stores, every token but a document's first predicted once, in packed rows.

    A row of `seq_len` tokens is what a prediction can see at most, so a longer row gives a lower loss.
    """

    def __init__(
        self,
        model: Model,
        stores: Mapping[str, TokenStore],
        *,
        seq_len: int,
        batch: int,
        objective=lm,
        truncate: Truncate = "right",
    ):
        self.model, self.batch, self.step = model, batch, make_eval_step(model, objective)
        options = dict(shuffle=False, truncate=truncate)
        self.stores = {name: (store, Rows(store, seq_len, **options)) for name, store in stores.items()}
        for name, (_, rows) in self.stores.items():
            if not rows.per_epoch:
                raise DataError(f"{name}: no document has a second token, so there is nothing to predict")

    def samples(self, rows: int | None) -> bool:
        """Whether at most so many rows of each store leave some out."""
        return rows is not None and any(rows < each.per_epoch for _, each in self.stores.values())

    def __call__(
        self, params: Params, *, rows: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """`heldout_loss` (nats a token), `perplexity`, `bits_per_byte`, and each store's when there are several.

        Bits per byte: all nats / ln 2 / UTF-8 bytes of the text; it compares models with different tokenizers.
        rows: at most this many rows of each store, spread over all of it. What they give stands for the whole store,
        so that stores count by their size, and is called `heldout_loss_sample` and so on where rows are left out.
        """
        found = {name: self._sums(params, *pair, rows, progress) for name, pair in self.stores.items()}
        total = [sum(column) for column in zip(*found.values(), strict=True)]
        of = SAMPLE if self.samples(rows) else ""
        out = {key + of: value for key, value in _report(*total).items()}
        if len(found) > 1:
            for name, sums in found.items():
                out |= {f"{key}{of}/{name}": value for key, value in _report(*sums).items()}
        return out

    def _sums(self, params, store: TokenStore, rows: Rows, limit: int | None, progress):
        """`(nats, tokens predicted, bytes of the text)` of the whole store, by what its rows up to `limit` say."""
        stop = min(rows.per_epoch, limit or rows.per_epoch)
        share, shares = self.model.sharding.share
        loader = Loader(Spread(rows, stop), self.batch, stop=stop, prefetch=1, process=share, processes=shares)
        nats = count = 0.0
        for batch in loader:
            sums = jax.device_get(self.step(params, self.model.sharding.batch(batch)))
            nats, count = nats + float(sums["ce"]), count + float(sums["targets"])
            if progress is not None:
                progress(min(loader.position, stop), stop)
        loader.close()
        whole = int(store.targets.sum())
        return nats * (whole / count), whole, store.text_bytes


class Spread:
    """`count` rows of all, evenly spaced: a stream for the Loader."""

    def __init__(self, rows: Rows, count: int):
        self.rows, self.count, self.length = rows, count, rows.length

    def row(self, r: int) -> Row:
        return self.rows.row(r * self.rows.per_epoch // self.count)


def _report(nats: float, count: float, text_bytes: float) -> dict[str, float]:
    loss = nats / count
    return {
        LOSS: loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }
