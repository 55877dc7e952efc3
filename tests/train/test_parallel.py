"""Every form of parallelism, alone and in pairs, gives the step of one device.

The loss within 1e-6, the gradient of each weight within 1e-5 of its largest entry, in float32, on packed rows.
"""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxllm import tree
from jaxllm.model.build import build
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step

CONFIGS = {
    "dense": tiny.config({"window": 9}, vocab_multiple=8),
    "moe": tiny.config(moe={"shared_ffw": 16, "experts": 8}, vocab_multiple=8),
}
#: Mesh, and how keys and values meet where rows are split.
FORMS = {
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {}),
    "tensor": ({"tensor": 2}, {}),
    "expert": ({"expert": 8}, {}),
    "context": ({"context": 8}, {}),
    "ring": ({"context": 8}, {"context": "ring"}),
    "data fsdp": ({"data": 4, "fsdp": 2}, {}),
    "data tensor": ({"data": 4, "tensor": 2}, {}),
    "data expert": ({"data": 2, "expert": 4}, {}),
    "data context": ({"data": 4, "context": 2}, {}),
    "data ring": ({"data": 2, "context": 4}, {"context": "ring"}),
    "fsdp tensor": ({"fsdp": 4, "tensor": 2}, {}),
    "fsdp expert": ({"fsdp": 4, "expert": 2}, {}),
    "fsdp context": ({"fsdp": 2, "context": 4}, {}),
    "fsdp ring": ({"fsdp": 4, "context": 2}, {"context": "ring"}),
    "tensor expert": ({"tensor": 2, "expert": 4}, {}),
    "tensor context": ({"tensor": 2, "context": 4}, {}),
    "tensor ring": ({"tensor": 2, "context": 4}, {"context": "ring"}),
    "expert context": ({"expert": 4, "context": 2}, {}),
    "expert ring": ({"expert": 2, "context": 4}, {"context": "ring"}),
}
#: Those that the default run tries; compiling for a mesh takes seconds.
QUICK = {
    ("dense", "fsdp"),
    ("dense", "data ring"),
    ("dense", "tensor context"),
    ("moe", "fsdp expert"),
    ("moe", "ring"),
}
BATCH = tiny.batch(rows=8, length=32)


def cases():
    for kind in CONFIGS:
        for form in FORMS:
            if kind == "moe" or "expert" not in form:
                yield pytest.param(kind, form, marks=[] if (kind, form) in QUICK else pytest.mark.slow)


def step(kind: str, parallel: dict, kernels: dict):
    """`(loss, {path: gradient})` of one step, the gradient as the move of a step with learning rate 1."""
    devices = jax.devices()[: int(np.prod(list(parallel.values())))]
    sharding = make_sharding(
        ParallelConfig(fsdp=1, **parallel) if "fsdp" not in parallel else ParallelConfig(**parallel), devices
    )
    model = build(CONFIGS[kind], sharding, tiny.Kernels(unroll=0, **kernels))
    before = jax.tree.map(np.asarray, tiny.weights(model))
    state = make_state(model, optax.sgd(1.0), jax.random.key(0), params=tiny.weights(model))
    state, metrics = make_train_step(model, lm, optax.sgd(1.0))(state, sharding.batch(BATCH))
    return float(metrics["loss"]), tree.flatten(jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params))


@functools.cache
def on_one_device(kind: str):
    return step(kind, {"data": 1}, {})


@pytest.mark.parametrize("kind,form", cases())
def test_a_form_equals_one_device(kind, form):
    loss, gradient = step(kind, *FORMS[form])
    expected, expected_gradient = on_one_device(kind)
    assert loss == pytest.approx(expected, rel=1e-6)
    off = {path: tiny.relative(gradient[path], g) for path, g in expected_gradient.items()}
    assert max(off.values()) < 1e-5, off
