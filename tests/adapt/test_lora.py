"""Adapters over whole models: what they compute, what trains, how they are stored, and several at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxllm import api, tree
from jaxllm.adapt.changes import Change, after
from jaxllm.adapt.gather import gather
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig
from jaxllm.config import parse
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.model.change import change, weights_of
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.train.step import make_state, make_train_step
from jaxllm.weights.bind import bind
from jaxllm.weights.lora import Lora

BATCH = tiny.batch()
LATENT = {"kv_heads": None, "latent": {"kv_rank": 16, "q_rank": 8, "rope_head": 4, "v_head": 8}}
#: Attention, dense layers, experts without a capacity and a shared one, embedding and head in one.
DROPLESS = tiny.config(prefix=[tiny.layer()], layers=3, moe={"shared_ffw": 16}, tied=True, vocab_multiple=8)
#: Latent attention, experts with a capacity, a head of its own.
LATENT_CAPACITY = tiny.config(LATENT, layers=2, moe={"capacity_factor": 2.0})
DENSE = tiny.config(layers=2, tied=True, vocab_multiple=8)
#: base, kind of adapter, format of the base; tests/weights has the other combinations, for single weights.
CASES = {"float": (DROPLESS, "lora", None), "nf4": (LATENT_CAPACITY, "dora", {"format": "nf4", "group": 8})}


def lora(**settings) -> Change:
    return Change(lora=LoraConfig(**({"pattern": "**", "rank": 4, "alpha": 8.0} | settings)))


def quantized(rule: dict | None) -> tuple[Change, ...]:
    """All matrices in this format, tables included."""
    raw = {"rules": [{"pattern": "**"} | (rule or {})]}
    return () if rule is None else (Change(quantize=parse(QuantizeConfig, raw)),)


def made(model, changes, params=None):
    """`(model, weights)` after the changes, compiled as one program, which takes less time than one for each weight."""
    end = after(model, changes)

    @jax.jit
    def run(params):
        before = model
        for one in changes:
            params, before = change(before, one.plan(before), params), after(before, (one,))
        return params

    return end, run(tiny.weights(model) if params is None else params)


def randomised(params, seed: int = 0):
    """The same weights with adapters that do something."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if not tree.matches(TRAINABLE, path):
            return leaf
        noise = rng.standard_normal(leaf.shape, np.float32)
        value = leaf * (1 + 0.2 * noise) if path.endswith("magnitude") else 0.15 * noise
        return jax.device_put(value, leaf.sharding)

    return tree.map_with_path(draw, params)


def logits_of(model):
    """`weights -> logits`"""
    f = jax.jit(lambda params: model.logits(params, BATCH.tokens_BT, **tiny.where(BATCH)))
    return lambda params: f(params)[..., : tiny.VOCAB]


@pytest.mark.parametrize("name", ["float", pytest.param("nf4", marks=pytest.mark.slow)])
def test_new_adapters_change_nothing_and_trained_ones_equal_the_merged_model(name):
    """Over all matrices of a model; the adapters are more than a tenth of the logits."""
    config, kind, rule = CASES[name]
    base, params = made(tiny.one_device(config), quantized(rule))
    model, new = made(base, (lora(kind=kind),), params)
    logits, before = logits_of(model), logits_of(base)(params)
    found = logits(new)
    assert tiny.bit_equal(found, before) if name == "float" else tiny.relative(found, before) < 2e-5
    adapted = randomised(new)
    plain, merged = made(model, (Change(merge=True),), adapted)
    assert all(isinstance(weight, jax.Array) for weight in weights_of(merged).values())
    found = logits(adapted)
    assert tiny.relative(found, logits_of(plain)(merged)) < 3e-5
    assert tiny.relative(found, before) > 0.1


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_the_compressed_cache_of_latent_attention_sees_the_adapters(kind):
    config = tiny.config(LATENT, layers=1)
    model, params = made(tiny.one_device(config), (lora(kind=kind),))
    params, tokens = randomised(params), BATCH.tokens_BT[:2, :9]

    @jax.jit
    def cached(params):
        cache, out = make_cache(config, 2, 16), []
        for part in (np.s_[:, :6], np.s_[:, 6:]):
            at = jnp.broadcast_to(jnp.arange(9), (2, 9))[part]
            hidden, cache, _ = model.apply(params, tokens[part], positions_BT=at, cache=cache)
            out.append(model.unembed(model.head(params), hidden))
        return jnp.concatenate(out, axis=1)

    assert tiny.relative(cached(params), jax.jit(model.logits)(params, tokens)) < 1e-5


@pytest.mark.slow
def test_only_adapters_train():
    """Their optimizer state alone exists; codes, scales and norms keep every bit; dropout differs
    from step to step, so that the same batch has another loss without any learning."""
    changes = (*quantized({"format": "int8"}), lora(pattern="**/attn/*,**/up,embed", dropout=0.2))
    model, params = made(tiny.one_device(tiny.config(layers=1, tied=True)), changes)
    params = randomised(params)
    before = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    tx = optax.adam(lambda count: jnp.where(count < 2, 0.0, 0.01))
    state = make_state(model, tx, jax.random.key(0), params=params, trainable=TRAINABLE)
    moments = [path for path, leaf in tree.flatten(state.opt).items() if leaf.ndim]
    assert moments and all("lora_" in path for path in moments)
    step = make_train_step(model, lm, tx, trainable=TRAINABLE)
    losses = []
    for _ in range(4):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1], "dropout of another step"
    moved = {path for path, leaf in tree.flatten(state.params).items() if not np.array_equal(leaf, before[path])}
    assert moved == {path for path in before if tree.matches(TRAINABLE, path)}


@pytest.fixture(scope="module")
def unrolled():
    """`(weights, loss and gradient of the adapters)` of unrolled layers on one device."""
    model, params = made(tiny.one_device(DENSE), (lora(pattern="**/attn/*,**/mlp/*,embed", kind="dora"),))
    params = randomised(params)
    return params, gradient(model, params)


def gradient(model, params):
    chosen, rest = tree.partition(params, tree.select(params, TRAINABLE))
    return jax.jit(jax.value_and_grad(lambda chosen: lm(model, tree.combine(chosen, rest), BATCH)[0]))(chosen)


@pytest.mark.parametrize("how", ["scan and remat", pytest.param("mesh", marks=pytest.mark.slow)])
def test_the_gradient_is_the_same_however_it_is_computed(unrolled, how):
    params, (loss, expected) = unrolled
    model = tiny.one_device(dataclasses.replace(DENSE, remat="full"), unroll=0)
    if how == "mesh":
        model = build(DENSE, make_sharding(ParallelConfig(data=2, fsdp=2, tensor=2)), model.kernels)
        model = after(model, (lora(pattern="**/attn/*,**/mlp/*,embed", kind="dora"),))
        params = jax.tree.map(
            lambda leaf, where: jax.device_put(np.asarray(leaf), where.sharding), params, model.abstract
        )
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    found, grads = gradient(model, params)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert tiny.worst(grads, expected) < 2e-5


def test_an_adapted_model_is_saved_and_loaded(corpus, tmp_path):
    changes = (*quantized({"format": "nf4", "group": 16}), lora(pattern="**/attn/*", kind="rslora", dropout=0.1))
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    model, params = made(build(tiny.config(layers=2, vocab=tokenizer.vocab)), changes)
    params = randomised(params)
    api.save(api.Loaded(model, params, tokenizer, 3, None, changes), tmp_path / "out")
    again = api.load(tmp_path / "out")
    assert tiny.bit_equal(again.params, params) and again.changes == changes and again.step == 3


@pytest.fixture(scope="module")
def trained():
    """Three adapters of different kinds, sizes and places over one base: `[(model, weights), ...]`."""
    base = tiny.one_device(DENSE)
    params = tiny.weights(base)
    settings = (
        {"pattern": "**/attn/*,embed", "rank": 2},
        {"pattern": "**/attn/q,**/mlp/*", "kind": "rslora", "rules": [{"pattern": "**/up", "rank": 1}]},
        {"pattern": "**/attn/*,embed", "rank": 2, "alpha": 3.0},
    )
    made_of = [made(base, (lora(**one),), params) for one in settings]
    return [(model, randomised(params, seed)) for seed, (model, params) in enumerate(made_of)]


@pytest.mark.slow
def test_gathered_adapters_give_each_row_what_its_own_gives(trained):
    config, params = gather([params for _, params in trained])
    changes = (Change(lora=config), Change(several=3))
    model = after(tiny.one_device(DENSE), changes)
    assert jax.tree.structure(model.abstract) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract)
    found = logits_of(model)(bind(params, adapters_B=[2, -1, 0, 1]))
    alone = [logits_of(one)(params) for one, params in trained]
    plain = tiny.one_device(DENSE)
    for row, expected in enumerate((alone[2], logits_of(plain)(tiny.weights(plain)), alone[0], alone[1])):
        assert tiny.relative(found[row], expected[row]) < 1e-5, row
        assert tiny.relative(expected[row], alone[1][row]) > 0.05 or row == 3


def test_adapters_that_do_not_belong_together(trained):
    (_, first), (_, second), _ = trained
    moved = {**second, "norm": {"scale": second["norm"]["scale"] + 1}}
    with pytest.raises(SettingsError, match="norm/scale: adapters 0 and 1 lie over different weights"):
        gather([first, moved])
    base = tiny.one_device(DENSE)
    dora = made(base, (lora(kind="dora", pattern="**/attn/*"),))[1]
    with pytest.raises(SettingsError, match="layers/0/attn/k: DoRA"):
        gather([dora, first])
    with pytest.raises(SettingsError, match="none of these"):
        gather([tiny.weights(base)])
    wide = tiny.weights(tiny.one_device(dataclasses.replace(DENSE, embed=64)))
    with pytest.raises(SettingsError, match=r"embed: .*\(64, 32\).*\(64, 64\)"):
        gather([first, wide])


def test_ranks_by_pattern():
    """The first rule decides; 0 leaves a weight out; alpha keeps its ratio to the rank unless it is given."""
    rules = [{"pattern": "**/down", "rank": 0}, {"pattern": "**/mlp/*", "rank": 2}]
    rules.append({"pattern": "**/q", "rank": 3, "alpha": 30.0})
    config = parse(LoraConfig, {"rank": 8, "alpha": 16.0, "rules": rules})
    found = weights_of(after(tiny.one_device(DENSE), (Change(lora=config),)).abstract)
    loras = {path.removeprefix("layers/0/"): w for path, w in found.items() if isinstance(w, Lora) and "/0/" in path}
    sizes = {path: (w.lora_a.shape[-1], w.scale) for path, w in loras.items()}
    attn = {f"attn/{name}": (8, 2.0) for name in "kov"} | {"attn/q": (3, 10.0)}
    assert sizes == attn | {"mlp/gate": (2, 2.0), "mlp/up": (2, 2.0)}


def test_what_does_not_fit_is_said():
    model = tiny.one_device(DENSE)
    with pytest.raises(SettingsError, match=r"'\*\*/atn/q'; did you mean"):
        after(model, (lora(pattern="**/atn/q"),))
    adapted = after(model, (lora(pattern="**/q"),))
    with pytest.raises(SettingsError, match="has an adapter already"):
        after(adapted, (lora(pattern="**/q"),))
    with pytest.raises(SettingsError, match="one adapter over its weights"):
        after(model, (Change(several=2),))
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}, {"rules": [{"pattern": "**", "rank": -1}]}):
        with pytest.raises(SettingsError):
            parse(LoraConfig, bad)
