"""Splash attention: the Pallas kernels for TPU that come with JAX, forward and backward, on each device by itself.

Blocks above the diagonal and outside the window are never read. A packed row is masked by its segments; that key s
lies at index s of the same row as query s is what makes order by index and order by position the same.

Shapes: B batch, T query position, S key position, N query heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxllm.kernels.backend import platform
from jaxllm.kernels.reference import MASKED, NO_HEADS, SAVED, Form, PerHead, Where
from jaxllm.sharding import Sharding

#: Rows of queries and keys in a block, where the sequence has as many.
BLOCK = 512
LANES = 128


def splash(
    q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, sharding: Sharding, parts: int = 1
):
    """`o_BTNH` of causal self-attention, each device by itself on its rows and heads. ALiBi is not known to it.

    parts: into how many the queries of a row are split over devices that have all its keys (`Sharding.whole`).
    """
    N, K = q_BTNH.shape[2], k_BKSH.shape[1]
    by_heads = sharding.activation(("batch", "heads", None, None), (q_BTNH.shape[0], N, 1, 1))
    by_kv_heads = sharding.activation(("batch", "kv_heads", None, None), (q_BTNH.shape[0], K, 1, 1))
    if by_heads != by_kv_heads:  # kv heads that every device holds: each query head takes its own along
        k_BKSH, v_BKSH = (jnp.repeat(x, N // K, axis=1) for x in (k_BKSH, v_BKSH))
    rows, sinks = PartitionSpec(by_heads[0], None), PartitionSpec(by_heads[1])
    q_segments, k_segments = _segments(where)
    arguments = [
        (q_BTNH.swapaxes(1, 2) * form.scale, by_heads),
        (k_BKSH, by_heads),
        (v_BKSH, by_heads),
        (q_segments, rows),
        (k_segments, rows),
        (heads.sinks_N, sinks),
    ]
    given = [(x, spec) for x, spec in arguments if x is not None]
    # An argument, since the map within sees another mesh, under which no array of this one may be closed over.
    part = jax.lax.axis_index("context") if parts > 1 else jnp.int32(0)

    def local(part, *xs):
        xs = iter(xs)
        return _on_a_device(form, sharding, parts, part, *(None if x is None else next(xs) for x, _ in arguments))

    run = sharding.map(local, (PartitionSpec(), *(spec for _, spec in given)), by_heads)
    return run(part, *(x for x, _ in given)).swapaxes(1, 2)


def _segments(where: Where):
    """Segments of queries and keys; without them, what is padding (position -1) is one of its own."""
    if where.q_segments_BT is not None:
        return where.q_segments_BT, where.k_segments_BS
    return tuple((x >= 0).astype(jnp.int32) for x in (where.q_positions_BT, where.k_positions_BS))


def _on_a_device(form, sharding, parts, part, q_BNTH, k_BKSH, v_BKSH, q_segments_BT, k_segments_BS, sinks_N):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    T = q_BNTH.shape[2]
    padded = T if parts > 1 else -(-T // LANES) * LANES  # keys of the padding come last, and so are seen by no query
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - T), (0, 0))) for x in (q_BNTH, k_BKSH, v_BKSH))
    q_segments, k_segments = (
        jnp.pad(x, ((0, 0), (0, padded - T)), constant_values=-1) for x in (q_segments_BT, k_segments_BS)
    )
    kernel = _kernel(q.shape[1], sharding.order(padded * parts) if parts > 1 else np.arange(padded), form, parts)
    if parts > 1:
        kernel = jax.tree.map(lambda x: _own(x, parts, part), kernel)
    run = jax.vmap(lambda q, k, v, s, t: kernel(q, k, v, segment_ids=library.SegmentIds(s, t), sinks=sinks_N))
    return run(q, k, v, q_segments, k_segments)[:, :, :T]


def _own(x, parts: int, part):
    """This device's part of what a kernel knows of its mask: by blocks of queries, or by queries."""
    dim = min(1, x.ndim - 1)
    size = x.shape[dim] // parts
    return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis=dim)


def fits(length: int, parts: int) -> bool:
    """Whether rows of so many tokens can be split so: a block holds queries that follow each other."""
    return length % (2 * parts * LANES) == 0


def _kernel(heads: int, order: np.ndarray, form: Form, parts: int):
    """The kernel for queries in this order of their places in the row, against keys in natural order."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    run = len(order) // (2 * parts) if parts > 1 else len(order)
    size = next(n for n in range(min(BLOCK, run), 0, -LANES) if run % n == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    blocks = library.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), size))
    return library.make_splash_mha(
        masks.MultiHeadMask([_mask(order, form.window)] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts,
        mask_value=MASKED,
        attn_logits_soft_cap=form.softcap,
        residual_checkpoint_name=SAVED,
        interpret=platform() == "cpu",
    )


def _mask(order: np.ndarray, window: int | None):
    """Causal, and within the window. The kernel computes it; the library asks here only which blocks it concerns."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def seen(q, k):
        return q >= k if window is None else (q >= k) & (q - k < window)

    class Order(masks.Mask):
        shape = (len(order), len(order))
        q_sequence = order.astype(np.int32)
        mask_function = staticmethod(seen)

        def __getitem__(self, block):
            """`[any, all]` of a block, instead of its entries: at 128k tokens those take half a minute."""
            q, k = (range(size)[part] for size, part in zip(self.shape, block, strict=True))
            first, last = int(order[q[0]]), int(order[q[-1]])
            some = last >= k[0] and (window is None or first - k[-1] < window)
            every = first >= k[-1] and (window is None or last - k[0] < window)
            return np.array([some, every])

        def __eq__(self, other):
            return self is other

        def __hash__(self):
            return id(self)

    return Order()
