"""Attention behind one signature, with a plain reference and a blockwise form that every backend can run.

Both mask by segment, causal order and window, and know soft-caps, ALiBi and attention sinks. Softmax is in float32.

Shapes: B batch, T query position, S key position, N query heads, K kv heads, G = N/K, H head dim, C query chunk.
Values and outputs may have another head dim than queries and keys.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding of a prompt) gives no NaN


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static in an attention call."""

    scale: float
    """Factor on the logits, usually head_dim ** -0.5."""
    window: int | None = None
    """A query sees this many positions, itself included."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2)."""


class Where(NamedTuple):
    """Positions and segments of queries and keys; a key is seen from its own segment and from no earlier position."""

    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_segments_BT: jax.Array | None = None
    k_segments_BS: jax.Array | None = None


class PerHead(NamedTuple):
    """Optional per-head numbers."""

    slopes_N: jax.Array | None = None
    """ALiBi: logits lose slope * distance (arXiv 2108.12409, section 3)."""
    sinks_N: jax.Array | None = None
    """A learned logit that takes part in the softmax and holds no value (GPT-OSS; arXiv 2309.17453)."""


NO_HEADS = PerHead()


def reference(q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS) -> jax.Array:
    """Attention as the equations have it, with all logits in memory. Returns `o_BTNH`."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * form.scale
    s_BKGTS, _ = _logits(q_BKGTH, k_BKSH, form, where, _by_kv_head(heads.slopes_N, K))
    p_BKGTS, total, _ = _exponentials(s_BKGTS, _by_kv_head(heads.sinks_N, K))
    o_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", (p_BKGTS / total).astype(v_BKSH.dtype), v_BKSH)
    return o_BTKGH.reshape(B, T, N, -1)


def blockwise(q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS) -> jax.Array:
    """Self-attention by chunks of queries against the keys they can see; no T by T array outlives a chunk.

    The backward pass recomputes each chunk's probabilities from the saved log-sum-exp (FlashAttention, arXiv
    2205.14135, section 3.1). Key s must lie at index s of the same rows as the queries: blocks above the diagonal
    and outside the window are skipped by index.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * form.scale
    slopes, sinks = _by_kv_head(heads.slopes_N, K), _by_kv_head(heads.sinks_N, K)
    o_BKGTH = _blockwise(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def _by_kv_head(x_N, K):
    return None if x_N is None else x_N.astype(jnp.float32).reshape(1, K, -1, 1, 1)


def _logits(q_BKGTH, k_BKSH, form: Form, where: Where, slopes):
    """Masked float32 logits, and the derivative of the soft-cap at them (None without one)."""
    B, K, G, T, H = q_BKGTH.shape
    s = jnp.einsum("BKMH,BKSH->BKMS", q_BKGTH.reshape(B, K, G * T, H), k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS, slope_of_cap = s.reshape(B, K, G, T, -1), None
    if form.softcap is not None:
        tanh = jnp.tanh(s_BKGTS / form.softcap)
        s_BKGTS, slope_of_cap = form.softcap * tanh, 1 - tanh * tanh
    distance_BTS = where.q_positions_BT[:, :, None] - where.k_positions_BS[:, None, :]
    if slopes is not None:
        s_BKGTS = s_BKGTS - slopes * distance_BTS[:, None, None].astype(jnp.float32)
    seen_BTS = (distance_BTS >= 0) & (where.k_positions_BS[:, None, :] >= 0)
    if form.window is not None:
        seen_BTS &= distance_BTS < form.window
    if where.q_segments_BT is not None:
        seen_BTS &= where.q_segments_BT[:, :, None] == where.k_segments_BS[:, None, :]
    return jnp.where(seen_BTS[:, None, None], s_BKGTS, MASKED), slope_of_cap


def _exponentials(s_BKGTS, sinks):
    """Unnormalised probabilities, their sum and its log; a sink adds to the sum and gives no column."""
    m = jnp.max(s_BKGTS, axis=-1, keepdims=True)
    m = m if sinks is None else jnp.maximum(m, sinks)
    p = jnp.exp(s_BKGTS - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - m)
    return p, total, m + jnp.log(total)


def _chunks(T: int, window: int | None):
    """`(start, end, first key)` of each chunk of queries: 128 rows, or enough to have 16 chunks at most."""
    size = max(128, -(-T // 16))
    for start in range(0, T, size):
        yield start, min(start + size, T), 0 if window is None else max(0, start - window + 1)


def _at(where: Where, start: int, end: int, first: int) -> Where:
    q, k = slice(start, end), slice(first, end)
    cut = lambda x, part: None if x is None else x[:, part]  # noqa: E731
    return Where(where[0][:, q], where[1][:, k], cut(where[2], q), cut(where[3], k))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    return _forward(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)[0]


def _forward(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    outputs, lses = [], []
    for start, end, first in _chunks(q_BKGTH.shape[3], form.window):
        k, v = k_BKSH[:, :, first:end], v_BKSH[:, :, first:end]
        s, _ = _logits(q_BKGTH[:, :, :, start:end], k, form, _at(where, start, end, first), slopes)
        p, total, lse = _exponentials(s, sinks)
        o = _rows(jnp.einsum("BKMS,BKSH->BKMH", _flat(p.astype(v.dtype)), v), p.shape)
        outputs.append((o / total).astype(v.dtype))  # dividing the output is S/H times cheaper than dividing p
        lses.append(lse)
    return jnp.concatenate(outputs, axis=3), jnp.concatenate(lses, axis=3)


def _flat(x_BKGCS):
    B, K, G, C, S = x_BKGCS.shape
    return x_BKGCS.reshape(B, K, G * C, S)


def _rows(x_BKMH, shape):
    return x_BKMH.reshape(*shape[:4], x_BKMH.shape[-1])


def _save(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    o, lse = _forward(form, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)
    return o, (q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes, o, lse)


def _backward(form, saved, do_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes, o_BKGTH, lse_BKGT1 = saved
    delta = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH, axis=-1, keepdims=True)
    # dk and dv as H by S: the product is then of q and do transposed, not of the S/H times larger ds and p.
    B, K, S, H = k_BKSH.shape
    dq, dk, dv = [], jnp.zeros((B, K, H, S), jnp.float32), jnp.zeros((B, K, v_BKSH.shape[-1], S), jnp.float32)
    for start, end, first in _chunks(q_BKGTH.shape[3], form.window):
        part, keys = slice(start, end), slice(first, end)
        q, do, k, v = q_BKGTH[:, :, :, part], do_BKGTH[:, :, :, part], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        s, slope_of_cap = _logits(q, k, form, _at(where, start, end, first), slopes)
        p = jnp.exp(s - lse_BKGT1[:, :, :, part])
        dp = jnp.einsum("BKMH,BKSH->BKMS", _flat(do), v, preferred_element_type=jnp.float32).reshape(p.shape)
        ds = p * (dp - delta[:, :, :, part])
        ds = _flat((ds if slope_of_cap is None else ds * slope_of_cap).astype(q.dtype))
        dq.append(_rows(jnp.einsum("BKMS,BKSH->BKMH", ds, k), p.shape))
        dk = dk.at[..., keys].add(jnp.einsum("BKMH,BKMS->BKHS", _flat(q), ds))
        dv = dv.at[..., keys].add(jnp.einsum("BKMH,BKMS->BKHS", _flat(do), _flat(p.astype(do.dtype))))
    # A sink has no value, so its logit's gradient is p_sink * (0 - delta), summed over rows and queries.
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - lse_BKGT1) * delta, axis=(0, 3), keepdims=True)
    dk, dv = dk.swapaxes(2, 3).astype(k_BKSH.dtype), dv.swapaxes(2, 3).astype(v_BKSH.dtype)
    return jnp.concatenate(dq, axis=3), dk, dv, dsinks, None, None


_blockwise.defvjp(_save, _backward)


def attention(q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, kind: str) -> jax.Array:
    """`o_BTNH` by the implementation named `kind`: "reference" or "blockwise"."""
    return {"reference": reference, "blockwise": blockwise}[kind](q_BTNH, k_BKSH, v_BKSH, form, where, heads)
