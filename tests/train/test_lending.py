"""Experts on loan: the step is that of one device, and each device computes its fair share of the rows.

The loss within 1e-6, the gradient of each weight within 1e-5 of its largest entry, in float32, on packed rows.
"""

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
from jaxllm.kernels import lending
from jaxllm.model.build import build
from jaxllm.model.change import change
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step

BATCH = tiny.batch(rows=8, length=32)


def on(parallel: dict):
    """The mesh of these sizes, over as many devices."""
    devices = jax.devices()[: math.prod(parallel.values())]
    return make_sharding(ParallelConfig(**{"fsdp": 1} | parallel), devices)


def check(found, expected):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    off = {path: tiny.relative(gradient[path], g) for path, g in expected_gradient.items()}
    assert max(off.values()) < 1e-5, off


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

    #: Of a learning rate of 1 the move of a magnitude near 1 would have five digits.
    LR = 64.0

    def __init__(self, parallel, kernels, accumulate=1, change_of=None, trainable="**"):
        spec = {"experts": 8, "balance": "bias", "bias": True, "experts_per_token": 1, "renormalize": False}
        config = tiny.config(moe=spec, layers=1, vocab_multiple=8)
        self.sharding, self.change, self.trainable, self.rows = on(parallel), change_of, trainable, []
        self.plain = build(config, self.sharding, tiny.Kernels(unroll=0, **kernels))
        self.model = self.plain if change_of is None else after(self.plain, (change_of,))
        options = dict(trainable=trainable, accumulate=accumulate)
        self.tx = optax.sgd(self.LR)
        self.step = make_train_step(self.model, lm, self.tx, **options)

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
        state = make_state(self.model, self.tx, jax.random.key(0), params=params, trainable=self.trainable)
        state, metrics = self.step(state, self.sharding.batch(BATCH))
        move = lambda a, b: (np.asarray(a, np.float32) - np.asarray(b)) / self.LR  # noqa: E731
        moved = jax.tree.map(move, before, state.params)
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
