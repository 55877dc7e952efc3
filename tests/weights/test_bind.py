"""Binding: another dropout key for each step, weight and layer; none in evaluation; an adapter for each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.errors import UserError
from jaxllm.generate.decode import unstack
from jaxllm.weights.bind import bind
from jaxllm.weights.form import Form
from jaxllm.weights.lora import Lora

ROWS = np.array([1, -1, 0])


def lora(layers: int | None, dropout: float = 0.0, adapters: int | None = None) -> Lora:
    lead = (() if layers is None else (layers,)) + (() if adapters is None else (adapters,))
    base = jnp.zeros((*lead[: layers is not None], 4, 6))
    a, b = jnp.zeros((*lead, 4, 2)), jnp.zeros((*lead, 2, 6))
    return Lora(base, a, b, None, Form("io", (4, 6)), 1.0, dropout, adapters)


def tree_of(**options):
    layers = {"0": {"q": lora(3, **options), "v": lora(3, **options)}}
    return {"embed": jnp.zeros((5, 4)), "layers": layers, "suffix": {"0": {"q": lora(None, **options)}}}


def loras(params) -> list[Lora]:
    return [x for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Lora)) if isinstance(x, Lora)]


@pytest.mark.fast
def test_every_weight_layer_and_step_has_a_key_of_its_own():
    params, key = tree_of(dropout=0.1), jax.random.key(0)
    keys = [leaf.key for step in (key, jax.random.key(1)) for leaf in loras(bind(params, key=step))]
    data = np.concatenate([np.atleast_2d(jax.random.key_data(k)) for k in keys])
    assert len(data) == 2 * (3 + 3 + 1) == len(np.unique(data, axis=0))
    layers = jax.random.key_data(jax.random.split(jax.random.fold_in(key, 0)))
    assert not any((row == data).all(axis=1).any() for row in layers), "the model's own dropout"


@pytest.mark.fast
def test_without_a_key_or_dropout_nothing_is_dropped():
    for params, key in ((tree_of(dropout=0.1), None), (tree_of(), jax.random.key(0))):
        assert all(leaf.key is None for leaf in loras(bind(params, key=key)))
    plain = {"w": jnp.ones(3)}
    assert bind(plain, key=jax.random.key(0)) == plain


@pytest.mark.fast
def test_rows_reach_every_layer_however_they_are_kept():
    params = tree_of(adapters=2)
    q, v, last = loras(bind(params, adapters_B=ROWS))
    assert q.rows_B.shape == v.rows_B.shape == (3, 3) and tiny.bit_equal(last.rows_B, jnp.asarray(ROWS, jnp.int32))
    listed = loras(bind(unstack(params), adapters_B=ROWS))[0]
    assert tiny.bit_equal(listed.rows_B, tuple(q.rows_B))
    again = bind(bind(params, adapters_B=ROWS), adapters_B=ROWS[::-1])
    assert tiny.bit_equal(loras(again)[2].rows_B, jnp.asarray(ROWS[::-1], jnp.int32))


@pytest.mark.fast
def test_rows_that_cannot_choose_or_must():
    with pytest.raises(UserError, match="do not hold several"):
        bind(tree_of(), adapters_B=ROWS)
    with pytest.raises(UserError, match="which one each row takes"):
        bind(tree_of(adapters=2))
