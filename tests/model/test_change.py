"""Models whose weights were changed: they compute what plain weights of the same values do, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule, quantize_plan
from jaxllm.errors import SettingsError
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.model.change import change, changed, choose, forms, weights_of
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.weights.quantized import Quantized

BATCH = tiny.batch()
LATENT = {"heads": 4, "head": 8, "latent": {"kv_rank": 16, "q_rank": 24, "rope_head": 4, "v_head": 8}}
CONFIGS = {
    "tied": tiny.config(tied=True, vocab_multiple=8),
    "experts": tiny.MOE,
    "latent": tiny.config(layers=1, pattern=[{"attn": LATENT, "mlp": {"ffw": 48}}]),
    "learned": tiny.config({"rope": None}, layers=1, positions="learned"),
}
#: A format of each kind; groups of 8 divide every matrix of these models.
RULES = (
    QuantizeRule(pattern="embed,head", format="int8"),
    QuantizeRule(pattern="**/attn/*", format="int4", group=8, double=True),
    QuantizeRule(pattern="**", format="nf4", group=8),
)
CONFIG = QuantizeConfig(rules=RULES)


def plain(params):
    """The same weights as float32 arrays, by NumPy."""

    def values(weight):
        if not isinstance(weight, Quantized):
            return weight
        dense = lambda w: w.dense(jnp.float32)  # noqa: E731
        return jax.jit(dense if len(weight.shape) == len(weight.form.shape) else jax.vmap(dense))(weight)

    return jax.tree.map(values, params, is_leaf=lambda x: isinstance(x, Quantized))


def close(a, b):
    """Whether logits agree; those of padding are left out."""
    return tiny.relative(a[..., : tiny.VOCAB], b[..., : tiny.VOCAB]) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_weights_give_the_logits_of_their_values(name):
    model = tiny.one_device(CONFIGS[name], unroll=0)
    plan, params = quantize_plan(model, CONFIG), tiny.weights(model)
    new = change(model, plan, params)
    after = changed(model, plan)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), new)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), after.abstract)
    chosen = {path for path, weight in weights_of(new).items() if isinstance(weight, Quantized)}
    assert chosen == {path for path, form in forms(model).items() if form is not None}

    def run(params):
        logits = model.logits(params, BATCH.tokens_BT, **tiny.where(BATCH))
        if name != "latent":
            return (logits,)
        # The second token comes with a cache, and k_up is then read the other way round.
        cache = model.apply(params, BATCH.tokens_BT[:, :1], cache=make_cache(model.config, 4, 8))[1]
        at_BT = jnp.ones((4, 1), jnp.int32)
        hidden, _, _ = model.apply(params, BATCH.tokens_BT[:, 1:2], positions_BT=at_BT, cache=cache)
        return logits, model.unembed(model.head(params), hidden)

    run = jax.jit(run)
    for found, expected in zip(run(new), run(plain(new)), strict=True):
        assert close(found, expected)
    assert not close(run(new)[0], run(params)[0])


def test_eight_devices_equal_one():
    """The codes are the same bits, split as the weights were where that divides, and the logits the same numbers."""
    config = tiny.config(layers=1, moe={}, vocab_multiple=8)
    one = tiny.one_device(config, unroll=0)
    many = build(config, make_sharding(ParallelConfig(fsdp=2, expert=2, tensor=2)), one.kernels)
    # Without scales in 8 bits: their mean depends on the order of its sum.
    rules = QuantizeConfig(rules=(RULES[0], QuantizeRule(pattern="**", format="nf4", group=8)))
    found = {}
    for model in (one, many):
        plan = quantize_plan(model, rules)
        params = change(model, plan, tiny.weights(model))
        after = changed(model, plan)
        places = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), params, after.abstract)
        assert all(jax.tree.leaves(places))
        found[model is many] = params, np.asarray(jax.jit(model.logits)(params, BATCH.tokens_BT, **tiny.where(BATCH)))
    assert tiny.bit_equal(found[False][0], found[True][0])
    assert close(found[True][1], found[False][1])
    codes = found[True][0]["layers"]["0"]["attn"]["q"].codes
    assert codes.addressable_shards[0].data.size < codes.size


def test_old_weights_are_given_back_and_others_kept():
    model = tiny.one_device(CONFIGS["learned"])
    plan, params = quantize_plan(model, QuantizeConfig(rules=(RULES[1],))), tiny.weights(model)
    old = weights_of(params)
    new = weights_of(change(model, plan, params, free=True))
    for path, weight in old.items():
        assert weight.is_deleted() == isinstance(new[path], Quantized)
    with pytest.raises(SettingsError, match="no matrix matches 'layers/0/atn/q'; did you mean layers/0/attn/q?"):
        choose(model, "layers/0/atn/q", "quantize")
