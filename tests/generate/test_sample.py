"""Truncation and draws against a plain definition with sorting, and the noise against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate.params import make_sampling
from jaxllm.generate.sample import logprobs, sample
from jaxllm.generate.truncate import truncate

jitted, jitted_truncate = jax.jit(sample), jax.jit(truncate)
DEFAULTS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def plain(logits, temperature, top_k, top_p, min_p, typical_p):
    """Probabilities by the book, in float64: temperature, top-k, top-p of the rest, min-p, typical; ties are kept."""
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    p /= p.sum()
    if top_p < 1:
        down = np.sort(p)[::-1]
        p = np.where(p >= down[np.searchsorted(np.cumsum(down), top_p)], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    p /= p.sum()
    if typical_p < 1:
        kept = np.flatnonzero(p)
        surprise = -np.log(p[kept])
        distance = np.abs(surprise - np.sum(p[kept] * surprise))
        order = np.argsort(distance)
        last = order[np.searchsorted(np.cumsum(p[kept][order]), typical_p)]
        p[kept[distance > distance[last]]] = 0
    return p / p.sum()


CASES = [
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=2.0, top_k=5),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=500),
    dict(temperature=1.3, top_p=0.7),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=0.8, min_p=0.1),
    dict(temperature=1.0, min_p=1.0),
    dict(temperature=1.0, top_k=10, top_p=0.6),
    dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
    dict(temperature=1.0, typical_p=0.3),
    dict(temperature=1.5, typical_p=0.9),
    dict(temperature=2.0, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.6),
]


@pytest.fixture(scope="module")
def logits():
    """One row a case; some tokens tie."""
    rows = np.random.default_rng(0).normal(size=(len(CASES), 64)).astype(np.float32) * 3
    rows[:, 10:12], rows[:, 12:14] = 0.0, 2.5
    return rows


def mixed(seed=0):
    columns = {name: [case.get(name, default) for case in CASES] for name, default in DEFAULTS.items()}
    return make_sampling(len(CASES), temperature=[case["temperature"] for case in CASES], seed=seed, **columns)


def test_every_row_is_truncated_as_its_own_parameters_say(logits):
    got = jax.nn.softmax(jitted_truncate(logits, mixed()))
    for row, wanted, case in zip(np.asarray(got), logits.astype(np.float64), CASES, strict=True):
        wanted = plain(wanted, **{**DEFAULTS, **case})
        assert ((row > 0) == (wanted > 0)).all(), case
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-9)


def test_truncation_by_hand():
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))

    def support(**options):
        return np.flatnonzero(np.isfinite(jitted_truncate(x, make_sampling(1, **options)))).tolist()

    assert support(top_k=2) == [0, 1] and support(top_p=0.6999) == [0, 1] and support(top_p=0.7001) == [0, 1, 2]
    assert support(top_k=3, top_p=0.77) == [0, 1]  # 0.7 of 0.9 is 0.778: top-p counts what top-k left
    assert support(min_p=0.45) == [0, 1, 2] and support(min_p=0.55) == [0, 1]
    assert support(temperature=0.5, min_p=0.45) == [0, 1]  # 0.2^2 / 0.4^2 = 0.25: temperature comes first
    # The entropy is 1.280; surprises are 0.916, 1.204, 1.609 and 2.303, so the order is 1, 2, 0, 3.
    assert support(typical_p=0.2) == [1] and support(typical_p=0.31) == [1, 2] and support(typical_p=0.51) == [0, 1, 2]
    assert support(min_p=0.6, typical_p=0.5) == [0]  # of 0.571 and 0.429 with entropy 0.683: min-p comes first


def test_draws_follow_the_distribution(logits):
    """Chi-square of 4,000 draws a row; a wrong order, a lost token or correlated noise fails by far."""
    draws = 4000
    params = jax.tree.map(lambda x: np.repeat(x, draws), mixed())
    positions = np.tile(np.arange(draws), len(CASES))
    ids = jitted(np.repeat(logits, draws, axis=0), params, positions)
    for row, wanted, case in zip(np.asarray(ids).reshape(-1, draws), logits.astype(np.float64), CASES, strict=True):
        p = plain(wanted, **{**DEFAULTS, **case})
        seen = np.bincount(row, minlength=64)
        assert not seen[p == 0].any(), case
        common = p * draws >= 5
        expected, got = np.append(p[common], p[~common].sum()) * draws, np.append(seen[common], seen[~common].sum())
        chi2, freedom = np.sum((got - expected) ** 2 / np.maximum(expected, 1)), common.sum()
        assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom), (case, chi2, freedom)


def test_noise_depends_on_seed_and_position_alone():
    x = np.zeros((3, 64), np.float32)
    ids = jitted(x, make_sampling(3, seed=[4, 4, 5]), np.array([7, 8, 7]))
    again = jitted(x[::-1], make_sampling(3, seed=[5, 4, 4], top_p=[1, 0.5, 1]), np.array([7, 3, 7]))
    assert ids[0] == again[2] and ids[2] == again[0] and len({int(i) for i in ids}) == 3


def test_temperature_zero_is_greedy_beside_rows_that_sample(logits):
    rows = len(CASES)
    ids = jitted(logits, make_sampling(rows, temperature=[0] * (rows - 1) + [5]), np.arange(rows))
    assert (ids[:-1] == logits[:-1].argmax(-1)).all()
    tiny = jitted(logits, make_sampling(rows, temperature=1e-30), np.arange(rows))
    assert (tiny == logits.argmax(-1)).all()  # no overflow on the way to greedy


def test_what_may_not_be_made_is_not_drawn_and_its_share_goes_to_the_others():
    x = np.array([-np.inf, np.log(0.2), np.log(0.1)], np.float32)
    ids = jitted(np.tile(x, (3000, 1)), make_sampling(3000, top_p=0.6), np.arange(3000))
    assert set(np.asarray(ids)) == {1}  # 0.2 of the 0.3 that is left reaches 0.6
    ids = jitted(np.tile(x, (3000, 1)), make_sampling(3000, typical_p=0.999), np.arange(3000))
    assert set(np.asarray(ids)) == {1, 2}


def test_log_probabilities_are_those_of_the_softmax(logits):
    ids = np.arange(len(CASES), dtype=np.int32)
    wanted = np.asarray(jax.nn.log_softmax(logits))
    got, top_ids, top = jax.jit(logprobs, static_argnums=2)(logits + 100, ids, 5)
    np.testing.assert_allclose(got, wanted[ids, ids], atol=1e-5)
    np.testing.assert_allclose(top, np.sort(wanted)[:, ::-1][:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(wanted, np.asarray(top_ids), axis=1), top, atol=1e-5)


def test_parameters_never_recompile(logits):
    rows = len(CASES)
    before = jitted._cache_size()
    jitted(logits, mixed(), np.arange(rows))
    once = jitted._cache_size()
    jitted(logits, make_sampling(rows, temperature=0.1, seed=3, typical_p=0.5), np.arange(rows))
    jitted(logits, make_sampling(rows, temperature=0), np.arange(rows))
    assert jitted._cache_size() == once <= before + 1


def test_a_greedy_batch_pays_for_no_noise_and_no_sums():
    """The draw stands under a condition; outside of it there is one argmax."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, 64)), make_sampling(2), jnp.arange(2))
    outside = {eqn.primitive.name for eqn in jaxpr.eqns}
    assert "cond" in outside and not {"random_bits", "while", "scan", "exp", "log"} & outside
