"""Spikes: the rule by hand, and a step that is told of it and one that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxllm.errors import SettingsError
from jaxllm.objectives.lm import lm
from jaxllm.train import spikes
from jaxllm.train.step import abstract_state, make_state, make_train_step


def known(norms) -> dict:
    """The state after steps of these norms, all taken."""
    state = spikes.fresh()
    for norm in norms:
        state = spikes.after(state, jnp.float32(norm), jnp.bool_(True), jnp.bool_(False))
    return state


@pytest.mark.fast
def test_the_limit_is_mean_and_deviations_of_the_last_128():
    norms = np.random.default_rng(0).gamma(9, 0.1, 200).astype(np.float32)
    assert np.isinf(spikes.limit(known(norms[:63]), 6.0))
    for count in (64, 100, 128, 129, 200):
        last = norms[max(0, count - 128) : count].astype(np.float64)
        expected = last.mean() + 6 * last.std(ddof=1)
        assert abs(float(spikes.limit(known(norms[:count]), 6.0)) / expected - 1) < 1e-5
    assert abs(float(spikes.limit(known([2.0] * 80), 6.0)) - 2.12) < 1e-5, "a hundredth of the mean is the least"


@pytest.mark.fast
def test_only_a_step_that_is_taken_is_remembered():
    before, no = known(range(70)), jnp.bool_(False)
    for norm, spike in ((1e9, True), (np.nan, False), (np.inf, False)):
        state = spikes.after(before, jnp.float32(norm), no, jnp.bool_(spike))
        assert state["norms"].tobytes() == before["norms"].tobytes() and state["known"] == before["known"] == 70
        assert state["skipped"] == spike


def test_the_state_of_a_step_that_skips_spikes_is_what_is_foretold_and_no_other_has_it():
    model, tx = tiny.one_device(tiny.DENSE), optax.sgd(1.0)
    for skip in (True, False):
        state = jax.eval_shape(lambda key, skip=skip: make_state(model, tx, key, skip_spikes=skip), jax.random.key(0))
        there = abstract_state(model, tx, skip_spikes=skip)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), there)
        assert ("spikes" in there.extra) == skip
    for deviations in (None, 6.0):
        step = make_train_step(model, lm, tx, skip_spikes=deviations)
        _, metrics = jax.eval_shape(step, abstract_state(model, tx, skip_spikes=deviations is not None), tiny.batch())
        assert ("skipped_spikes" in metrics) == ("grad_norm_limit" in metrics) == (deviations is not None)


@pytest.mark.fast
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_deviations_that_cannot_be(value):
    from jaxllm.config import parse
    from jaxllm.train.config import TrainConfig

    with pytest.raises(SettingsError, match="skip_spikes=.* must be above 0; null skips no spikes"):
        parse(TrainConfig, {"steps": 1, "skip_spikes": value})
