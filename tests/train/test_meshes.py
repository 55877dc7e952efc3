"""One batch, one gradient: eight devices and accumulated microbatches give the step of one device and one big batch."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import abstract_state, make_state, make_train_step

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
    pytest.param("dense", "context2 fsdp4", marks=pytest.mark.slow),
    pytest.param("moe", "data2 fsdp2 tensor2", marks=pytest.mark.slow),
    ("moe", "expert4 fsdp2"),
    pytest.param("moe", "context2 fsdp4", marks=pytest.mark.slow),
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


def three_steps(optimizer: str, sharding):
    """`(losses, weights, optimizer state, its description)` of three steps of one compiled program, as in a run.

    Wide enough that Adafactor keeps rows and columns.
    """
    model = build(tiny.config(embed=128, layers=1, mlp={"ffw": 128}, vocab_multiple=8), sharding)
    tx = make_optimizer(OptimConfig(name=optimizer, lr=1e-2), 3, model.axes)
    abstract = abstract_state(model, tx)
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    batch, losses = sharding.batch(BATCH), []
    step = make_train_step(model, lm, tx, abstract=abstract).lower(state, batch).compile()
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params), state.opt, abstract.opt


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "muon", "adamw"])  # the state of lion and sgd is as adamw's
def test_an_optimizer_takes_three_steps_on_a_mesh_as_on_one_device(optimizer):
    losses, weights, state, described = three_steps(optimizer, make_sharding(ParallelConfig(fsdp=4, tensor=2)))
    for array, place in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True):
        assert array.sharding.is_equivalent_to(place.sharding, array.ndim)
    split = [array for array in jax.tree.leaves(state) if array.ndim and not array.sharding.is_fully_replicated]
    assert sum(array.size for array in split) > 0.9 * sum(array.size for array in jax.tree.leaves(state))
    expected, there, _, _ = three_steps(optimizer, make_sharding(ParallelConfig(), jax.devices()[:1]))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[2] < losses[0]
    assert tiny.worst(weights, there) < 2e-2
