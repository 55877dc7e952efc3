"""Unstructured pruning of whole models: what is zero, what stays so in training, and what the weights are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.adapt.changes import Change, after, trainable
from jaxllm.adapt.lora import LoraConfig
from jaxllm.adapt.prune import PruneConfig, prune_plan
from jaxllm.compress.calibrate import Flow, layer_of
from jaxllm.compress.prune import counts, prune, widest
from jaxllm.errors import SettingsError
from jaxllm.model.build import build
from jaxllm.model.change import change, changed, forms, weights_of
from jaxllm.objectives.lm import lm
from jaxllm.optim.config import OptimConfig
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step
from jaxllm.weights.pruned import Pruned

TEXT = tiny.packed(np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 48)), np.ones((8, 48)))
MOE = tiny.config(prefix=[tiny.layer()], layers=2, moe={"shared_ffw": 16}, vocab_multiple=8)


def zeros(params) -> dict[str, np.ndarray]:
    """Where the pruned weights are zero, by path."""
    found = {path: w for path, w in weights_of(params).items() if isinstance(w, Pruned)}
    return {path: np.asarray(w.dense(jnp.float32)) == 0 for path, w in found.items()}


@pytest.fixture(scope="module")
def wanda():
    """`(model, params, (model, params, errors) after Wanda with 2:4, what went through the layers)`."""
    model = tiny.one_device(MOE)
    params, passed, advance = tiny.weights(model), [], Flow.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flow, "advance", lambda *args: (passed.append(args[1:]), advance(*args)))
        return model, params, prune(model, params, PruneConfig(nm="2:4", method="wanda"), [TEXT]), passed


def test_wanda_is_the_formula_on_what_pruned_layers_give_out(wanda):
    """|W| |x| in NumPy for a matrix of each layer; what reaches the last one comes through the pruned first one."""
    model, params, (_, new, errors), passed = wanda
    assert [where for where, _ in passed] == model.layers
    flow, of = Flow(model, params, [TEXT]), forms(model)
    for where, weights in passed:
        assert tiny.bit_equal(weights, layer_of(new, where))
        path = "mlp/up" if where[0] == "prefix" else "moe/shared/up"
        stats = flow.observe(where, layer_of(params, where), {path: of["/".join(where[:2]) + "/" + path]})
        up_DF = np.asarray(tree.flatten(layer_of(params, where))[path])
        by = np.abs(up_DF) * np.sqrt(np.diagonal(np.asarray(stats[path].gram_II)))[:, None]
        by = by.reshape(-1, 4, up_DF.shape[1])
        found = np.asarray(weights_of(weights)[path].dense(jnp.float32)).reshape(by.shape)
        np.testing.assert_array_equal(found == 0, by <= np.sort(by, axis=1)[:, 1:2])
        flow.advance(where, weights)
    assert set(errors) == set(zeros(new)) and "layers/0/moe/up" in errors
    assert not any("router" in path or "norm" in path or path in ("embed", "head") for path in errors)


def test_what_is_pruned_is_described_counted_and_half(wanda):
    model, params, (after_, new, errors), _ = wanda
    assert jax.tree.structure(new) == jax.tree.structure(after_.abstract)
    for found, expected in zip(jax.tree.leaves(new), jax.tree.leaves(after_.abstract), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    of = forms(model)
    for path, zero in zeros(new).items():
        matrix = of[path].matrix if path.startswith("prefix") else jax.vmap(of[path].matrix)
        zero_I4 = np.asarray(matrix(jnp.asarray(zero)))
        assert (zero_I4.reshape(*zero_I4.shape[:-1], -1, 4).sum(-1) == 2).all(), path
    whole, left = counts(params), counts(new)
    assert whole == (tree.count(params),) * 2
    assert left == (whole[0], whole[0] - sum(zero.sum() for zero in zeros(new).values()))
    up, was = weights_of(new)["layers/0/moe/up"], np.float64(params["layers"]["0"]["moe"]["up"][0])
    expected = np.linalg.norm(np.asarray(up.dense(jnp.float32))[0] - was) / np.linalg.norm(was)
    np.testing.assert_allclose(errors["layers/0/moe/up"], [expected], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_prune_and_compute_what_one_does(wanda):
    model, params, (after_, new, _), _ = wanda
    mesh = build(MOE, make_sharding(ParallelConfig(fsdp=2, expert=2, tensor=2)))
    placed = jax.tree.map(lambda x, leaf: jax.device_put(np.asarray(x), leaf.sharding), params, mesh.abstract)
    eight, found, _ = prune(mesh, placed, PruneConfig(nm="2:4", method="wanda"), [TEXT])
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(eight.abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    same = [np.mean(zeros(found)[path] == zero) for path, zero in zeros(new).items()]
    assert min(same) > 0.99, "but for scores that are equal to rounding"
    placed = jax.tree.map(lambda x, leaf: jax.device_put(np.asarray(x), leaf.sharding), new, eight.abstract)
    one, two = (
        jax.jit(m.logits)(p, TEXT.tokens_BT, **tiny.where(TEXT))[..., : tiny.VOCAB]
        for m, p in ((after_, new), (eight, placed))
    )
    assert tiny.relative(two, one) < 1e-5


def steps(model, params, name, pattern, count=2):
    """The weights after a few steps with weight decay, and the optimizer's state."""
    tx = make_optimizer(OptimConfig(name=name, lr=1e-2, weight_decay=0.5), 100, model.axes)
    state = make_state(model, tx, jax.random.key(0), params=jax.tree.map(jnp.copy, params), trainable=pattern)
    step = make_train_step(model, lm, tx, trainable=pattern)
    for _ in range(count):
        state, _ = step(state, model.sharding.batch(TEXT))
    return state.params, state.opt


@pytest.fixture(scope="module")
def half():
    """`(model, weights)` of a dense model, half of whose weights are zero, and the change."""
    plain = tiny.one_device(tiny.config(layers=1, tied=True))
    one = Change(prune=PruneConfig(sparsity=0.5, pattern="layers/**,embed"))
    return after(plain, (one,)), change(plain, one.plan(plain), tiny.weights(plain)), one


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_what_is_zero_stays_zero_in_training(half, name):
    """To the bit, in spite of weight decay, momentum and Muon, which mixes gradients; everything else moves."""
    model, params, one = half
    new, _ = steps(model, params, name, trainable(None, (one,)))
    for path, was in weights_of(params).items():
        now = weights_of(new)[path]
        if not isinstance(was, Pruned):
            assert np.all(np.asarray(was) != np.asarray(now)), path
            continue
        before, found = (np.asarray(w.dense(jnp.float32)) for w in (was, now))
        assert tiny.bit_equal(was.mask, now.mask)
        np.testing.assert_array_equal(found == 0, before == 0)
        assert np.mean(found == 0) == 0.5 and np.mean(found != before) > 0.45
        assert name == "muon" or not np.asarray(now.values)[before == 0].any()


@pytest.mark.slow
def test_adapters_over_pruned_weights_train_alone_and_merge(half):
    model, params, one = half
    lora = Change(lora={"rank": 2, "alpha": 4.0})
    adapted, start = changed(model, lora.plan(model)), change(model, lora.plan(model), params)
    new, opt = steps(adapted, start, "adamw", trainable(None, (one, lora)))
    found = [tree.flatten(weights) for weights in (start, new)]
    bases = [{path: w for path, w in one.items() if "/lora_" not in path} for one in found]
    assert tiny.bit_equal(*bases) and not tiny.bit_equal(*found)
    trained = sum(x.size for path, x in found[1].items() if path not in bases[1])
    assert 2 * trained <= sum(x.size for x in jax.tree.leaves(opt)) < 2 * trained + 8, "moments of the adapters alone"
    merge = Change(merge=True)
    merged, plain = changed(adapted, merge.plan(adapted)), change(adapted, merge.plan(adapted), new)
    run = [jax.jit(m.logits)(p, TEXT.tokens_BT, **tiny.where(TEXT)) for m, p in ((adapted, new), (merged, plain))]
    assert tiny.relative(*run) < 1e-5


def test_what_comes_after_an_adapter_leaves_it_what_trains(half):
    lora, one = Change(lora=LoraConfig(rank=2)), Change(prune=PruneConfig(sparsity=0.5))
    assert trainable(None, (lora, one)) == trainable(None, (lora,)) != trainable(None, (one,)) == "**"


def test_zeros_are_left_by_rounding_to_nearest(half):
    model, params, one = half
    plain = Change(plain=True)
    after_, dense = changed(model, plain.plan(model)), change(model, plain.plan(model), params)
    for format in ("int8", "int4", "nf4"):
        rounded = Change(quantize={"rules": [{"format": format, "group": 16, "pattern": "**/up"}]})
        new = change(after_, rounded.plan(after_), dense)["layers"]["0"]["mlp"]["up"]
        values = np.asarray(jax.vmap(lambda w: w.dense(jnp.float32))(new))
        assert not values[np.asarray(dense["layers"]["0"]["mlp"]["up"]) == 0].any(), format


def test_what_does_not_fit_is_said(half):
    pruned, params, _ = half
    model = tiny.one_device(tiny.config(layers=1, mlp={"ffw": 30}))
    for config, says in {
        PruneConfig(nm="2:4"): "layers/0/mlp/down: nm=2:4 goes by groups of 4 inputs, and its 30 do not divide",
        PruneConfig(sparsity=0.01): r"sparsity=0.01 of \d+ inputs makes 0 of them zero; set it between 0.03",
        PruneConfig(sparsity=0.5, pattern="layers/0/mpl/*"): "prune: no matrix matches .*; did you mean layers/0/mlp/",
    }.items():
        with pytest.raises(SettingsError, match=says):
            changed(model, prune_plan(model, config))
    by_text = PruneConfig(sparsity=0.5, method="wanda", pattern="**")
    with pytest.raises(SettingsError, match="needs calibration text: use jaxllm prune --calibrate"):
        change(model, prune_plan(model, by_text), tiny.weights(model))
    with pytest.raises(SettingsError, match="embed: rows of a table are looked up.*method=magnitude"):
        prune(model, tiny.weights(model), by_text, [TEXT])
    with pytest.raises(SettingsError, match="is pruned already; make it plain first"):
        prune_plan(pruned, PruneConfig(sparsity=0.7))
    for change_ in ({"quantize": {"rules": [{"format": "int8"}]}}, {"qat": {"rules": [{"format": "int8"}]}}):
        with pytest.raises(SettingsError, match="is pruned; make it plain first"):
            Change(**change_).plan(pruned)
    int8, lora = Change(quantize={"rules": [{"format": "int8"}]}), Change(lora={"rank": 2})
    for one, says in ((int8, "not stored as plain floats"), (lora, "has an adapter; merge it first")):
        with pytest.raises(SettingsError, match=says):
            prune_plan(changed(model, one.plan(model)), PruneConfig(sparsity=0.5))
    assert widest(model) == 32


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings, says",
    [
        ({}, "set one of them"),
        ({"sparsity": 0.5, "nm": "2:4"}, "set one of them"),
        ({"sparsity": 1.0}, "must lie between 0 and 1"),
        ({"nm": "4:2"}, "N kept of each M"),
        ({"nm": "half"}, "N kept of each M"),
    ],
)
def test_settings_that_say_nothing_useful(settings, says):
    with pytest.raises(ValueError, match=says):
        PruneConfig(**settings)
