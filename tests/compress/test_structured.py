"""Structured pruning: what adds nothing goes first and without a trace, and what is left is an ordinary model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.compress.calibrate import Flow, layer_of
from jaxllm.compress.importance import Importance
from jaxllm.compress.slices import StructuredConfig, check, choose, smaller
from jaxllm.compress.structured import shrink
from jaxllm.errors import SettingsError
from jaxllm.model.build import build

TEXT = tiny.packed(np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 48)), np.ones((8, 48)))
#: Every vector that has to be cut along: biases, sinks, norms of heads.
BIASED = dict(qkv_bias=True, out_bias=True, sinks=True, qk_norm="head")
DENSE = tiny.config(BIASED, {"bias": True}, layers=3, tied=True)
#: Experts with every bias, and a shared one.
MOE = tiny.config(layers=1, moe=dict(shared_ffw=16, bias=True, router_bias=True, balance="bias"), vocab_multiple=8)
#: As DeepSeek has it: latent attention, groups of experts.
LATENT = tiny.config(
    {"kv_heads": None, "head": 8, "latent": {"kv_rank": 16, "rope_head": 4, "v_head": 6}},
    layers=1,
    moe=dict(experts=8, groups=2, groups_per_token=1, group_score="max", score="sigmoid"),
)


def edited(params, edits: dict):
    """The weights with `edit(array)` done to a copy of those at some paths."""

    def one(path, w):
        if path not in edits:
            return w
        new = np.array(w)
        edits[path](new)
        return jax.device_put(new, w.sharding)

    return tree.map_with_path(one, params)


def silent(*index):
    def edit(w):
        w[index] = 0

    return edit


def logits(model, params):
    return jax.jit(model.logits)(params, TEXT.tokens_BT, **tiny.where(TEXT))[..., : tiny.VOCAB]


def idle_dense(model):
    """Layer 1 adds nothing; of the others a kv group and 8 neurons do not."""
    edits = {
        "layers/0/attn/o": lambda w: (silent(0, slice(2, 4))(w), silent(1)(w), silent(2, slice(0, 2))(w)),
        "layers/0/mlp/down": lambda w: (silent(0, slice(3, 11))(w), silent(1)(w), silent(2, slice(0, 48, 6))(w)),
        "layers/0/attn/o_bias": silent(1),
        "layers/0/mlp/down_bias": silent(1),
    }
    return edited(tiny.weights(model), edits)


def idle_experts(model):
    """The router never takes expert 1; of the others 4 neurons do nothing, other ones in each; a kv group neither."""

    def never(w):
        w[..., 1] = -60

    edits = {
        "layers/0/moe/router_bias": never,
        "layers/0/moe/bias": never,
        "layers/0/moe/down": lambda w: [silent(0, e, slice(4 * e, 4 * e + 4))(w) for e in range(4)],
        "layers/0/attn/o": silent(0, slice(0, 2)),
    }
    return edited(tiny.weights(model), edits)


CASES = {
    "dense": (DENSE, idle_dense, dict(heads=1, neurons=40, layers=2)),
    "moe": (MOE, idle_experts, dict(heads=1, neurons=20, experts=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_adds_nothing_goes_without_a_trace(name):
    config, idle, wanted = CASES[name]
    model = tiny.one_device(config)
    params = idle(model)
    less, new, found = shrink(model, params, StructuredConfig(**wanted), [TEXT])
    assert tree.count(new) < 0.8 * tree.count(params)
    assert tiny.relative(logits(less, new), logits(model, params)) < 1e-5
    assert set(found["removed"]) == set(wanted) - {"layers"}
    assert all(abs(share) < 1e-5 for shares in found["removed"].values() for share in shares)
    spec = less.config.layer_specs[-1]
    assert (spec.attn.heads, spec.attn.kv_heads, spec.attn.head) == (2, 1, 8)
    if name == "dense":
        assert found["dropped"] == [1] and abs(found["influence"][1]) < 1e-5
        assert spec.mlp.ffw == 40
    else:
        assert (spec.moe.experts, spec.moe.ffw, spec.moe.shared_ffw) == (3, 20, 16)


def test_importance_is_what_the_output_loses():
    """Of every head, neuron and expert: the squared norm by which the layer's output changes when it is silenced."""
    model = tiny.one_device(MOE)
    params = tiny.weights(model)
    where, flow = model.layers[0], Flow(model, params, [TEXT])
    weights = layer_of(params, where)
    one = {"heads": 2, "neurons": 24, "shared": 16, "experts": 4}
    scores = Importance(model)(flow, where, weights, one)
    assert {part: x.shape for part, x in scores.items()} == {
        "heads": (2,),
        "neurons": (4, 24),
        "shared": (16,),
        "experts": (4,),
    }
    run = jax.jit(lambda weights: model.layer(*where[:2], weights, flow.x[0], **flow.where[0]))
    whole = np.asarray(run(weights))

    def lost(path, *index):
        return np.sum((np.asarray(run(edited(weights, {path: silent(*index)}))) - whole) ** 2)

    # A head's change goes through the experts, too; so it is seen where these add nothing.
    quiet = {f"moe/{name}": silent() for name in ("down", "down_bias", "shared/down", "shared/down_bias")}
    base = edited(weights, quiet)
    for group in range(2):
        now = edited(base, {"attn/o": silent(slice(2 * group, 2 * group + 2))})
        change = np.sum(np.square(np.asarray(run(now)) - np.asarray(run(base))))
        np.testing.assert_allclose(scores["heads"][group], change, rtol=1e-3)
    for neuron in (0, 7):
        np.testing.assert_allclose(scores["shared"][neuron], lost("moe/shared/down", neuron), rtol=1e-3)
    for expert in range(4):
        both = edited(weights, {"moe/down": silent(expert), "moe/down_bias": silent(expert)})
        np.testing.assert_allclose(scores["experts"][expert], np.sum((np.asarray(run(both)) - whole) ** 2), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config, wanted", [(LATENT, dict(heads=2, experts=6)), (tiny.MOE, dict(neurons=20))])
def test_other_models_get_smaller_too(config, wanted):
    """Latent attention, experts in groups, layers before the pattern: the shapes are those that the settings say."""
    model = tiny.one_device(config)
    less, new, found = shrink(model, tiny.weights(model), StructuredConfig(**wanted), [TEXT])
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(
        lambda leaf: leaf.shape, build(less.config, less.sharding).abstract
    )
    assert np.isfinite(logits(less, new)).all() and tree.count(new) < tree.count(model.abstract)
    if "neurons" in wanted:
        assert less.config.prefix[0].mlp.ffw == 20 and [len(x) for x in found["removed"].values()] == [3]
    else:
        assert less.config.pattern[0].moe.groups == 2 and less.config.pattern[0].attn.heads == 2


@pytest.mark.slow
def test_without_layers_is_the_model_in_which_they_add_nothing():
    """Of a pattern of two slots with a remainder, whichever layers go; the others are in order, with their windows."""
    model = tiny.one_device(tiny.DENSE)
    params = tiny.weights(model)
    less, new, found = shrink(model, params, StructuredConfig(layers=3), [TEXT])
    assert found["dropped"] == sorted(np.argsort(found["influence"])[:2].tolist()) and less.config.layers == 3
    edits: dict = {}
    for group, slot, place in (model.layers[i] for i in found["dropped"]):
        for path in ("attn/o", "mlp/down"):
            edits.setdefault(f"{group}/{slot}/{path}", []).append(silent(slice(None) if place is None else place))
    edits = {path: lambda w, fs=fs: [f(w) for f in fs] for path, fs in edits.items()}
    assert tiny.relative(logits(less, new), logits(model, edited(params, edits))) < 1e-5
    assert found["removed"] == {}


def test_what_is_chosen():
    score = np.array([3.0, 1, 2, 2, 5, 0, 9, 9])
    assert choose(score, 3).tolist() == [4, 6, 7]
    assert choose(score, 4, groups=2).tolist() == [0, 2, 6, 7], "two of each group"
    assert choose(np.array([1.0, 1, 1]), 2).tolist() == [0, 1], "of equal ones the first"
    assert choose(np.array([[1.0, 2, 3], [3, 2, 1]]), 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.fast
@pytest.mark.parametrize(
    "config, wanted, says",
    [
        (DENSE, dict(heads=2), "heads=2 may stay, and the model has 2"),
        (DENSE, dict(experts=2), "experts=2 may stay, and the model has none"),
        (tiny.MOE, dict(neurons=48), "neurons=48 may stay, and the model has 16 and 24 and 48"),
        (DENSE, dict(layers=4), "layers=4 may stay, and the model has 3: nothing would go"),
        (MOE, dict(experts=1), "experts=1: each token goes to 2, so at least 2 must stay"),
        (LATENT, dict(experts=5), "they lie in 2 groups of one size, each with at least 2; numbers that fit: 4, 6"),
        (tiny.config({"qk_norm": "all"}), dict(heads=1), "a layer with qk_norm=all would compute something else"),
        (tiny.config({"alibi": True, "rope": None}), dict(heads=1), "a layer with alibi=True would compute"),
    ],
)
def test_what_does_not_fit_is_said(config, wanted, says):
    with pytest.raises(SettingsError, match=says):
        check(config, StructuredConfig(**wanted))
        for spec in config.layer_specs:
            smaller(spec, config, StructuredConfig(**wanted))


def test_settings_that_say_nothing_useful():
    with pytest.raises(ValueError, match="nothing to prune: set one of heads, neurons, experts, layers"):
        StructuredConfig()
    with pytest.raises(ValueError, match="neurons=0: at least 1 must be left"):
        StructuredConfig(neurons=0)
