"""The losses as one would write them down: what the self-check holds the objectives against.

Nothing of `objectives` is used here, no chunks, no gradient by hand. Shapes: B row, K positions, V vocab, N tokens that
a teacher names.
"""

import jax
import jax.numpy as jnp

from jaxllm.data.batch import TokenBatch
from jaxllm.sharding import Sharding

#: The loss, and what is added to it.
Parts = tuple[jax.Array, jax.Array]


def of_target(logprobs_BKV, picked: TokenBatch) -> jax.Array:
    """`[B, K]`"""
    return jnp.take_along_axis(logprobs_BKV, picked.targets_BT[..., None], axis=-1)[..., 0]


def text(sharding: Sharding, logits_BKV, picked: TokenBatch, *, z_loss: float) -> Parts:
    """Cross-entropy, and the square of the log of the softmax's sum (z-loss)."""
    ce_BK = -of_target(jax.nn.log_softmax(logits_BKV), picked)
    z_BK = z_loss * jax.nn.logsumexp(logits_BKV, axis=-1) ** 2
    return jnp.sum(picked.mask_BT * ce_BK), jnp.sum(picked.mask_BT * z_BK)


def teacher(sharding: Sharding, logits_BKV, picked: TokenBatch, *, weight: float, temperature: float) -> Parts:
    """Cross-entropy, and the divergence from what the teacher says of its tokens and of all others as one."""
    ce_BK = -of_target(jax.nn.log_softmax(logits_BKV), picked)
    p_BKN = jnp.exp(picked.top_logprobs_BTN)
    q_BKN = jnp.take_along_axis(jax.nn.softmax(logits_BKV / temperature), picked.top_ids_BTN, axis=-1)
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, axis=-1), 1e-7) for x in (p_BKN, q_BKN))
    kl_BK = jnp.sum(p_BKN * jnp.log(jnp.maximum(p_BKN, 1e-30) / jnp.maximum(q_BKN, 1e-30)), axis=-1)
    kl_BK += jnp.where(rest_p > 1e-6, rest_p * jnp.log(rest_p / rest_q), 0.0)
    return jnp.sum(picked.mask_BT * ((1 - weight) * ce_BK + weight * temperature**2 * kl_BK)), jnp.zeros(())


def preference(sharding: Sharding, logits_BKV, picked: TokenBatch, *, beta: float, smoothing: float) -> Parts:
    """Of each pair, `-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected))`, smoothed."""
    there_BK = picked.mask_BT > 0
    ratio_BK = there_BK * (of_target(jax.nn.log_softmax(logits_BKV), picked) - picked.reference_BT)
    found = ratio_BK, there_BK, picked.segments_BT
    if sharding.across("context"):
        found = tuple(sharding.gather(x, "context", 1) for x in found)
    ratio_BK, there_BK, segments_BK = found
    pair_BK, sign_BK = (segments_BK + 1) // 2, jnp.where(segments_BK % 2 == 1, 1.0, -1.0)
    same_BKK = (pair_BK[:, :, None] == pair_BK[:, None, :]) & there_BK[:, None, :]
    margin_BK = beta * jnp.einsum("BKJ,BJ->BK", same_BKK.astype(jnp.float32), sign_BK * ratio_BK)
    loss_BK = (1 - smoothing) * jax.nn.softplus(-margin_BK) + smoothing * jax.nn.softplus(margin_BK)
    # Each pair counts once: at the first of its positions.
    first_BK = there_BK & (jnp.argmax(same_BKK, axis=-1) == jnp.arange(there_BK.shape[1]))
    return jnp.sum(loss_BK * first_BK * sharding.first_part), jnp.zeros(())
