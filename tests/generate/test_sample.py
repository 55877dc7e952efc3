"""The sampler against a plain definition with sorting, and its noise against the distribution that it must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import SettingsError
from jaxllm.generate.sample import make_sampling, sample, truncate

NONE = np.zeros(64, bool)
jitted, jitted_truncate = jax.jit(sample), jax.jit(truncate)


def plain(logits, temperature, top_k, top_p, min_p):
    """Probabilities by the book, in float64: temperature, top-k, top-p of the rest, min-p; ties are kept."""
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    p /= p.sum()
    if top_p < 1:
        down = np.sort(p)[::-1]
        p = np.where(p >= down[np.searchsorted(np.cumsum(down), top_p)], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
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
]


@pytest.fixture(scope="module")
def logits():
    """One row a case; some tokens tie."""
    rows = np.random.default_rng(0).normal(size=(len(CASES), 64)).astype(np.float32) * 3
    rows[:, 10:12], rows[:, 12:14] = 0.0, 2.5
    return rows


def column(name, default):
    return [case.get(name, default) for case in CASES]


def mixed(seed=0):
    columns = dict(top_k=column("top_k", 0), top_p=column("top_p", 1.0), min_p=column("min_p", 0.0))
    return make_sampling(len(CASES), temperature=column("temperature", 1.0), seed=seed, **columns)


def test_every_row_is_truncated_as_its_own_parameters_say(logits):
    got = jax.nn.softmax(jitted_truncate(logits, mixed()))
    for row, wanted, case in zip(np.asarray(got), logits.astype(np.float64), CASES, strict=True):
        wanted = plain(wanted, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **case})
        assert ((row > 0) == (wanted > 0)).all(), case
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-9)


def test_top_k_and_top_p_by_hand():
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))

    def support(**options):
        return np.flatnonzero(np.isfinite(jitted_truncate(x, make_sampling(1, **options)))).tolist()

    assert support(top_k=2) == [0, 1] and support(top_p=0.6999) == [0, 1] and support(top_p=0.7001) == [0, 1, 2]
    assert support(top_k=3, top_p=0.77) == [0, 1]  # 0.7 of 0.9 is 0.778: top-p counts what top-k left
    assert support(min_p=0.45) == [0, 1, 2] and support(min_p=0.55) == [0, 1]
    assert support(temperature=0.5, min_p=0.45) == [0, 1]  # 0.2^2 / 0.4^2 = 0.25: temperature comes first


def test_draws_follow_the_distribution(logits):
    """Chi-square of 4,000 draws a row; a wrong order, a lost token or correlated noise fails by far."""
    draws = 4000
    params = jax.tree.map(lambda x: np.repeat(x, draws), mixed())
    positions = np.tile(np.arange(draws), len(CASES))
    ids, _ = jitted(np.repeat(logits, draws, axis=0), params, positions, NONE)
    for row, wanted, case in zip(np.asarray(ids).reshape(-1, draws), logits.astype(np.float64), CASES, strict=True):
        p = plain(wanted, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **case})
        seen = np.bincount(row, minlength=64)
        assert not seen[p == 0].any(), case
        common = p * draws >= 5
        expected, got = np.append(p[common], p[~common].sum()) * draws, np.append(seen[common], seen[~common].sum())
        chi2, freedom = np.sum((got - expected) ** 2 / np.maximum(expected, 1)), common.sum()
        assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom), (case, chi2, freedom)


def test_noise_depends_on_seed_and_position_alone():
    x = np.zeros((3, 64), np.float32)
    ids, _ = jitted(x, make_sampling(3, seed=[4, 4, 5]), np.array([7, 8, 7]), NONE)
    again, _ = jitted(x[::-1], make_sampling(3, seed=[5, 4, 4], top_p=[1, 0.5, 1]), np.array([7, 3, 7]), NONE)
    assert ids[0] == again[2] and ids[2] == again[0] and len({int(i) for i in ids}) == 3


def test_temperature_zero_is_greedy_beside_rows_that_sample(logits):
    ids, logprobs = jitted(logits, make_sampling(len(CASES), temperature=[0] * 10 + [5]), np.arange(11), NONE)
    assert (ids[:10] == logits[:10].argmax(-1)).all()
    tiny, _ = jitted(logits, make_sampling(len(CASES), temperature=1e-30), np.arange(11), NONE)
    assert (tiny == logits.argmax(-1)).all()  # no overflow on the way to greedy
    wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(logprobs, wanted, atol=1e-5)


def test_banned_tokens_are_not_drawn_and_their_share_goes_to_the_others():
    x = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    banned = np.array([True, False, False])
    draws = jitted(np.tile(x, (3000, 1)), make_sampling(3000, top_p=0.6), np.arange(3000), banned)
    assert set(np.asarray(draws[0])) == {1}  # 0.2 of the 0.3 that is left reaches 0.6
    np.testing.assert_allclose(draws[1], x[1], atol=1e-6)  # the log-probability is the model's own
    ids, _ = jitted(np.tile(x, (2, 1)), make_sampling(2, temperature=[0, 1]), np.arange(2), banned)
    assert ids[0] == 1 and ids[1] > 0


def test_parameters_never_recompile(logits):
    before = jitted._cache_size()
    jitted(logits, mixed(), np.arange(11), NONE)
    once = jitted._cache_size()
    jitted(logits, make_sampling(11, temperature=0.1, seed=3), np.arange(11), NONE)
    jitted(logits, make_sampling(11, temperature=0), np.arange(11), NONE)
    assert jitted._cache_size() == once <= before + 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1: must be an integer from 0"),
        (dict(top_p=0), "top_p=0: must be above 0"),
        (dict(min_p=1.5), "min_p=1.5: must be from 0"),
        (dict(seed=2**32), "seed=4294967296: must be"),
        (dict(temperature=[1, 2, 3]), "3 values for 2 prompts"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        make_sampling(2, **options)
    assert jnp.isfinite(make_sampling(2).temperature_B).all()
