"""Distillation against a float64 reference of its divergence and loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.objectives.distill import DistillConfig, distill, divergence, teach
from jaxllm.objectives.lm import lm


@pytest.fixture(scope="module")
def model():
    return tiny.one_device(tiny.config(vocab_multiple=8))


def taught(model, config, seed=9):
    """A batch with what a teacher of other weights says of it, and the teacher's logits."""
    batch, teacher = tiny.batch(), tiny.weights(model, seed=seed)
    ids, logprobs = jax.jit(lambda p: teach(model, p, batch, config=config, vocab=tiny.VOCAB))(teacher)
    logits = np.asarray(jax.jit(model.logits)(teacher, batch.tokens_BT, **tiny.where(batch)), np.float64)
    return dataclasses.replace(batch, top_ids_BTN=ids, top_logprobs_BTN=logprobs), logits[..., : tiny.VOCAB]


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(p, q, ids=None):
    """Of distributions given by their logs; over `ids` and the event of any other."""
    if ids is None:
        return (np.exp(p) * (p - q)).sum(axis=-1)
    p, q = (np.take_along_axis(x, ids, -1) for x in (p, q))
    rest_p, rest_q = (1 - np.exp(x).sum(axis=-1) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=-1) + rest_p * np.log(rest_p / rest_q)


@pytest.mark.parametrize("top_k, temperature", [(5, 1.0), (5, 2.0), (tiny.VOCAB, 1.5)])
def test_the_loss_is_that_of_the_paper(model, top_k, temperature):
    config = DistillConfig(teacher="-", weight=0.7, temperature=temperature, top_k=top_k)
    batch, teacher = taught(model, config)
    params = tiny.weights(model)
    student = np.asarray(jax.jit(model.logits)(params, batch.tokens_BT, **tiny.where(batch)), np.float64)
    student, mask = student[..., : tiny.VOCAB], np.asarray(batch.mask_BT)
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    assert np.array_equal(np.asarray(batch.top_ids_BTN)[..., 0], teacher.argmax(axis=-1))
    expected_kl = (kl(p, q, np.asarray(batch.top_ids_BTN) if top_k < tiny.VOCAB else None) * mask).sum()
    ce = -(np.take_along_axis(log_softmax(student), np.asarray(batch.targets_BT)[..., None], -1)[..., 0] * mask).sum()
    loss, count, metrics = jax.jit(lambda params: distill(model, params, batch, config=config))(params)
    assert count == mask.sum() and metrics["kl"] == pytest.approx(expected_kl, rel=1e-3)
    assert metrics["ce"] == pytest.approx(ce, rel=1e-5) == lm(model, params, batch)[2]["ce"]
    assert loss == pytest.approx(0.3 * ce + 0.7 * temperature**2 * expected_kl, rel=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(model):
    config = DistillConfig(teacher="-", weight=1.0, top_k=7)
    batch, _ = taught(model, config, seed=0)
    params = tiny.weights(model)

    def loss_of(params):
        loss, _, metrics = distill(model, params, batch, config=config)
        return loss, metrics

    gradient, metrics = jax.jit(jax.grad(loss_of, has_aux=True))(params)
    assert abs(metrics["kl"]) < 1e-3
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-3


def test_the_gradient_by_the_logits_is_the_difference_of_the_distributions():
    """d KL / d logits = (q - p) / t with all tokens given."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 1, 3, 11))
    p = log_softmax(teacher / 2)
    ids = np.broadcast_to(np.arange(11), p.shape)
    gradient = jax.grad(lambda x: jnp.sum(divergence(x, ids, jnp.asarray(p, jnp.float32), 2.0)))(
        jnp.asarray(student, jnp.float32)
    )
    assert tiny.relative(gradient, (np.exp(log_softmax(student / 2)) - np.exp(p)) / 2) < 1e-3
