"""The training step: what moves, what stays bit for bit, what is counted; and the golden loss curves."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxllm import tree
from jaxllm.objectives.lm import lm
from jaxllm.train.step import compiler_options, make_eval_step, make_state, make_train_step

BATCH = tiny.batch()
CONFIGS = {
    "dense": tiny.config({"window": 5, "qk_norm": "head"}, tied=True),
    "moe": tiny.config(prefix=[tiny.layer()], moe={"shared_ffw": 16, "balance": "bias", "bias_rate": 0.01}),
}
GOLDEN = Path(__file__).parent / "golden.json"
DECAY = 0.9


@pytest.fixture(scope="module", params=CONFIGS)
def trainer(request):
    """`(kind, model, new state, step)`: AdamW with weight decay, and an average of the weights."""
    model = tiny.one_device(CONFIGS[request.param], unroll=0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    new = lambda: make_state(model, tx, jax.random.key(0), params=tiny.weights(model), ema=True)  # noqa: E731
    return request.param, model, new, make_train_step(model, lm, tx, ema=DECAY)


def copy(x):
    return jax.tree.map(np.array, x)


def stream(step: int):
    """Row after row of a noisy arithmetic sequence: something to learn, the same on every machine."""
    rng = np.random.default_rng(step)
    tokens = (rng.integers(0, 8, (4, 1)) * 7 + np.arange(17) * 3) % tiny.VOCAB
    tokens = np.where(rng.random(tokens.shape) < 0.1, rng.integers(0, tiny.VOCAB, tokens.shape), tokens)
    batch = tiny.packed(tokens[:, :-1], np.ones((4, 16), int))
    return dataclasses.replace(batch, targets_BT=jnp.asarray(tokens[:, 1:], jnp.int32))


@pytest.mark.fast
def test_the_loss_follows_the_golden_curve(trainer):
    kind, _, new, step = trainer
    state, losses = new(), []
    for i in range(20):
        state, metrics = step(state, stream(i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    tiny.check_golden(GOLDEN, kind, losses)


def test_a_step_donates_its_state_and_averages_its_weights(trainer):
    _, _, new, step = trainer
    state = new()
    average = copy(state.params)
    for i in range(3):
        old = state
        state, _ = step(state, stream(i))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        average = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * np.asarray(p), average, state.params)
        assert tiny.worst(state.extra["ema"], average) < 1e-5
    assert int(state.step) == 3


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(trainer):
    _, _, new, step = trainer
    state, _ = step(new(), BATCH)
    before, average, key = copy((state.params, state.opt)), copy(state.extra["ema"]), state.key.copy()
    bad = dataclasses.replace(BATCH, mask_BT=BATCH.mask_BT.at[2, 3].set(jnp.nan))
    for n in (1, 2):
        state, metrics = step(state, bad)
        assert tiny.bit_equal(before, copy((state.params, state.opt)))
        assert tiny.bit_equal(average, copy(state.extra["ema"]))
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == n
    assert int(state.step) == 3 and bool(jnp.all(jax.random.key_data(state.key) == jax.random.key_data(key)))
    state, metrics = step(state, BATCH)
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_row"]) == 0
    assert np.isfinite(metrics["loss"]) and not tiny.bit_equal(before[0], copy(state.params))
    # An infinite weight is not finite either, whatever the batch.
    state.params["embed"] = state.params["embed"].at[BATCH.tokens_BT[0, 0]].set(jnp.inf)
    before = copy((state.params, state.opt))
    state, metrics = step(state, BATCH)
    assert tiny.bit_equal(before, copy((state.params, state.opt))) and int(metrics["skipped_in_row"]) == 1


def test_metrics_are_means_over_the_targets(trainer):
    kind, model, new, step = trainer
    state = new()
    loss, count, sums = jax.jit(lambda p: lm(model, p, BATCH))(state.params)
    evaluated = make_eval_step(model, lm)(state.params, BATCH)
    _, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["ce"], sums["ce"] / count, rtol=1e-6)
    assert metrics["targets"] == count == evaluated["targets"]
    np.testing.assert_allclose(evaluated["loss"], loss, rtol=1e-6)
    assert "load" not in metrics and "load" not in evaluated
    if kind == "moe":
        load = sums["load"]["layers/0"]
        np.testing.assert_allclose(
            metrics["expert_load_max"], np.max(load / np.mean(load, -1, keepdims=True)), rtol=1e-6
        )


@pytest.fixture(scope="module")
def frozen():
    """A step that trains the attention of the mixture of experts, and nothing else."""
    model = tiny.one_device(CONFIGS["moe"], unroll=0)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model), trainable="**/attn/**")
    old = copy(state.params)
    return old, state.opt, *make_train_step(model, lm, tx, trainable="**/attn/**")(state, BATCH)


def test_frozen_weights_stay_bit_for_bit_the_router_bias_too(frozen):
    old, _, state, _ = frozen
    for path, weight in tree.flatten(old).items():
        assert tiny.bit_equal(weight, tree.flatten(state.params)[path]) != ("/attn/" in path), path


def test_frozen_weights_have_no_optimizer_state(frozen):
    _, _, state, _ = frozen
    moments = [path for path, leaf in tree.flatten(state.opt).items() if leaf.ndim]
    assert len(moments) == 2 * sum("/attn/" in path for path in tree.flatten(state.params))
    assert all("/attn/" in path for path in moments)


def test_the_router_bias_moves_by_its_rate_and_by_nothing_else():
    """Against the load, with an optimizer that would decay it; where the load is equal it does not move."""
    model = tiny.one_device(CONFIGS["moe"], unroll=0)
    tx = optax.sgd(0.5)
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    old = copy(state.params["layers"]["0"]["moe"]["bias"])
    load = jax.jit(lambda p: lm(model, p, BATCH)[2]["load"])(state.params)["layers/0"]
    state, _ = make_train_step(model, lm, tx)(state, BATCH)
    expected = old + np.float32(0.01) * np.sign(np.mean(load, -1, keepdims=True) - load)
    assert tiny.bit_equal(copy(state.params["layers"]["0"]["moe"]["bias"]), expected)


def test_each_step_drops_other_activations():
    config = dataclasses.replace(CONFIGS["dense"], dropout=0.5)
    model = tiny.one_device(config, unroll=0)
    tx = optax.sgd(0.0)
    step = make_train_step(model, lm, tx)
    losses = []
    state = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    for _ in range(2):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    again = make_state(model, tx, jax.random.key(0), params=tiny.weights(model))
    assert float(step(again, BATCH)[1]["loss"]) == losses[0] != losses[1]


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU 7x", "TPU7x", "NVIDIA H200"])
def test_only_tpus_with_sparse_cores_are_told_of_them(kind):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * 2), size=2)
    told = compiler_options(SimpleNamespace(mesh=mesh)) is not None
    assert told == (kind in ("TPU v5", "TPU v6 lite", "TPU 7x", "TPU7x"))
