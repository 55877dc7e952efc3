"""Log-probabilities of given tokens, one for each position, a chunk of logits at a time.

Shapes: B batch, T position, D embed, V vocab, C chunks of the sequence, J positions of a chunk.
"""

import jax
import jax.numpy as jnp

from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import chunks_of, join, split
from jaxllm.weights.bind import bind


def token_logprobs(model: Model, params: Params, batch: TokenBatch, key=None) -> jax.Array:
    """float32 `[B, T]`: the log-probability of each target, also where the mask is 0. Differentiable.

    Logits of a chunk are computed again in the backward pass, so that those of all positions never exist.
    """
    params = bind(params, key=model.sharding.own_key(key))
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, _ = model.apply(params, batch.tokens_BT, **where, key=key)
    head = model.whole_head(model.head(params))

    @jax.checkpoint
    def body(_, chunk):
        hidden_BJD, targets_BJ = chunk
        logits_BJV = model.unembed(head, hidden_BJD)
        hit_BJV = jnp.arange(logits_BJV.shape[-1]) == targets_BJ[..., None]
        picked_BJ = jnp.sum(jnp.where(hit_BJV, logits_BJV, 0), axis=-1)
        return None, picked_BJ - jax.nn.logsumexp(logits_BJV, axis=-1)

    chunks = chunks_of(model, hidden_BTD.shape)
    logprobs_CBJ = jax.lax.scan(body, None, tuple(split(x, chunks) for x in (hidden_BTD, batch.targets_BT)))[1]
    return join(logprobs_CBJ)
