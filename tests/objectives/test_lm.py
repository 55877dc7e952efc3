"""Chunked cross-entropy against the naive one, and what the language-model objective sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.objectives import lm as module
from jaxllm.objectives.lm import cross_entropy, lm

#: tied and padded vocabulary with a soft-cap; untied and plain
CONFIGS = {"softcap": tiny.DENSE, "plain": tiny.config()}
BATCH = tiny.batch()


def naive(model, head, hidden, targets, mask, z_loss):
    logits = jnp.einsum("btd,vd->btv", hidden, head)[..., : tiny.VOCAB]
    if cap := model.config.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    lse = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    ce = jnp.sum((lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]) * mask)
    return ce + z_loss * jnp.sum(lse**2 * mask), ce


def head_and_hidden(model, length=16):
    rng = np.random.default_rng(1)
    head = jnp.asarray(rng.standard_normal((model.config.padded_vocab, 32)), np.float32)
    return head, jnp.asarray(rng.standard_normal((4, length, 32)), np.float32)


@pytest.mark.parametrize(
    "name,length,held,z_loss",
    [
        ("softcap", 16, 1 << 22, 0.01),
        ("softcap", 16, 600, 0.0),
        ("plain", 16, 600, 0.01),
        ("plain", 13, 600, 0.0),
        ("plain", 1, 1, 0.01),
    ],
)
def test_chunks_equal_the_naive_loss(monkeypatch, name, z_loss, length, held):
    """`held` logits at once: two chunks, many, a prime length (one position each), a single position."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", held)
    model = tiny.one_device(CONFIGS[name])
    batch = jax.tree.map(lambda x: x[:, :length], BATCH)
    mask = batch.mask_BT if length > 1 else jnp.ones((4, 1))

    def value_and_gradients(f):
        def loss(head, hidden):
            loss, ce = f(model, head, hidden, batch.targets_BT, mask, z_loss)
            return 3 * loss, ce

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*head_and_hidden(model, length))

    found, expected = value_and_gradients(cross_entropy), value_and_gradients(naive)
    assert tiny.worst(found[0], expected[0]) < 1e-6
    assert tiny.worst(found[1], expected[1]) < 1e-5
    padding = np.asarray(found[1][0])[tiny.VOCAB :]
    assert not padding.any()


@pytest.mark.fast
def test_the_program_never_holds_all_logits():
    """No float32 array of B * T * V or more ends in V, forward or backward; the naive loss has some."""
    model = tiny.one_device(tiny.DENSE)
    V = model.config.padded_vocab
    params = model.abstract

    def largest(loss):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params)
        return max(a.size for a in tiny.arrays(jaxpr) if a.shape[-1:] == (V,) and len(a.shape) > 2)

    def naive_loss(params):
        hidden = model.apply(params, BATCH.tokens_BT, **tiny.where(BATCH))[0]
        return naive(model, model.head(params), hidden, BATCH.targets_BT, BATCH.mask_BT, 0.0)[0]

    assert largest(lambda p: lm(model, p, BATCH)[0]) == BATCH.tokens_BT.size * V // 2
    V = tiny.VOCAB
    assert largest(naive_loss) >= BATCH.tokens_BT.size * V


def test_bfloat16_hidden_states_keep_float32_losses():
    model = tiny.one_device(CONFIGS["plain"])
    head, hidden = head_and_hidden(model)
    low = hidden.astype(jnp.bfloat16)
    f = jax.value_and_grad(lambda head, h: cross_entropy(model, head, h, BATCH.targets_BT, BATCH.mask_BT)[0], (0, 1))
    loss, (d_head, d_hidden) = jax.jit(f)(head, low)
    expected = f(head.astype(jnp.bfloat16).astype(jnp.float32), low.astype(jnp.float32))
    assert loss.dtype == d_head.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    assert tiny.relative(loss, expected[0]) < 1e-5
    assert tiny.worst((d_head, d_hidden), expected[1]) < 0.02


@pytest.fixture(scope="module")
def moe():
    """`(model, weights, batch -> ((loss_sum, (count, metrics)), gradients))`."""
    model = tiny.one_device(tiny.MOE)
    params = tiny.weights(model)

    def loss(params, batch):
        loss, count, metrics = lm(model, params, batch)
        return loss, (count, metrics)

    return model, params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_a_masked_target_has_no_influence(moe):
    _, params, f = moe
    masked = np.asarray(BATCH.mask_BT) == 0
    other = BATCH.targets_BT + masked * 7
    assert tiny.bit_equal(f(params, BATCH), f(params, dataclasses.replace(BATCH, targets_BT=other % tiny.VOCAB)))
    shown = dataclasses.replace(BATCH, targets_BT=(BATCH.targets_BT + ~masked * 7) % tiny.VOCAB)
    assert not tiny.bit_equal(f(params, BATCH), f(params, shown))


def test_a_masked_target_has_zero_gradient():
    model = tiny.one_device(CONFIGS["plain"])
    head, hidden = head_and_hidden(model)
    f = jax.grad(lambda h: cross_entropy(model, head, h, BATCH.targets_BT, BATCH.mask_BT, 0.1)[0])
    moved = np.any(np.asarray(f(hidden)) != 0, axis=-1)
    np.testing.assert_array_equal(moved, np.asarray(BATCH.mask_BT) > 0)


def test_the_objective_is_a_sum_over_rows(moe):
    """Two halves of a batch add up to the whole in loss, count, metrics and gradients."""
    _, params, f = moe
    halves = [
        f(params, jax.tree.map(lambda x, r=rows: x[r].repeat(2, 0), BATCH)) for rows in (slice(0, 2), slice(2, 4))
    ]
    whole = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert tiny.worst(whole, f(params, BATCH)) < 1e-5


def test_the_loss_is_cross_entropy_and_what_the_router_owes(moe):
    model, params, f = moe
    (loss, (count, metrics)), _ = f(params, BATCH)
    _, _, aux = jax.jit(functools.partial(model.apply, params))(BATCH.tokens_BT, **tiny.where(BATCH))
    targets_B = np.asarray(BATCH.mask_BT).sum(1)
    assert float(count) == targets_B.sum()
    np.testing.assert_allclose(loss, metrics["ce"] + targets_B @ np.asarray(aux["loss_B"]), rtol=1e-6)
    np.testing.assert_allclose(metrics["balance"], targets_B @ np.asarray(aux["balance_B"]), rtol=1e-6)
    real = int((np.asarray(BATCH.segments_BT) > 0).sum())
    for load in metrics["load"].values():
        np.testing.assert_array_equal(np.sum(load, axis=-1), 2 * real)
