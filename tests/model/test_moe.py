"""Routing, the layouts of rows by expert, and the losses of the router, each against a plain version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxllm.model import moe as module
from jaxllm.model.moe import Moe, update_bias
from jaxllm.model.spec import MoeSpec
from jaxllm.sharding import make_sharding

CONFIG = tiny.config()
REAL = tiny.batch().segments_BT > 0
ONE = make_sharding(devices=jax.devices()[:1])


def layer(experts=4, ffw=24, **spec):
    """`(weights, (weights, x, real) -> (y, aux))` of one layer."""
    spec = MoeSpec(experts=experts, ffw=ffw, **spec)
    graph, state = nnx.split(nnx.eval_shape(lambda: Moe(spec, CONFIG, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype), nnx.to_pure_dict(state))
    f = jax.jit(lambda params, x, real: nnx.merge(graph, params)(x, real, ONE))
    return params, lambda params, x, real=REAL: f(params, x, real)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((4, 16, 32)), np.float32)


def all_experts(params, x, score, renormalize, bias=False):
    """Every expert on every token, masked by the gates."""
    logits = x @ params["router"] + (params["router_bias"] if bias else 0)
    add = lambda y, name: y + (params[name][:, None] if bias else 0)  # noqa: E731
    scores = jax.nn.softmax(logits) if score == "softmax" else jax.nn.sigmoid(logits)
    kth = jnp.sort(scores, axis=-1)[..., -2, None]
    gates = jnp.where(scores >= kth, scores, 0)
    gates = gates / gates.sum(-1, keepdims=True) if renormalize else gates
    hidden = jax.nn.silu(add(jnp.einsum("btd,edf->betf", x, params["gate"]), "gate_bias"))
    hidden = hidden * add(jnp.einsum("btd,edf->betf", x, params["up"]), "up_bias")
    return jnp.einsum("betd,bte->btd", add(jnp.einsum("betf,efd->betd", hidden, params["down"]), "down_bias"), gates)


@pytest.mark.parametrize(
    "score,renormalize,block,bias",
    [
        ("softmax", True, 8, False),
        ("sigmoid", False, 8, False),
        ("softmax", True, 1, False),
        ("sigmoid", True, 8, True),
        ("softmax", False, 1, True),
    ],
)
def test_dropless_equals_all_experts_masked_by_gates(monkeypatch, score, renormalize, block, bias):
    """Block 1 is `ragged_dot`, which accelerators run."""
    monkeypatch.setattr(module, "block_size", lambda rows, experts: block)
    params, f = layer(score=score, renormalize=renormalize, bias=bias, router_bias=bias)
    x, dy = tokens(), tokens(1)
    value = lambda g: jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(g(p, x) * dy), (0, 1)))(params, x)  # noqa: E731
    found = value(lambda p, x: f(p, x)[0])
    expected = value(lambda p, x: all_experts(p, x, score, renormalize, bias))
    assert tiny.relative(found[0], expected[0]) < 1e-5
    assert tiny.worst(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_with_room_for_all_capacity_equals_dropless(bias):
    x = tokens()
    biases = dict(bias=bias, router_bias=bias, shared_ffw=16 if bias else 0)
    params, dropless = layer(**biases)
    _, roomy = layer(capacity_factor=2.0, **biases)  # 16 tokens * 2 choices / 4 experts * 2 = 16
    y, aux = roomy(params, x)
    assert tiny.relative(y[REAL], dropless(params, x)[0][REAL]) < 1e-5
    assert not np.any(aux.dropped_B)


@pytest.mark.fast
def test_capacity_goes_to_first_choices_then_to_early_tokens_and_never_to_padding():
    """Room for 2 tokens an expert. Tokens 1..5 are real; the router reads the first two entries of each."""
    params, f = layer(experts=2, capacity_factor=0.25, renormalize=True, scale=1.0)
    params["router"] = jnp.zeros((32, 2)).at[0, 0].set(1.0).at[1, 1].set(1.0)
    x = np.zeros((1, 8, 32), np.float32)
    x[0, :, 2:] = 1  # so that an expert gives each token something
    prefers = [0, 0, 0, 0, 1, 1, 0, 0]
    x[0, np.arange(8), prefers] = 2.0
    real = jnp.arange(8)[None].repeat(1, 0) % 7 > 0  # tokens 0 and 7 are padding
    y, aux = f(params, jnp.asarray(x), real)
    # First choices: expert 0 takes tokens 1, 2 (3 and 6 find it full), expert 1 takes 4, 5. No second choice fits.
    np.testing.assert_array_equal(np.any(np.asarray(y[0]) != 0, axis=-1), [0, 1, 1, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(aux.dropped_B, [8 / 12])
    np.testing.assert_array_equal(aux.load_E, [6, 6])


def by_hand(params, x, score, experts=4, k=2):
    """`(share[B, E], probability[B, E], z[B])` in NumPy: shares of choices and mean scores over the real tokens."""
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    share, probability, z = np.zeros((4, experts)), np.zeros((4, experts)), np.zeros(4)
    for b in range(4):
        real = np.flatnonzero(REAL[b])
        for t in real:
            exp = np.exp(logits[b, t])
            scores = exp / exp.sum() if score == "softmax" else 1 / (1 + 1 / exp)
            share[b, np.argsort(-scores)[:k]] += 1 / (k * len(real))
            probability[b] += scores / scores.sum() / len(real)
            z[b] += np.log(exp.sum()) ** 2 / len(real)
    return share, probability, z


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_losses_equal_those_by_hand(score):
    params, f = layer(score=score, balance_coef=0.1, z_coef=0.01)
    share, probability, z = by_hand(params, tokens(), score)
    _, aux = f(params, tokens())
    balance = 4 * np.sum(share * probability, axis=1)
    np.testing.assert_allclose(aux.balance_B, balance, rtol=1e-5)
    np.testing.assert_allclose(aux.z_B, z, rtol=1e-5)
    np.testing.assert_allclose(aux.loss_B, 0.1 * balance + 0.01 * z, rtol=1e-5)
    real_B = np.asarray(REAL).sum(1)
    np.testing.assert_allclose(aux.load_E, 2 * real_B @ share, rtol=1e-5)
    # Over the batch, rows count by their tokens.
    _, batch = layer(score=score, balance="batch", balance_coef=0.1, z_coef=0.0)
    share, probability = (real_B @ v / real_B.sum() for v in (share, probability))
    np.testing.assert_allclose(batch(params, tokens())[1].loss_B, 0.4 * np.sum(share * probability), rtol=1e-5)


def test_padding_changes_no_router_loss():
    params, f = layer()
    x = tokens()
    other = jnp.where(REAL[..., None], x, 5 - x)
    assert tiny.bit_equal(f(params, x)[1], f(params, other)[1])


def test_a_balancing_bias_moves_the_choice_but_not_the_weight():
    params, f = layer(balance="bias", renormalize=False, score="sigmoid")
    params["bias"] = jnp.array([0.0, 0.0, 10.0, 10.0])
    y, aux = f(params, tokens())
    np.testing.assert_array_equal(aux.load_E > 0, [False, False, True, True])
    scores = jax.nn.sigmoid(tokens() @ params["router"])
    only = {name: params[name][2:] for name in ("gate", "up", "down")}
    hidden = jax.nn.silu(jnp.einsum("btd,edf->betf", tokens(), only["gate"]))
    hidden = hidden * jnp.einsum("btd,edf->betf", tokens(), only["up"])
    assert tiny.relative(y, jnp.einsum("betf,efd,bte->btd", hidden, only["down"], scores[..., 2:])) < 1e-5
    assert not np.any(jax.grad(lambda p: jnp.sum(f(p, tokens())[0]))(params)["bias"])
    np.testing.assert_allclose(aux.loss_B, 0.001 * aux.z_B)


def test_a_token_chooses_within_its_best_groups():
    """Groups {0, 1}, {2, 3} and {4, 5}, the router reading six entries of a token as its logits; one group a token."""
    x = np.zeros((1, 3, 32), np.float32)
    x[0, :, :6] = [[9, 0, 8, 8, 0, 0], [0, 0, 8, 8, 9, 7.5], [3, 0, 2, 0, 1, 0]]
    chosen = {}
    for score in ("max", "top2"):
        spec = dict(score="sigmoid", groups=3, groups_per_token=1, group_score=score, balance="bias")
        params, f = layer(experts=6, **spec)
        params |= {"router": jnp.eye(32, 6) / 4, "bias": jnp.zeros(6)}
        one = jnp.ones((1, 1), bool)
        for name, bias in (("plain", 0.0), ("biased", 5.0)):
            params["bias"] = jnp.zeros(6).at[5].set(bias)
            loads = [f(params, x[:, t : t + 1], one)[1].load_E for t in range(3)]
            chosen[score, name] = [np.flatnonzero(load).tolist() for load in loads]
    assert chosen["max", "plain"] == [[0, 1], [4, 5], [0, 1]]
    assert chosen["top2", "plain"] == [[2, 3], [4, 5], [0, 1]]
    assert chosen["max", "biased"] == chosen["top2", "biased"] == [[4, 5]] * 3  # the bias moves groups as well


@pytest.mark.fast
def test_the_bias_moves_against_the_load():
    bias = update_bias(jnp.zeros((2, 4)), jnp.array([[4.0, 4, 4, 4], [9, 3, 4, 0]]), 0.1)
    np.testing.assert_allclose(bias, [[0, 0, 0, 0], [-0.1, 0.1, 0, 0.1]])
