"""Held-out evaluation against plain sums of log-probabilities, document by document."""

import math

import jax
import numpy as np
import pytest
import tiny

from jaxllm.data.store import TokenStore
from jaxllm.errors import DataError
from jaxllm.train.evaluate import Evaluator, Spread

METRICS = ("heldout_loss", "perplexity", "bits_per_byte")
LENGTHS, BYTES = [9, 2, 30, 1, 17], [25, 3, 70, 0, 41]


@pytest.fixture(scope="module")
def made():
    model = tiny.one_device(tiny.config(vocab=50, dropout=0.5))
    return model, tiny.weights(model)


@pytest.fixture(scope="module")
def store():
    lengths = np.array(LENGTHS)
    return TokenStore(
        name="held",
        tokenizer_hash="",
        vocab=50,
        fingerprint="",
        shards=(np.random.default_rng(0).integers(0, 50, lengths.sum()).astype(np.uint16),),
        shard_of=np.zeros(5, np.int32),
        start_of=np.cumsum(lengths) - lengths,
        lengths=lengths,
        bytes=np.array(BYTES),
        hashes=np.arange(5),
    )


def nats_by_hand(model, params, store, seq_len):
    """Every pair once; a prediction sees its own document, from the start of its row at the earliest."""
    line = [(d, p) for d in range(5) for p in range(LENGTHS[d] - 1)]
    logits, total = jax.jit(model.logits), 0.0
    for row in (line[i : i + seq_len] for i in range(0, len(line), seq_len)):
        for document in dict.fromkeys(d for d, _ in row):
            at = [p for d, p in row if d == document]
            ids = store.doc(document, at[0], at[-1] + 2).astype(np.int32)
            logprobs = jax.nn.log_softmax(logits(params, np.resize(ids[:-1], (1, 32))))[0]
            total -= float(np.asarray(logprobs)[np.arange(len(at)), ids[1:]].astype(np.float64).sum())
    return total, len(line)


@pytest.mark.parametrize("seq_len, batch", [(32, 2), (12, 4)])
def test_evaluation_is_exact(made, store, seq_len, batch):
    model, params = made
    nats, tokens = nats_by_hand(model, params, store, seq_len)
    found = Evaluator(model, {"held": store}, seq_len=seq_len, batch=batch)(params)
    assert tokens == sum(LENGTHS) - 5
    assert found["heldout_loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(BYTES), rel=1e-5)


def test_two_stores_are_weighed_by_their_tokens(made, store):
    part = store.select(np.array([0, 2]))
    found = Evaluator(made[0], {"all": store, "part": part}, seq_len=32, batch=2)(made[1])
    tokens = sum(LENGTHS) - 5, 9 + 30 - 2
    nats = found["heldout_loss/all"] * tokens[0] + found["heldout_loss/part"] * tokens[1]
    assert found["heldout_loss"] == pytest.approx(nats / sum(tokens), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (sum(BYTES) + 95), rel=1e-6)


def test_fewer_rows_are_spread_over_the_text(made, store):
    """A row of 12 at every 54 // 12 = 5 rows: two of them are the first and the third."""
    both = [store.select(np.array([d])) for d in range(5)]
    assert sum(int((s.lengths - 1).sum()) for s in both) == 54
    whole = Evaluator(made[0], {"held": store}, seq_len=12, batch=1)
    rows = whole.stores["held"][1]
    some = Spread(rows, 2)
    assert rows.per_epoch == 5
    for k, r in enumerate((0, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(some.row(k), rows.row(r), strict=True))
    assert whole(made[1], rows=99) == whole(made[1]) and not whole.samples(99)


def test_a_sample_has_names_of_its_own_and_counts_stores_by_their_size(made, store):
    """Two rows of each: the larger store weighs as much as with all of its rows."""
    part = store.select(np.array([0]))
    both = Evaluator(made[0], {"all": store, "part": part}, seq_len=12, batch=1)
    found = both(made[1], rows=2)
    assert both.samples(2) and set(found) == {f"{k}_sample{s}" for k in METRICS for s in ("", "/all", "/part")}
    pairs = 54, 8
    mean = sum(n * found[f"heldout_loss_sample/{s}"] for n, s in zip(pairs, ("all", "part"), strict=True)) / 62
    assert found["heldout_loss_sample"] == pytest.approx(mean, rel=1e-6)
    assert found["heldout_loss_sample/part"] == pytest.approx(both(made[1])["heldout_loss/part"], rel=1e-6)


def test_text_with_nothing_to_predict_is_refused(made, store):
    with pytest.raises(DataError, match="held: no document has a second token"):
        Evaluator(made[0], {"held": store.select(np.array([3]))}, seq_len=12, batch=1)
