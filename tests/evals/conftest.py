"""A tokenizer, a small model with norms and biases off their neutral start, and its plain forward pass."""

import dataclasses
import json
from functools import cached_property

import jax
import numpy as np
import pytest
import tiny

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generate.decode import unstack

TEXT = "the quick brown fox jumps over the lazy dog, and is it not the dog that sleeps: yes, no, maybe. Q A\n" * 20
CONTEXT = 48


@dataclasses.dataclass
class Loaded:
    """What `jaxllm.load` gives, and the log-probabilities of a plain pass over one text."""

    model: object
    params: dict
    tokenizer: Tokenizer

    @cached_property
    def decoding(self):
        return unstack(self.params)

    @cached_property
    def forward(self):
        return jax.jit(self.model.logits)

    def by_hand(self, context, continuation) -> tuple[float, bool]:
        """`(nats, greedy)` from the logits of the whole text, no row beside it; padding would be seen by no one."""
        ids = [*context, *continuation]
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(ids) - 1] = ids[:-1]
        logits = np.asarray(self.forward(self.params, row), np.float64)[0, len(context) - 1 : len(ids) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logprobs[np.arange(len(continuation)), continuation].sum(), (logits.argmax(-1) == continuation).all()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], vocab=300)


@pytest.fixture(scope="session")
def loaded(tokenizer):
    """Windows, soft-caps, a padded vocabulary, and 10 ids more than the tokenizer has."""
    layers = [tiny.layer({"window": 5, "sinks": True}), tiny.layer({"qkv_bias": True})]
    config = tiny.config(vocab=310, vocab_multiple=16, context=CONTEXT, layers=2, pattern=layers, logit_softcap=9.0)
    model = tiny.one_device(config)
    return Loaded(model, tiny.weights(model, seed=3), tokenizer)


@pytest.fixture(scope="session")
def uniform(loaded):
    """The same model with all weights zero: every token has the probability 1 / 310."""
    return Loaded(loaded.model, jax.tree.map(np.zeros_like, loaded.params), loaded.tokenizer)


@pytest.fixture
def write(tmp_path):
    """`write(*items)`: a task file with these items."""

    def make(*items, name="task.jsonl"):
        lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return make
