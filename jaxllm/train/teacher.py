"""A run that learns from a teacher: its most likely tokens, computed or read from a folder that keeps them."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.batch import TokenBatch
from jaxllm.data.shards import digest
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError, TrainingError
from jaxllm.model.build import Model
from jaxllm.model.spec import ModelConfig
from jaxllm.objectives.distill import DistillConfig, distill, teach
from jaxllm.sharding import Sharding
from jaxllm.train import plain
from jaxllm.train.answers import answered
from jaxllm.train.method import Text
from jaxllm.train.probe_rows import shares_capacity
from jaxllm.train.reference import frozen_model, version_of
from jaxllm.train.rows import outputs
from jaxllm.train.step import traced_on


class Distillation(Text):
    """Each batch comes with what a teacher says of it."""

    def __init__(self, run):
        super().__init__(run)
        config = run.config
        self.teacher = Teacher(config.distill, config.model, run.sharding, run.tokenizer, config.train.accumulate)

    def loss(self):
        return functools.partial(distill, config=self.run.config.distill)

    def plain(self):
        distill = self.run.config.distill
        return functools.partial(plain.teacher, weight=distill.weight, temperature=distill.temperature)

    def data(self):
        run = self.run
        return answered(run.config.data, run.config.distill, run.tokenizer, run.sharding, run.show.say)

    def begin(self, index, stage):
        self.teacher.open_cache(self.run.streams[index].fingerprint, stage.steps * stage.batch, stage.seq_len)

    def complete(self, batch, row):
        return self.teacher(batch, row)

    def check(self, batch):
        return self.teacher.check(batch)


class Teacher:
    """Completes batches; the model is only loaded where the cache does not know a row."""

    rounding = 1e-5
    """How far what it says of a token may move with tokens elsewhere."""

    def __init__(
        self, config: DistillConfig, student: ModelConfig, sharding: Sharding, tokenizer: Tokenizer, accumulate: int
    ):
        self.config, self.sharding, self.tokenizer, self.accumulate = config, sharding, tokenizer, accumulate
        if config.cache is not None and jax.process_count() > 1:
            raise SettingsError(f"distill.cache={config.cache} is for one process, not {jax.process_count()}")
        self.vocab, self.count = student.vocab, min(config.top_k, student.vocab)
        self._step = self._cache = None

    def open_cache(self, stream_fingerprint: str, rows: int, length: int) -> None:
        """Keeps what is said of `rows` rows of a stream, in a folder for this teacher, stream and settings."""
        if self.config.cache is None:
            return
        what = [version_of(self.config.teacher), stream_fingerprint, length, self.count, self.config.temperature]
        self._cache = _Cache(Path(self.config.cache) / digest(what)[:16], rows, length, self.count)

    def __call__(self, batch: TokenBatch, row: int) -> TokenBatch:
        """The batch, whose first row has the number `row` in the stream, with the teacher's tokens in it."""
        rows = batch.tokens_BT.shape[0]
        found = self._cache.read(row, rows) if self._cache is not None else None
        if found is None:
            found = self._teach(batch)
            if self._cache is not None:
                self._cache.write(row, *map(np.asarray, found))
        ids_BTN, logprobs_BTN = (jax.device_put(x, batch.tokens_BT.sharding) for x in found)
        return dataclasses.replace(batch, top_ids_BTN=ids_BTN, top_logprobs_BTN=logprobs_BTN)

    def check(self, batch: TokenBatch) -> list[str]:
        """Whether what comes with each token is of it: another token changes it there, and nothing before or elsewhere.

        Raises TrainingError. What a cache gave without the teacher is not looked at.
        """
        if self._step is None:
            return ["what the teacher says comes from distill.cache, and was not asked again"]
        at = batch.tokens_BT.shape[1] // 2
        tokens_BT, was = batch.tokens_BT, batch.top_logprobs_BTN
        others_BT = tokens_BT.at[:, at].set((tokens_BT[:, at] + 1) % self.vocab)
        ids, now = self._teach(dataclasses.replace(batch, tokens_BT=others_BT))
        real_BT = batch.segments_BT > 0
        after_BT = (batch.segments_BT == batch.segments_BT[:, at : at + 1]) & (jnp.arange(tokens_BT.shape[1]) >= at)
        by_BT = jnp.max(jnp.abs(now - was), axis=-1)
        # Of one row it may not show: a teacher that is sure of a token may be as sure of it after another one.
        there_B = ((by_BT > 1e-5) | jnp.any(ids != batch.top_ids_BTN, axis=-1))[:, at]
        lost = bool(jnp.any(real_BT[:, at])) and not bool(jnp.any(there_B & real_BT[:, at]))
        if lost or bool(jnp.any((by_BT > self.rounding) & ~after_BT & real_BT)):
            raise TrainingError(
                f"self-check: what the teacher says of the first batch is not of its tokens: others at place {at} do "
                "not change it there, or change it elsewhere; this is a fault of the program, not of the data; "
                "train.self_check=false trains anyway"
            )
        return ["what the teacher says of a token is of it and of those before it"]

    def _teach(self, batch: TokenBatch):
        if self._step is None:
            length, says = batch.tokens_BT.shape[1], functools.partial(teach, config=self.config, vocab=self.vocab)
            model, params = frozen_model(self.config.teacher, self.sharding, self.tokenizer, "distill.teacher", length)
            if model.config.vocab < self.vocab:
                raise SettingsError(
                    f"distill.teacher={self.config.teacher} has a vocabulary of {model.config.vocab:,}, and the "
                    f"student of {self.vocab:,}; set model.vocab={model.config.vocab}"
                )
            self.rounding = _rounding(model)
            step = jax.jit(traced_on(model, lambda params, batch: outputs(model, says, params, batch, self.accumulate)))
            self._step = lambda batch: step(params, batch)
        return self._step(batch)


def _rounding(model: Model) -> float:
    """Rows of experts are sorted and rounded anew; what a capacity drops depends on other tokens."""
    if shares_capacity(model):
        return math.inf
    return (1e-3 if model.config.dtype == "float32" else 0.25) if model.config.dropless else 1e-5


class _Cache:
    """Three files for the rows of one stream: ids, log-probabilities, and which rows are there."""

    def __init__(self, folder: Path, rows: int, length: int, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.shape, self.folder = (rows, length, count), folder
        about = {"length": length, "count": count}
        if (folder / "about.json").exists() and json.loads((folder / "about.json").read_text("utf-8")) != about:
            raise DataError(f"{folder}: damaged; remove it, or set distill.cache to another folder")
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        self.ids = self._map("ids", np.uint32, (length, count), rows)
        self.logprobs = self._map("logprobs", np.float32, (length, count), rows)
        self.there = self._map("rows", np.uint8, (), rows)

    def _map(self, name: str, dtype, shape: tuple[int, ...], rows: int) -> np.memmap:
        path = self.folder / name
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with path.open("ab") as file:  # a longer run adds to what a shorter one left
            file.truncate(max(rows * size, path.stat().st_size))
        return np.memmap(path, dtype, mode="r+", shape=(path.stat().st_size // size, *shape))

    def read(self, row: int, count: int):
        if not self.there[row : row + count].all():
            return None
        return self.ids[row : row + count].astype(np.int32), np.array(self.logprobs[row : row + count])

    def write(self, row: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        stop = row + len(ids)
        self.ids[row:stop], self.logprobs[row:stop] = ids, logprobs
        self.ids.flush(), self.logprobs.flush()
        self.there[row:stop] = 1
