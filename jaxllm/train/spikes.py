"""Steps whose gradient is far larger than those before: a rule that lives inside the jitted step.

After OLMo-core's rule (`optim/skip_step_optimizer.py`): more than some standard deviations above the mean of the last
128 steps, once half of them are known. It differs in three ways: the loss is not looked at; a small norm is no spike;
and what is skipped does not join what is remembered, so that one spike does not let the next one pass. A level that
stays high is therefore never taken for normal: it ends the run by `train.max_skipped`, with what it read.
"""

import jax
import jax.numpy as jnp

#: Steps that are remembered, and those after which they say enough.
WINDOW, KNOWN = 128, 64


def fresh() -> dict[str, jax.Array]:
    """`norms` of the last steps that were taken, float32; `known`: how many were; `skipped`: spikes so far."""
    return {"norms": jnp.zeros(WINDOW, jnp.float32), "known": jnp.int32(0), "skipped": jnp.int32(0)}


def limit(spikes: dict[str, jax.Array], deviations: float) -> jax.Array:
    """The norm above which a step is a spike; infinite until enough steps are known.

    A deviation counts as a hundredth of the mean at least, or steps that hardly differ would be skipped for rounding.
    """
    norms, count = spikes["norms"], jnp.minimum(spikes["known"], WINDOW)
    there = jnp.arange(WINDOW) < count
    mean = jnp.sum(norms, where=there) / jnp.maximum(count, 1)
    variance = jnp.sum((norms - mean) ** 2, where=there) / jnp.maximum(count - 1, 1)
    above = mean + deviations * jnp.maximum(jnp.sqrt(variance), mean / 100)
    return jnp.where(count >= KNOWN, above, jnp.inf)


def after(spikes: dict[str, jax.Array], norm, taken, spike) -> dict[str, jax.Array]:
    """The state after a step: with its norm where it was `taken`, and one more skipped where it was a `spike`."""
    at = spikes["known"] % WINDOW
    kept = jnp.where(taken, norm.astype(jnp.float32), spikes["norms"][at])
    return {
        "norms": spikes["norms"].at[at].set(kept),
        "known": spikes["known"] + taken,
        "skipped": spikes["skipped"] + spike,
    }
