"""What is said of each position by its logits, a chunk of logits at a time; log-probabilities of given tokens.

Shapes: B batch, T position, D embed, V vocab, C chunks of the sequence, J positions of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.objectives.lm import chunks_of, differentiable, join, split
from jaxllm.weights.bind import bind


def token_logprobs(model: Model, params: Params, batch: TokenBatch, key=None) -> jax.Array:
    """float32 `[B, T]`: the log-probability of each target, also where the mask is 0. Differentiable."""
    params = bind(params, key=model.sharding.own_key(key))
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, _ = model.apply(params, batch.tokens_BT, **where, key=key)
    return by_position(model, logprob, model.head(params), hidden_BTD, batch.targets_BT)


def logprob(logits_BJV: jax.Array, targets_BJ: jax.Array) -> jax.Array:
    """`[B, J]`: the log-probability of each target."""
    # A comparison and a sum, not a gather: it stays local where the vocabulary is split over devices.
    hit_BJV = jnp.arange(logits_BJV.shape[-1]) == targets_BJ[..., None]
    return jnp.sum(jnp.where(hit_BJV, logits_BJV, 0), axis=-1) - jax.nn.logsumexp(logits_BJV, axis=-1)


def by_position(model: Model, f: Callable, head: Any, hidden_BTD: jax.Array, *given_BT: jax.Array) -> Any:
    """What `f(logits_BJV, *given_BJ)` says of each position of a chunk, over all chunks: arrays `[B, T, ...]`.

    Differentiable by the head and the hidden states, and not by what is given. Logits are computed again in the
    backward pass, so that those of all positions never exist, and the head's gradient is summed over chunks in float32:
    in bfloat16, in which devices share the head, 256 chunks make its rounding error twice as large.
    """
    how = model.whole_head, model.unembed, chunks_of(model, hidden_BTD.shape), f
    return _by_position(how, head, hidden_BTD, given_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_position(how, head, hidden_BTD, given):
    return _save(how, head, hidden_BTD, given)[0]


def _save(how, head, hidden_BTD, given):
    whole_head, unembed, chunks, f = how
    whole = whole_head(head)

    def body(_, chunk):
        hidden_BJD, given = chunk
        return None, f(unembed(whole, hidden_BJD), *given)

    xs = jax.tree.map(lambda x: split(x, chunks), (hidden_BTD, given))
    return jax.tree.map(join, jax.lax.scan(body, None, xs)[1]), (head, whole, hidden_BTD, given)


def _backward(how, saved, cotangents):
    whole_head, unembed, chunks, f = how
    head, whole, hidden_BTD, given = saved
    floating, rest, merge = differentiable(whole)

    def body(total, chunk):
        hidden_BJD, given, cotangent = chunk
        of = lambda floating, hidden_BJD: f(unembed(merge(floating, rest), hidden_BJD), *given)  # noqa: E731
        d_head, d_hidden_BJD = jax.vjp(of, floating, hidden_BJD)[1](cotangent)
        return jax.tree.map(lambda total, d: total + d.astype(total.dtype), total, d_head), d_hidden_BJD

    xs = jax.tree.map(lambda x: split(x, chunks), (hidden_BTD, given, cotangents))
    d_head, d_hidden = jax.lax.scan(body, [jnp.zeros(x.shape, jnp.float32) for x in floating], xs)
    d_head = [d.astype(x.dtype) for d, x in zip(d_head, floating, strict=True)]
    parts, rest, merge = differentiable(head)
    (d_head,) = jax.vjp(lambda parts: differentiable(whole_head(merge(parts, rest)))[0], parts)[1](d_head)
    # Summed over the devices before anything else, or the whole of it would stay in memory through the backward pass.
    d_head, d_hidden = jax.lax.optimization_barrier((d_head, d_hidden))
    return merge(d_head, [None] * len(rest)), join(d_hidden), None


_by_position.defvjp(_save, _backward)
