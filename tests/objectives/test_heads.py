"""Gradients of a head that devices share are summed over chunks in float32, whatever products compute in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.model.build import build
from jaxllm.objectives import lm as text
from jaxllm.objectives import logprobs
from jaxllm.objectives.distill import DistillConfig, distill
from jaxllm.objectives.dpo import DpoConfig, dpo
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.rows import gradients

OBJECTIVES = {
    "lm": lm,
    "dpo": functools.partial(dpo, config=DpoConfig()),
    "distill": functools.partial(distill, config=DistillConfig(teacher="-", top_k=4)),
}


def batch(length=256):
    rng = np.random.default_rng(1)
    segments = np.repeat([[1, 2], [1, 2]], length // 2, axis=1)
    packed = tiny.packed(rng.integers(0, tiny.VOCAB, segments.shape), segments, rng)
    ids = rng.integers(0, tiny.VOCAB, (*segments.shape, 1)) + np.arange(4)
    top = np.log(np.broadcast_to([0.4, 0.3, 0.1, 0.1], ids.shape))
    return dataclasses.replace(
        packed,
        reference_BT=jnp.full(segments.shape, -4, jnp.float32),
        top_ids_BTN=jnp.asarray(ids % tiny.VOCAB, jnp.int32),
        top_logprobs_BTN=jnp.asarray(top, jnp.float32),
    )


def of_the_head(objective, dtype):
    """The gradient of a head of which each of two devices holds half."""
    sharding = make_sharding(ParallelConfig(fsdp=2), jax.devices()[:2])
    model = build(tiny.config(layers=1, vocab_multiple=8, dtype=dtype), sharding)

    def f(params, batch):
        chosen, frozen = tree.partition(params, tree.select(params, "head"))
        return gradients(model, objective, chosen, frozen, batch, None, 1)[1]["head"]

    return np.asarray(jax.jit(f)(tiny.weights(model), sharding.batch(batch())), np.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_many_chunks_in_bfloat16_lose_nothing(name, monkeypatch):
    """256 chunks are as near to the gradient in float32 as 2 are; sums in bfloat16 would be twice as far."""

    def found(chunks, dtype):
        for module in (text, logprobs):
            monkeypatch.setattr(module, "chunks_of", lambda model, shape: chunks)
        return of_the_head(OBJECTIVES[name], dtype)

    exact = found(2, "float32")
    few, many = (np.linalg.norm(found(n, "bfloat16") - exact) / np.linalg.norm(exact) for n in (2, 256))
    assert 0 < few < 0.03 and many < 1.1 * few
