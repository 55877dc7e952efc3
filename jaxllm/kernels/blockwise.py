"""Blockwise attention: chunks of queries against the keys that they can see, with a backward pass of its own.

Every backend can run it. It masks as `reference.py` does.

Shapes: B batch, T query position, S key position, N query heads, K kv heads, G = N/K, H head dim, C query chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxllm.kernels.reference import NO_HEADS, SAVED, Form, PerHead, Where, by_kv_head, exponentials, logits


def blockwise(
    q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, aligned: bool = True
) -> jax.Array:
    """Attention by chunks of queries against the keys they can see; no T by S array outlives a chunk.

    The backward pass recomputes each chunk's probabilities from the saved log-sum-exp (FlashAttention, arXiv
    2205.14135, section 3.1). aligned: key s lies at index s of the same rows as the queries, so that blocks above the
    diagonal and outside the window are skipped by index.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * form.scale
    slopes, sinks = by_kv_head(heads.slopes_N, K), by_kv_head(heads.sinks_N, K)
    o_BKGTH = _blockwise((form, aligned), q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def _chunks(T: int, S: int, window: int | None, aligned: bool):
    """`(queries, keys)` of each chunk as slices: 128 queries, or enough to have 16 chunks at most."""
    size = max(128, -(-T // 16))
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, end), slice(first, end) if aligned else slice(0, S)


def _at(where: Where, q: slice, k: slice) -> Where:
    cut = lambda x, part: None if x is None else x[:, part]  # noqa: E731
    return Where(where[0][:, q], where[1][:, k], cut(where[2], q), cut(where[3], k))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(how, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    return attend(how, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)[0]


def attend(how, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    """`(o_BKGTH, log of the softmax's sum)`; `how`: the form, and whether keys are aligned."""
    (form, aligned), outputs, lses = how, [], []
    for queries, keys in _chunks(q_BKGTH.shape[3], k_BKSH.shape[2], form.window, aligned):
        k, v = k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        s, _ = logits(q_BKGTH[:, :, :, queries], k, form, _at(where, queries, keys), slopes)
        p, total, lse = exponentials(s, sinks)
        o = _rows(jnp.einsum("BKMS,BKSH->BKMH", _flat(p.astype(v.dtype)), v), p.shape)
        outputs.append((o / total).astype(v.dtype))  # dividing the output is S/H times cheaper than dividing p
        lses.append(lse)
    return jnp.concatenate(outputs, axis=3), jnp.concatenate(lses, axis=3)


def _flat(x_BKGCS):
    B, K, G, C, S = x_BKGCS.shape
    return x_BKGCS.reshape(B, K, G * C, S)


def _rows(x_BKMH, shape):
    return x_BKMH.reshape(*shape[:4], x_BKMH.shape[-1])


def _save(how, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes):
    forward = attend(how, q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes)
    o, lse = (checkpoint_name(x, SAVED) for x in forward)
    return o, (q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes, o, lse)


def _backward(how, saved, do_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, sinks, where, slopes, o_BKGTH, lse_BKGT1 = saved
    delta = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH, axis=-1, keepdims=True)
    dq, dk, dv = gradients(how, q_BKGTH, k_BKSH, v_BKSH, where, slopes, do_BKGTH, lse_BKGT1, delta)
    # A sink has no value, so its logit's gradient is p_sink * (0 - delta), summed over rows and queries.
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - lse_BKGT1) * delta, axis=(0, 3), keepdims=True)
    return dq.astype(q_BKGTH.dtype), dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), dsinks, None, None


def gradients(how, q_BKGTH, k_BKSH, v_BKSH, where: Where, slopes, do_BKGTH, lse_BKGT1, delta_BKGT1):
    """`(dq, dk, dv)` of what these keys give to these queries; lse and delta are those of all keys of a query."""
    form, aligned = how
    # dk and dv as H by S: the product is then of q and do transposed, not of the S/H times larger ds and p.
    B, K, S, H = k_BKSH.shape
    dq, dk, dv = [], jnp.zeros((B, K, H, S), jnp.float32), jnp.zeros((B, K, v_BKSH.shape[-1], S), jnp.float32)
    for part, keys in _chunks(q_BKGTH.shape[3], S, form.window, aligned):
        q, do, k, v = q_BKGTH[:, :, :, part], do_BKGTH[:, :, :, part], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        s, slope_of_cap = logits(q, k, form, _at(where, part, keys), slopes)
        p = jnp.exp(s - lse_BKGT1[:, :, :, part])
        dp = jnp.einsum("BKMH,BKSH->BKMS", _flat(do), v, preferred_element_type=jnp.float32).reshape(p.shape)
        ds = p * (dp - delta_BKGT1[:, :, :, part])
        ds = _flat((ds if slope_of_cap is None else ds * slope_of_cap).astype(q.dtype))
        dq.append(_rows(jnp.einsum("BKMS,BKSH->BKMH", ds, k), p.shape))
        dk = dk.at[..., keys].add(jnp.einsum("BKMH,BKMS->BKHS", _flat(q), ds))
        dv = dv.at[..., keys].add(jnp.einsum("BKMH,BKMS->BKHS", _flat(do), _flat(p.astype(do.dtype))))
    return jnp.concatenate(dq, axis=3), dk.swapaxes(2, 3), dv.swapaxes(2, 3)


_blockwise.defvjp(_save, _backward)
