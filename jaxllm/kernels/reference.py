"""What attention computes: its types, and the equations with all logits in memory, which every kernel is held against.

It masks by segment, causal order and window, and knows soft-caps, ALiBi and attention sinks. Softmax is in float32.

Shapes: B batch, T query position, S key position, N query heads, K kv heads, G = N/K, H head dim.
Values and outputs may have another head dim than queries and keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

#: Name that rematerialisation knows the results of a kernel by: the output and what its backward pass needs beside it.
SAVED = "attention"
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
    s_BKGTS, _ = logits(q_BKGTH, k_BKSH, form, where, by_kv_head(heads.slopes_N, K))
    p_BKGTS, total, _ = exponentials(s_BKGTS, by_kv_head(heads.sinks_N, K))
    o_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", (p_BKGTS / total).astype(v_BKSH.dtype), v_BKSH)
    return o_BTKGH.reshape(B, T, N, -1)


def by_kv_head(x_N, K):
    return None if x_N is None else x_N.astype(jnp.float32).reshape(1, K, -1, 1, 1)


def logits(q_BKGTH, k_BKSH, form: Form, where: Where, slopes):
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


def exponentials(s_BKGTS, sinks):
    """Unnormalised probabilities, their sum and its log; a sink adds to the sum and gives no column."""
    m = jnp.max(s_BKGTS, axis=-1, keepdims=True)
    m = m if sinks is None else jnp.maximum(m, sinks)
    p = jnp.exp(s_BKGTS - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - m)
    return p, total, m + jnp.log(total)
