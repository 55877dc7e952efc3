"""Every form of parallelism, alone and in pairs, gives the step of one device.

The loss within 1e-6, the gradient of each weight within 1e-5 of its largest entry, in float32, on packed rows.
"""

import functools
import math

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding

from jaxllm import tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.kernels import lending
from jaxllm.model.build import build
from jaxllm.model.change import change
from jaxllm.objectives.lm import lm
from jaxllm.plan.program import facts
from jaxllm.sharding import ParallelConfig, make_sharding
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


def step(config, sharding, kernels: dict, key=0):
    """`(loss, {path: gradient})` of one step, the gradient as the move of a step with learning rate 1."""
    model = build(config, sharding, tiny.Kernels(unroll=0, **kernels))
    before = jax.tree.map(np.asarray, tiny.weights(model))
    state = make_state(model, optax.sgd(1.0), jax.random.key(key), params=tiny.weights(model))
    state, metrics = make_train_step(model, lm, optax.sgd(1.0))(state, sharding.batch(BATCH))
    return float(metrics["loss"]), tree.flatten(jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params))


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
    parallel, kernels = FORMS[form]
    check(step(CONFIGS[kind], on(parallel), kernels), on_one_device(kind))


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


#: What is added to the scores of eight experts before a token chooses one; the weight of the choice does not change.
PULLS = {
    "even": np.zeros(8),
    "one": np.where(np.arange(8) == 5, 50.0, 0),
    "two": np.where(np.arange(8) // 2 == 1, 50.0, 0),
    "zipf": -0.1 * np.log(np.arange(1, 9)),
}
LENT = {
    "expert": ({"expert": 4}, 1),
    "one each": ({"expert": 8}, 1),
    "accumulated": ({"expert": 4}, 2),
    "fsdp expert": ({"fsdp": 2, "expert": 4}, 1),
    "expert context": ({"expert": 4, "context": 2}, 1),
    "tensor expert": ({"tensor": 2, "expert": 4}, 1),
}


class Skewed:
    """A step of experts that are filled unevenly, and the rows that devices compute in it."""

    def __init__(self, parallel, kernels, accumulate=1, change_of=None, trainable="**"):
        spec = {"experts": 8, "balance": "bias", "bias": True, "experts_per_token": 1, "renormalize": False}
        config = tiny.config(moe=spec, layers=1, vocab_multiple=8)
        self.sharding, self.change, self.trainable, self.rows = on(parallel), change_of, trainable, []
        self.plain = build(config, self.sharding, tiny.Kernels(unroll=0, **kernels))
        self.model = self.plain if change_of is None else after(self.plain, (change_of,))
        options = dict(trainable=trainable, accumulate=accumulate)
        self.step = make_train_step(self.model, lm, optax.sgd(1.0), **options)

    def params(self, pull):
        params = tiny.weights(self.plain)
        layer = params["layers"]["0"]["moe"]
        bias = layer["bias"]
        layer["bias"] = jax.device_put((0 * np.asarray(bias) + pull).astype(bias.dtype), bias.sharding)
        if self.change is None:
            return params
        params = change(self.plain, self.change.plan(self.plain), params)
        rng = np.random.default_rng(1)

        def filled(path, leaf):  # an adapter's b starts at 0, and a would have no gradient
            noise = lambda: np.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
            return jax.device_put(noise(), leaf.sharding) if path.endswith("lora_b") else leaf

        return tree.map_with_path(filled, params)

    def __call__(self, kind: str):
        """`(loss, {path: gradient})`; `rows` has the rows of each device, in the order in which they reported."""
        self.rows.clear()
        params = self.params(PULLS[kind])
        before = jax.tree.map(np.asarray, params)
        state = make_state(self.model, optax.sgd(1.0), jax.random.key(0), params=params, trainable=self.trainable)
        state, metrics = self.step(state, self.sharding.batch(BATCH))
        moved = jax.tree.map(lambda a, b: np.asarray(a, np.float32) - np.asarray(b), before, state.params)
        jax.effects_barrier()
        return float(metrics["loss"]), {path: d for path, d in tree.flatten(moved).items() if np.any(d)}


@pytest.fixture
def watched(monkeypatch):
    """Steps traced while it lasts say how many rows each device computes, and whether experts travelled."""

    def watch(skewed: Skewed) -> Skewed:
        plan = lending.plan

        def spy(*args):
            found = plan(*args)
            loans = found[2].loans
            jax.debug.callback(lambda *x: skewed.rows.append(x), loans.rows_W(), found[2].made)
            return found

        monkeypatch.setattr(lending, "plan", spy)
        return skewed

    return watch


@pytest.mark.parametrize(
    "form", [form if form == "expert" else pytest.param(form, marks=pytest.mark.slow) for form in LENT]
)
def test_experts_on_loan_even_out_the_rows_and_change_no_number(form, watched):
    parallel, accumulate = LENT[form]
    alone, lent = Skewed({"data": 1}, {}), watched(Skewed(parallel, {"experts": "lend"}, accumulate))
    for kind in PULLS:
        expected, found = alone(kind), lent(kind)
        check(found, expected)
        assert len(expected[1]) > 15
        rows = np.array([rows for rows, _ in lent.rows])
        fair = np.ceil(rows.sum(axis=1) / rows.shape[1])
        assert np.all(rows.max(axis=1) <= 1.1 * fair + 1), f"{kind}: {rows}"
        if kind != "even":
            assert all(made for _, made in lent.rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "int8", "nf4", "qat"])
def test_experts_of_other_types_are_lent(kind, watched):
    change_of, trainable = {
        "lora": (Change(lora=LoraConfig(rank=4, pattern="**/moe/*")), TRAINABLE),
        "dora": (Change(lora=LoraConfig(rank=4, kind="dora", pattern="**/moe/*")), TRAINABLE),
        "int8": (
            Change(quantize=QuantizeConfig(rules=(QuantizeRule(pattern="**/moe/*", format="int8"),))),
            "**/attn/*",
        ),
        "nf4": (
            Change(quantize=QuantizeConfig(rules=(QuantizeRule(pattern="**/moe/*", format="nf4", group=8),))),
            "**/attn/*",
        ),
        "qat": (Change(qat={"rules": [{"format": "int8", "pattern": "**/moe/*"}]}), "**"),
    }[kind]
    alone = Skewed({"data": 1}, {}, 1, change_of, trainable)
    lent = watched(Skewed({"expert": 4}, {"experts": "lend"}, 1, change_of, trainable))
    for pull in ("one", "zipf"):
        expected = alone(pull)
        assert any("moe/up" in path or "attn" in path for path in expected[1])
        check(lent(pull), expected)
        assert lent.rows and all(made for _, made in lent.rows)


#: Kinds of collectives that a form calls for; each has an all-reduce for the loss and the norm of the gradient.
CALLED_FOR = {
    "data": set(),
    "fsdp": {"all-gather", "reduce-scatter"},
    "context": {"all-gather", "reduce-scatter"},
    "ring": {"all-gather", "collective-permute"},
    "expert": {"all-gather", "reduce-scatter"},  # which stand for the ragged all-to-all on CPU
}


@pytest.mark.parametrize(
    "kind,form", [("dense", "data"), ("dense", "fsdp"), ("dense", "context"), ("dense", "ring"), ("moe", "expert")]
)
def test_no_collective_that_the_form_does_not_call_for(kind, form):
    """Also no all-reduce of an array larger than the vectors, but where weights are replicated (data, context)."""
    parallel, kernels = FORMS[form]
    sharding, tx = on(parallel), optax.sgd(1.0)
    model = build(CONFIGS[kind], sharding, tiny.Kernels(unroll=0, **kernels))
    state = abstract_state(model, tx)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(sharding.mesh, sharding.rows_spec(x.ndim))
        ),
        BATCH,
    )
    program = facts(make_train_step(model, lm, tx, abstract=state).lower(state, rows).compile(), sharding.mesh)
    assert {one.kind for one in program.collectives} - {"all-reduce"} == CALLED_FOR[form]
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract))
    summed = sum(one.payload_bytes for one in program.collectives if one.kind == "all-reduce")
    if form == "fsdp":
        assert summed < 1024, "gradients are summed in parts"
        gathered = sum(one.payload_bytes for one in program.collectives if one.kind == "all-gather")
        assert gathered < 2.2 * weights, "once for the forward pass, once more for the backward pass at most"
    elif form != "expert":
        assert 0.9 * weights < summed < 1.1 * weights, "each gradient is summed once"


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
    tx = optax.sgd(1.0)
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
