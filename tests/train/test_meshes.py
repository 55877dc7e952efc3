"""One batch, one gradient: eight devices and accumulated microbatches give the step of one device and one big batch."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step

CONFIGS = {
    "dense": tiny.config({"window": 5, "qk_norm": "head"}, tied=True, vocab_multiple=8, logit_softcap=20.0),
    "moe": tiny.config(moe={"shared_ffw": 16}, vocab_multiple=8),
    "capacity": tiny.config(layers=1, moe={"capacity_factor": 0.8}, vocab_multiple=8),
}
MESHES = {
    "fsdp8": {"fsdp": 8},
    "data2 fsdp2 tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert4 fsdp2": {"expert": 4, "fsdp": 2},
    "context2 fsdp4": {"context": 2, "fsdp": 4},
    "tensor2 fsdp4": {"tensor": 2, "fsdp": 4},
}
#: Compiling for a mesh takes seconds, so not every kind meets every mesh.
CASES = [
    ("dense", "fsdp8"),
    ("dense", "data2 fsdp2 tensor2"),
    ("dense", "context2 fsdp4"),
    ("moe", "data2 fsdp2 tensor2"),
    ("moe", "expert4 fsdp2"),
    ("moe", "context2 fsdp4"),
    ("moe", "tensor2 fsdp4"),
]
BATCH = tiny.batch(rows=8)


def step(kind: str, sharding, accumulate=1):
    """`(metrics, gradient)` of one step, the gradient as the move of a step with learning rate 1."""
    model = build(CONFIGS[kind], sharding, tiny.Kernels(unroll=0))
    tx = optax.sgd(1.0)
    before = jax.tree.map(np.asarray, tiny.weights(model))
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    state, metrics = make_train_step(model, lm, tx, accumulate=accumulate)(state, sharding.batch(BATCH))
    for weight, described in zip(jax.tree.leaves(state.params), jax.tree.leaves(model.abstract), strict=True):
        assert weight.sharding.is_equivalent_to(described.sharding, weight.ndim)
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)


@functools.cache
def on_one_device(kind: str):
    return step(kind, make_sharding(ParallelConfig(), jax.devices()[:1]))


def check(kind, metrics, gradient):
    expected, expected_gradient = on_one_device(kind)
    for name in ("loss", "ce", *(["balance", "router_z"] if kind != "dense" else [])):
        assert tiny.relative(metrics[name], expected[name]) < 1e-6, name
    assert metrics["targets"] == expected["targets"] and metrics["skipped"] == 0
    largest = max(np.max(np.abs(g)) for g in jax.tree.leaves(expected_gradient))
    off = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / largest, gradient, expected_gradient)
    assert max(jax.tree.leaves(off)) < 1e-5


@pytest.mark.parametrize("kind,mesh", CASES)
def test_eight_devices_equal_one(kind, mesh):
    check(kind, *step(kind, make_sharding(ParallelConfig(**MESHES[mesh]))))


def test_accumulation_equals_the_big_batch():
    """Capacity is counted within a row, so that even what is dropped does not change."""
    metrics, gradient = step("capacity", make_sharding(ParallelConfig(), jax.devices()[:1]), accumulate=4)
    check("capacity", metrics, gradient)
    assert metrics["dropped"] == pytest.approx(on_one_device("capacity")[0]["dropped"], rel=1e-6)
    assert metrics["dropped"] > 0


def test_accumulation_on_eight_devices_equals_the_big_batch_on_one():
    check(
        "dense", *step("dense", make_sharding(ParallelConfig(fsdp=2, tensor=4, rules={"kv_heads": None})), accumulate=4)
    )
