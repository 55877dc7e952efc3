"""Next-token prediction: cross-entropy in chunks, z-loss, and the losses of the router.

An objective is `(model, params, batch, key) -> (loss_sum, count, metrics)`. Sums and counts, never means: then
accumulation, packing and data parallelism give the gradient of one big batch.

Shapes: B batch, T position, D embed, V vocab, C chunks of the sequence, J positions of a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.weights.bind import bind

#: Most logits that a CPU device holds at once: 8 MiB of float32, with which a step of a small model is 5 % faster than
#: with 16. An accelerator holds 32 times as many (256 MiB), and at least those of 1,024 positions: in smaller products
#: it would wait for the head and its gradient to be read.
CHUNK_LOGITS = 1 << 21

Metrics = dict[str, Any]


def lm(model: Model, params: Params, batch: TokenBatch, key=None, *, z_loss: float = 0.0, neftune: float | None = None):
    """`(loss_sum, count, metrics)` over the targets that `batch.mask_BT` chooses; every metric is a sum over them.

    z_loss weighs the square of the log of the softmax's sum (PaLM, arXiv 2204.02311, section 5). neftune is the noise
    on the embeddings where there is a key (see `Model.apply`).
    """
    params = bind(params, key=model.sharding.own_key(key))
    where = dict(positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    hidden_BTD, _, aux = model.apply(params, batch.tokens_BT, **where, key=key, neftune=neftune)
    mask_BT = batch.mask_BT.astype(jnp.float32)
    count = jnp.sum(mask_BT)
    loss, ce = cross_entropy(model, model.head(params), hidden_BTD, batch.targets_BT, mask_BT, z_loss)
    more, metrics = router_losses(aux, mask_BT)
    return loss + more, count, {"ce": ce} | metrics


def router_losses(aux, mask_BT) -> tuple[jax.Array | float, Metrics]:
    """`(loss, metrics)` of the experts, weighed by each row's targets; `(0, {})` where there are none."""
    if not aux:
        return 0.0, {}
    count_B = jnp.sum(mask_BT, axis=1)
    metrics = {name[:-2]: jnp.sum(count_B * aux[name]) for name in ("balance_B", "router_z_B", "dropped_B")}
    return jnp.sum(count_B * aux["loss_B"]), metrics | {"load": aux["load"]}


def cross_entropy(model: Model, head, hidden_BTD, targets_BT, mask_BT, z_loss: float = 0.0):
    """`(loss, ce)`, sums over the masked targets; ce has no gradient. Float32 logits exist a chunk at a time.

    loss = ce + z_loss * sum (log sum exp logits)^2 and ce = sum -log p(target). The gradient is computed in the
    forward pass, chunk by chunk, so that no logits are kept or computed twice. Any weight type can be the head.
    """
    chunks = chunks_of(model, hidden_BTD.shape)
    how = model.whole_head, model.unembed, chunks, z_loss
    loss, ce = _cross_entropy(how, head, hidden_BTD, targets_BT, mask_BT)
    return loss, jax.lax.stop_gradient(ce)


def chunks_of(model: Model, shape) -> int:
    """Into how many chunks positions `[B, T, ...]` are cut, so that their logits fit."""
    (B, T, _), vocab = shape, model.config.padded_vocab
    cpu, devices = model.sharding.platform == "cpu", model.sharding.spread
    held = CHUNK_LOGITS * devices * (1 if cpu else 32)
    # With a large vocabulary a product of few rows would be slow: 128 take less than half the time of 8 at 262,144.
    few, most = (2, B * T // 128) if cpu else (1, B * T // (1024 * devices))
    wanted = max(few, min(math.ceil(B * T * vocab / held), most))
    return next((n for n in range(min(wanted, T), T + 1) if T % n == 0), T)


def _losses(logits_BJV, targets_BJ, mask_BJ, z_loss):
    """`(loss, ce, gradient of the loss by the logits)` of one chunk."""
    lse_BJ1 = jax.nn.logsumexp(logits_BJV, axis=-1, keepdims=True)
    # A comparison and a sum, not a gather: it stays local where the vocabulary is split over devices.
    hit_BJV = jnp.arange(logits_BJV.shape[-1]) == targets_BJ[..., None]
    ce = jnp.sum((lse_BJ1[..., 0] - jnp.sum(jnp.where(hit_BJV, logits_BJV, 0), axis=-1)) * mask_BJ)
    loss = ce + z_loss * jnp.sum(jnp.square(lse_BJ1[..., 0]) * mask_BJ)
    p_BJV = jnp.exp(logits_BJV - lse_BJ1)
    return loss, ce, (p_BJV * (1 + 2 * z_loss * lse_BJ1) - hit_BJV) * mask_BJ[..., None]


def split(x, chunks: int):
    """`[B, T, ...] -> [C, B, J, ...]` with every C-th position in a chunk, so that a split sequence stays split."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // chunks, chunks, *x.shape[2:]), 2, 0)


def join(x_C):
    C, B, J = x_C.shape[:3]
    return jnp.moveaxis(x_C, 0, 2).reshape(B, J * C, *x_C.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(how, head, hidden_BTD, targets_BT, mask_BT):
    whole_head, unembed, chunks, z_loss = how
    head = whole_head(head)

    def body(total, chunk):
        hidden, targets, mask = chunk
        return jax.tree.map(jnp.add, total, _losses(unembed(head, hidden), targets, mask, z_loss)[:2]), None

    xs = tuple(split(x, chunks) for x in (hidden_BTD, targets_BT, mask_BT))
    return jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), xs)[0]


def _forward(how, head, hidden_BTD, targets_BT, mask_BT):
    whole_head, unembed, chunks, z_loss = how
    parts, rest, merge = differentiable(head)
    floating, scatter = jax.vjp(lambda parts: differentiable(whole_head(merge(parts, rest)))[0], parts)
    rest = differentiable(whole_head(head))[1]

    def body(carry, chunk):
        hidden, targets, mask = chunk
        logits, pull = jax.vjp(lambda floating, hidden: unembed(merge(floating, rest), hidden), floating, hidden)
        loss, ce, d_logits = _losses(logits, targets, mask, z_loss)
        d_head, d_hidden = pull(d_logits)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, (loss, ce, d_head)), d_hidden

    zero = (jnp.zeros(()), jnp.zeros(()), [jnp.zeros(x.shape, jnp.float32) for x in floating])
    xs = tuple(split(x, chunks) for x in (hidden_BTD, targets_BT, mask_BT))
    (loss, ce, d_head), d_hidden = jax.lax.scan(body, zero, xs)
    (d_head,) = scatter([d.astype(x.dtype) for d, x in zip(d_head, floating, strict=True)])
    # Summed over the devices before anything else, or the whole of it would stay in memory through the backward pass.
    d_head, d_hidden = jax.lax.optimization_barrier((d_head, d_hidden))
    return (loss, ce), (merge(d_head, [None] * len(rest)), join(d_hidden))


def _backward(how, saved, cotangents):
    scaled = jax.tree.map(lambda d: (cotangents[0] * d).astype(d.dtype), saved)
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward)


def differentiable(tree):
    """`(floating leaves, other leaves, merge)`: integer leaves (quantised weights) have no gradient."""
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def merge(floating, rest):
        floating, rest = iter(floating), iter(rest)
        return jax.tree.unflatten(treedef, [next(floating if f else rest) for f in is_float])

    return (
        [x for x, f in zip(leaves, is_float, strict=True) if f],
        [x for x, f in zip(leaves, is_float, strict=True) if not f],
        merge,
    )
