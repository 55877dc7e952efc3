"""From logits to the next token, each row with its own numbers and seed.

What happens to a row's logits, in this order; the steps that transformers has too come in its order:
logit bias, repetition penalty, frequency and presence penalties (`penalties.py`), bans, then for rows that are not
greedy temperature, top-k, top-p, min-p, typical sampling (`truncate.py`), and the draw.
One compiled function serves every mixture of them, so a new temperature never compiles anything.

Shapes: B batch, V vocab, N alternatives.
"""

import jax
import jax.numpy as jnp

from jaxllm.generate.params import SamplingParams
from jaxllm.generate.truncate import truncate


def sample(logits_BV: jax.Array, params: SamplingParams, positions_B: jax.Array) -> jax.Array:
    """The next token of each row, from logits in which whatever may not be made is -inf already.

    What truncation leaves is drawn from by the Gumbel-max trick. The noise of a row depends on its seed and on
    `positions_B`, the position of the token to be drawn, and on nothing else.
    """
    return jax.lax.cond(
        jnp.any(params.temperature_B > 0),
        lambda: _draw(logits_BV, params, positions_B),
        lambda: _largest(logits_BV),
    )


def _draw(logits_BV, params: SamplingParams, positions_B):
    noise_BV = jax.vmap(lambda s, t: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), t), logits_BV.shape[1:]))(
        params.seed_B, positions_B
    )
    drawn_B = _largest(truncate(logits_BV, params) + noise_BV)
    return jnp.where(params.temperature_B > 0, drawn_B, _largest(logits_BV))


def _largest(x_BV):
    """The place of the largest entry, the first of equal ones. On CPU argmax takes 17 ms for 8 x 262,144, this 1.7."""
    equal_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    place_V = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(equal_BV, place_V, x_BV.shape[-1] - 1), axis=-1)


def logprobs(logits_BV: jax.Array, ids_B: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(logprobs_B, top_ids_BN, top_logprobs_BN)`: log-probabilities of the tokens and of the `top` most likely ones.

    In nats, under the model itself: from its logits before any penalty, ban, temperature or truncation.
    """
    normaliser_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    logprobs_B1 = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1) - normaliser_B1
    top_BN, top_ids_BN = jax.lax.top_k(logits_BV, top)
    return logprobs_B1[:, 0], top_ids_BN, top_BN - normaliser_B1
