"""Ring attention: keys and values travel around the devices that hold parts of the same rows (arXiv 2310.01889).

Within `jax.shard_map`. Each device holds an early and a late piece of a row (`Sharding.order`), so that all have as
much to do in each step: its late queries see all early keys, and of the rest half is visible, which half depends on who
came first. A device holds its own keys and those of one other at a time.

Shapes: B batch, T positions of a device, N query heads, K kv heads, G = N/K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels import blockwise
from jaxllm.kernels.reference import NO_HEADS, SAVED, Form, PerHead, Where, by_kv_head


def ring(q_BTNH, k_BKTH, v_BKTH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, axis: str, halves: bool):
    """`o_BTNH` of self-attention over whole rows, of which this device holds a part.

    halves: it holds two pieces, which are in the balanced order; else one, and half of the work is in vain.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKTH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * form.scale
    slopes, sinks = by_kv_head(heads.slopes_N, K), by_kv_head(heads.sinks_N, K)
    o_BKGTH = _ring((form, axis, halves), q_BKGTH, k_BKTH, v_BKTH, sinks, where, slopes)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how, q, k, v, sinks, where, slopes):
    return _forward(how, q, k, v, sinks, where, slopes)[0]


def _forward(how, q, k, v, sinks, where, slopes):
    form, axis, halves = how
    o, lse = blockwise.attend((form, True), q, k, v, None, where, slopes)

    def step(carry, i):
        o, lse, keys = carry
        keys = _turn(axis, keys)
        for queries, part in _blocks(axis, halves, i, q.shape[3]):
            one, seen = _take(queries, q, 3), _where(where, keys, queries, part)
            found = blockwise.attend((form, False), one, *(_take(part, x, 2) for x in keys[:2]), None, seen, slopes)
            o, lse = _merge(o, lse, *found, queries)
        return (o, lse, keys), None

    keys = k, v, where.k_positions_BS, where.k_segments_BS
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    (o, lse, _), _ = jax.lax.scan(step, (o.astype(jnp.float32), lse, keys), steps)
    if sinks is not None:
        total = jnp.logaddexp(lse, sinks)
        o, lse = o * jnp.exp(lse - total), total
    return o.astype(v.dtype), lse


def _save(how, q, k, v, sinks, where, slopes):
    o, lse = (checkpoint_name(x, SAVED) for x in _forward(how, q, k, v, sinks, where, slopes))
    return o, (q, k, v, sinks, where, slopes, o, lse)


def _backward(how, saved, do):
    (form, axis, halves), (q, k, v, sinks, where, slopes, o, lse) = how, saved
    delta = jnp.sum(do.astype(jnp.float32) * o, axis=-1, keepdims=True)
    dq, dk, dv = blockwise.gradients((form, True), q, k, v, where, slopes, do, lse, delta)

    def step(carry, i):
        dq, keys, dkv = carry
        keys, dkv = _turn(axis, (keys, dkv))
        for queries, part in _blocks(axis, halves, i, q.shape[3]):
            rows = tuple(_take(queries, x, 3) for x in (q, do, lse, delta))
            seen, k, v = _where(where, keys, queries, part), *(_take(part, x, 2) for x in keys[:2])
            of_q, *of_kv = blockwise.gradients((form, False), rows[0], k, v, seen, slopes, *rows[1:])
            dq = _add(dq, of_q, queries, 3)
            dkv = tuple(_add(total, d, part, 2) for total, d in zip(dkv, of_kv, strict=True))
        return (dq, keys, dkv), None

    keys = k, v, where.k_positions_BS, where.k_segments_BS
    carry = dq.astype(jnp.float32), keys, (dk, dv)
    (dq, _, dkv), _ = jax.lax.scan(step, carry, jnp.arange(1, jax.lax.axis_size(axis)))
    dk, dv = _turn(axis, dkv)  # home again
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - lse) * delta, axis=(0, 3), keepdims=True)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None, None


_ring.defvjp(_save, _backward)


def _turn(axis: str, x):
    """From each device to the next."""
    n = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), x)


def _blocks(axis: str, halves: bool, i, length: int):
    """`(queries, keys)` of step i, each as `(start, size)`: what these queries can see of those keys.

    Device m has the keys of device m - i. If that is an earlier one, all queries of m see its early keys; if it is a
    later one, the late queries of m see all of its keys.
    """
    if not halves:
        return [((0, length), (0, length))]
    half = length // 2
    earlier = i <= jax.lax.axis_index(axis)
    start = jnp.where(earlier, 0, half)
    return [((half, half), (0, half)), ((start, half), (start, half))]


def _take(part, x, dim: int):
    return jax.lax.dynamic_slice_in_dim(x, *part, axis=dim)


def _where(where: Where, keys, queries, part) -> Where:
    q = tuple(None if x is None else _take(queries, x, 1) for x in (where.q_positions_BT, where.q_segments_BT))
    k = tuple(None if x is None else _take(part, x, 1) for x in keys[2:])
    return Where(q[0], k[0], q[1], k[1])


def _add(total, d, part, dim: int):
    new = _take(part, total, dim) + d
    return jax.lax.dynamic_update_slice_in_dim(total, new.astype(total.dtype), part[0], axis=dim)


def _merge(o, lse, o_new, lse_new, part):
    """Two softmaxes over different keys as one over both."""
    old, before = _take(part, o, 3), _take(part, lse, 3)
    after = jnp.logaddexp(before, lse_new)
    new = old * jnp.exp(before - after) + o_new.astype(jnp.float32) * jnp.exp(lse_new - after)
    put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, part[0], axis=3)  # noqa: E731
    return put(o, new), put(lse, after)
