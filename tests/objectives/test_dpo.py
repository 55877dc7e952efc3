"""Direct preference optimisation against a float64 reference of its loss and gradient."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxllm.model.build import build
from jaxllm.objectives.dpo import DpoConfig, by_pair, dpo
from jaxllm.objectives.logprobs import token_logprobs
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_eval_step, make_state, make_train_step

SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 2 + [4] * 3 + [0] * 2, [1] * 8 + [2] * 8], np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny.one_device(tiny.config(vocab_multiple=8))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    packed = tiny.packed(rng.integers(0, tiny.VOCAB, SEGMENTS.shape), SEGMENTS, rng)
    mask = np.array(packed.mask_BT) * (np.asarray(packed.positions_BT) > 0)  # each prompt is one token
    reference = rng.normal(-4, 0.5, SEGMENTS.shape).astype(np.float32)
    return dataclasses.replace(packed, mask_BT=jnp.asarray(mask), reference_BT=jnp.asarray(reference))


def sums(x, batch):
    """`[(chosen, rejected), ...]` of the pairs, by loops."""
    rows, segments = np.asarray(x, np.float64) * np.asarray(batch.mask_BT), np.asarray(batch.segments_BT)
    pairs = []
    for row, numbers in zip(rows, segments, strict=True):
        pairs += [tuple(row[numbers == n + k].sum() for k in (0, 1)) for n in range(1, numbers.max(), 2)]
    return np.array(pairs)


def test_log_probabilities_are_those_of_the_softmax(model, batch):
    params = tiny.weights(model)
    logits = jax.jit(model.logits)(params, batch.tokens_BT, **tiny.where(batch))
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch.targets_BT)[..., None], -1)
    found = jax.jit(lambda p: token_logprobs(model, p, batch))(params)
    assert tiny.relative(found, expected[..., 0]) < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_the_paper(model, batch, smoothing):
    """By log-probabilities given, so that the reference is plain NumPy in float64."""
    beta, config = 0.3, DpoConfig(beta=0.3, label_smoothing=smoothing)
    logprobs = np.random.default_rng(5).normal(-4, 1, SEGMENTS.shape)

    def loss_of(logprobs):
        margin = beta * np.subtract(*(sums(logprobs - np.asarray(batch.reference_BT, np.float64), batch).T))
        return margin, (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))

    margin, losses = loss_of(logprobs)
    given = pytest.MonkeyPatch()
    given.setattr("jaxllm.objectives.dpo.token_logprobs", lambda model, params, batch, key: params)
    (loss, (count, metrics)), gradient = jax.value_and_grad(
        lambda x: (lambda a, b, c: (a, (b, c)))(*dpo(model, x, batch, config=config)), has_aux=True
    )(jnp.asarray(logprobs, jnp.float32))
    given.undo()
    assert count == 3 and abs(loss - losses.sum()) < 1e-5
    assert abs(metrics["margin"] - margin.sum()) < 1e-4 and metrics["accuracy"] == (margin > 0).sum()
    assert abs(metrics["reward_chosen"] - metrics["reward_rejected"] - metrics["margin"]) < 1e-4
    expected, step = np.zeros(SEGMENTS.shape), 1e-4
    for place in np.ndindex(*SEGMENTS.shape):
        moved = logprobs.copy()
        moved[place] += step
        expected[place] = (loss_of(moved)[1].sum() - losses.sum()) / step
    assert tiny.relative(gradient, expected) < 1e-3


def test_the_policy_that_is_the_reference_has_no_margin(model, batch):
    params = tiny.weights(model)
    same = dataclasses.replace(batch, reference_BT=token_logprobs(model, params, batch))
    loss, count, metrics = dpo(model, params, same, config=DpoConfig())
    assert abs(loss / count - np.log(2)) < 1e-6 and abs(metrics["margin"]) < 1e-5


def test_segments_that_hold_no_pair_count_for_nothing():
    chosen, rejected = by_pair(jnp.arange(1.0, 33).reshape(2, 16), jnp.asarray(SEGMENTS))
    assert chosen[0, :3].tolist() == [15, 21, 0] and rejected[0, :3].tolist() == [30, 39, 0]
    assert (chosen[1, 0], rejected[1, 0]) == (164, 228) and chosen.shape == (2, 8)


def test_no_pair_is_lost_where_devices_hold_parts_of_rows():
    """Seven pairs in rows of 32 tokens, of which each of four devices holds 8."""
    rng = np.random.default_rng(4)
    segments = np.array([[*np.repeat(np.arange(1, 15), 2), 0, 0, 0, 0]] * 2)
    packed = tiny.packed(rng.integers(0, tiny.VOCAB, segments.shape), segments, rng)
    reference = rng.normal(-4, 0.5, segments.shape).astype(np.float32)
    given, found = dataclasses.replace(packed, reference_BT=jnp.asarray(reference)), []
    for context in (1, 4):
        sharding = make_sharding(ParallelConfig(fsdp=1, context=context), jax.devices()[:context])
        model = build(tiny.config(vocab_multiple=8), sharding)
        evaluate = make_eval_step(model, functools.partial(dpo, config=DpoConfig()))
        found.append(evaluate(tiny.weights(model), sharding.batch(given)))
    assert found[0]["targets"] == 14
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(float(expected), rel=1e-5, abs=1e-5), name


@pytest.mark.fast
def test_the_loss_follows_the_golden_curve(model, batch):
    """From log 2 on: the reference is the model that the steps start from."""
    params, config = tiny.weights(model), DpoConfig(beta=0.3)
    same = dataclasses.replace(batch, reference_BT=jax.jit(lambda p: token_logprobs(model, p, batch))(params))
    tx, losses = optax.adam(1e-3), []
    state = make_state(model, tx, jax.random.key(0), params=params)
    step = make_train_step(model, functools.partial(dpo, config=config), tx)
    for _ in range(12):
        state, metrics = step(state, same)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(2)) < 1e-6 and losses[-1] < 0.5 * losses[0]
    tiny.check_golden(Path(__file__).parent / "golden.json", "dpo", losses)
