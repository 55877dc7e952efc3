"""Every form of parallelism, alone and in pairs, gives the step of one device.

The loss within 1e-6, the gradient of each weight within 1e-5 of its largest entry, in float32, on packed rows.
"""

import collections
import functools
import math

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxllm import tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.model.build import build
from jaxllm.model.change import change
from jaxllm.objectives.lm import lm
from jaxllm.plan.program import facts
from jaxllm.sharding import ParallelConfig, make_sharding, names_of
from jaxllm.train.step import abstract_state, make_state, make_train_step

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


def on(parallel: dict):
    """The mesh of these sizes, over as many devices."""
    devices = jax.devices()[: math.prod(parallel.values())]
    return make_sharding(ParallelConfig(**{"fsdp": 1} | parallel), devices)


def compiled(config, sharding, kernels: dict, key=0):
    """`((loss, {path: gradient}), model, program)` of one step, the gradient as the move with learning rate 1."""
    model, tx = build(config, sharding, tiny.Kernels(unroll=0, **kernels)), optax.sgd(1.0)
    before = jax.tree.map(np.asarray, tiny.weights(model))
    state = make_state(model, tx, jax.random.key(key), params=tiny.weights(model))
    batch = sharding.batch(BATCH)
    program = make_train_step(model, lm, tx, abstract=abstract_state(model, tx)).lower(state, batch).compile()
    state, metrics = program(state, batch)
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
    return (float(metrics["loss"]), tree.flatten(moved)), model, program


def step(*args, **options):
    """`(loss, {path: gradient})` of one step."""
    return compiled(*args, **options)[0]


@functools.cache
def on_a_mesh(kind: str, form: str):
    """What `compiled` gives for a form; each program is compiled once, whatever is asked of it."""
    parallel, kernels = FORMS[form]
    return compiled(CONFIGS[kind], on(parallel), kernels)


def check(found, expected):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    off = {path: tiny.relative(gradient[path], g) for path, g in expected_gradient.items()}
    assert max(off.values()) < 1e-5, off


@functools.cache
def on_one_device(kind: str):
    return step(CONFIGS[kind], on({"data": 1}), {})


@pytest.mark.parametrize("kind,form", list(cases()))
def test_a_form_equals_one_device(kind, form):
    check(on_a_mesh(kind, form)[0], on_one_device(kind))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"fsdp": 8}, {"data": 2, "context": 4}])
def test_dropout_is_the_same_on_every_mesh(parallel):
    """A mask belongs to a row of the batch and not to the device that holds it."""
    config = tiny.config(dropout=0.3, vocab_multiple=8)
    expected = step(config, on({"data": 1}), {})
    check(step(config, on(parallel), {}), expected)
    assert step(config, on({"data": 1}), {}, key=1)[0] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.slow
def test_all_tokens_at_one_expert_lose_none():
    """Every row of every device travels to one of eight: still what one device computes."""
    config = tiny.config(moe={"experts": 8, "router_bias": True, "experts_per_token": 1}, layers=1, vocab_multiple=8)
    found = []
    for parallel in ({"data": 1}, {"expert": 8}):
        sharding = on(parallel)
        model = build(config, sharding, tiny.Kernels(unroll=0))
        params = tiny.weights(model)
        bias = params["layers"]["0"]["moe"]["router_bias"]
        skewed = jax.device_put(np.asarray(bias) + np.where(np.arange(8) == 5, 1e3, 0), bias.sharding)
        params["layers"]["0"]["moe"]["router_bias"] = skewed.astype(bias.dtype)
        before = jax.tree.map(np.asarray, params)
        state = make_state(model, optax.sgd(1.0), jax.random.key(0), params=params)
        state, metrics = make_train_step(model, lm, optax.sgd(1.0))(state, sharding.batch(BATCH))
        assert float(metrics["expert_load_max"]) == pytest.approx(8) and float(metrics["dropped"]) == 0
        moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
        found.append((float(metrics["loss"]), tree.flatten(moved)))
    check(found[1], found[0])


#: Bytes of sums that are of no weight: losses, counts, the norm of the gradient, what routers sum over a row.
SMALL = 2048


def called_for(form: str, model) -> dict[tuple[str, str], float]:
    """`{(kind of collective, mesh axis): the most bytes}` that a step sends along each axis, by what it is for."""
    sizes, ring = model.sharding.mesh.shape, FORMS[form][1] == {"context": "ring"}
    leaves = [(names_of(x.sharding.spec), x.size * x.dtype.itemsize) for x in jax.tree.leaves(model.abstract)]

    def held(axes, size, gathered=()):
        """Bytes of a weight on a device that has gathered it over some axes."""
        return size / math.prod(sizes[axis] for axis in axes if axis not in gathered)

    most = {}
    for axis in ("data", "expert", "context"):  # of a weight that devices all have, each sums the gradient once
        if sizes[axis] > 1:
            most["all-reduce", axis] = sum(held(axes, n) for axes, n in leaves if axis not in axes) + SMALL
    if sizes["fsdp"] > 1:  # others gather: for the forward pass and for the backward pass at most
        shared = sum(held(axes, n, "fsdp") for axes, n in leaves if "fsdp" in axes)
        most |= {("all-gather", "fsdp"): 2 * shared, ("reduce-scatter", "fsdp"): shared}
    if sizes["expert"] > 1:  # rows that travel: on CPU a gather, and its derivative, in the place of the all-to-all
        most |= {("all-gather", "expert"): math.inf, ("reduce-scatter", "expert"): math.inf}
    config, spec = model.config, model.config.layer_specs[0]
    ids = 4 * BATCH.tokens_BT.size / model.sharding.batch_size  # of whole rows of a device
    if sizes["tensor"] > 1:
        # Gathered (and reduced) in each layer are what attention and feed-forward read (give), forward, both and the
        # gradients of both backward, and at both ends what the head reads and the gradient of the embedding. Experts
        # read what the router says, too, and backward a gradient for each choice.
        x, moe = ids / sizes["context"] * config.embed, spec.moe
        routed = 0 if moe is None else moe.experts_per_token + (moe.experts + moe.experts_per_token) / config.embed
        most["all-gather", "tensor"] = config.layers * (6 + routed) * x + 2 * x
        # On CPU what is reduced and scattered is reduced and cut, the gradients by q, k, v, gate and up each by itself,
        # and the blocks of experts in a loop; the head has three numbers a token.
        reduced = config.layers * 7 * x + 2 * x + 3 * x / config.embed + SMALL
        most["all-reduce", "tensor"] = reduced if moe is None else math.inf
    if (n := sizes["context"]) > 1:
        keys = 2 * config.layers * ids * spec.attn.kv_heads / sizes["tensor"] * config.head_dim(spec.attn)
        if ring:  # n - 1 turns forward, and as many backward with gradients of both, which then go home
            turns = (n - 1) * (3 * keys + config.layers * 4 * ids) + keys
            most |= {("all-gather", "context"): 5 * ids, ("collective-permute", "context"): turns / n}
        else:  # the batch, keys and values of each layer, and where they lie
            most |= {("all-gather", "context"): 7 * ids + keys, ("reduce-scatter", "context"): keys}
    return most


@pytest.mark.parametrize("kind,form", list(cases()))
def test_no_collective_that_the_form_does_not_call_for(kind, form):
    """Along each axis of the mesh those of its own form, no more bytes than that takes, and each of them is there."""
    _, model, program = on_a_mesh(kind, form)
    most, found = called_for(form, model), collections.Counter()
    for one in facts(program, model.sharding.mesh).collectives:
        assert one.kind == "all-reduce" or len(one.axes) == 1, one
        for axis in one.axes:
            found[one.kind, axis] += one.payload_bytes
    sums_of_weights = {key: most[key] - SMALL for key in most if key[0] == "all-reduce" and key[1] != "tensor"}
    for key, payload in found.items():
        assert payload <= most.get(key, SMALL if key[0] == "all-reduce" else 0), key
    for key in most:
        assert found[key] >= sums_of_weights.get(key, 1), f"{key} is missing"


def adapted(sharding):
    """`(loss, {path: gradient})` of adapters over int8 and nf4 weights, of which devices hold parts."""
    rules = (QuantizeRule(pattern="**/attn/*", format="int8"), QuantizeRule(pattern="**/mlp/*", format="nf4", group=16))
    changes = (
        Change(quantize=QuantizeConfig(rules=rules)),
        Change(lora=LoraConfig(rank=4, pattern="**/attn/*,**/mlp/*")),
    )
    plain = build(tiny.config(vocab_multiple=8), sharding, tiny.Kernels(unroll=0))
    model, params = plain, tiny.weights(plain)
    for one in changes:
        params, model = change(model, one.plan(model), params), after(model, (one,))
    tx = optax.sgd(1.0)
    before = jax.tree.map(np.asarray, params)
    state = make_state(model, tx, jax.random.key(0), params=params, trainable=TRAINABLE)
    state, metrics = make_train_step(model, lm, tx, trainable=TRAINABLE)(state, sharding.batch(BATCH))
    moved = jax.tree.map(lambda a, b: a.astype(np.float32) - np.asarray(b).astype(np.float32), before, state.params)
    return float(metrics["loss"]), {path: d for path, d in tree.flatten(moved).items() if np.any(d)}


@pytest.mark.parametrize("parallel", [{"fsdp": 8}, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)])
def test_adapters_over_quantised_weights_equal_one_device(parallel):
    expected = adapted(on({"data": 1}))
    assert all("lora_b" in path for path in expected[1]) and len(expected[1]) > 5, "b starts at 0: only it moves"
    check(adapted(on(parallel)), expected)


def changed_experts(sharding, one: Change, trainable: str):
    """`(loss, {path: gradient})` of experts whose weights are of another type than arrays."""
    plain = build(CONFIGS["moe"], sharding, tiny.Kernels(unroll=0))
    params = tiny.weights(plain)
    params, model = change(plain, one.plan(plain), params), after(plain, (one,))
    tx = optax.sgd(1e3)  # else the weights' own rounding is 1e-5 of what moves
    before = jax.tree.map(np.asarray, params)
    state = make_state(model, tx, jax.random.key(0), params=params, trainable=trainable)
    state, metrics = make_train_step(model, lm, tx, trainable=trainable)(state, sharding.batch(BATCH))
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
    return float(metrics["loss"]), {path: d for path, d in tree.flatten(moved).items() if np.any(d)}


@pytest.mark.parametrize("kind", ["qat", pytest.param("dora", marks=pytest.mark.slow)])
def test_experts_of_other_types_equal_one_device(kind):
    """Each of two devices sees half of the experts."""
    changes = {
        "qat": (Change(qat={"rules": [{"format": "int8", "pattern": "**/moe/*"}]}), "**"),
        "dora": (Change(lora=LoraConfig(rank=4, kind="dora", pattern="**/moe/*")), TRAINABLE),
    }
    expected = changed_experts(on({"data": 1}), *changes[kind])
    assert any("moe/up" in path for path in expected[1])
    check(changed_experts(on({"expert": 2}), *changes[kind]), expected)


@pytest.mark.parametrize("kind, dtype", [("lora", "bfloat16"), ("dora", "float32")])
def test_weights_under_adapters_travel_as_products_take_them(kind, dtype, monkeypatch):
    """In the compute dtype; under DoRA in float32, of which its norms are."""
    sharding = on({"fsdp": 2})
    plain = build(tiny.config(vocab_multiple=8, dtype="bfloat16"), sharding, tiny.Kernels(unroll=0))
    model = after(plain, (Change(lora=LoraConfig(rank=4, kind=kind)),))
    tx, sent, whole = optax.sgd(1.0), [], type(sharding).gather

    def gather(self, x, axis, dim):
        sent.append(x)
        return whole(self, x, axis, dim)

    monkeypatch.setattr(type(sharding), "gather", gather)
    options = dict(trainable=TRAINABLE)
    jax.eval_shape(make_train_step(model, lm, tx, **options), abstract_state(model, tx, **options), BATCH)
    ups = [x for x in sent if x.shape == (16, 48)]  # embed / 2, ffw: no array of an adapter has this shape
    assert ups and {str(x.dtype) for x in ups} == {dtype}
