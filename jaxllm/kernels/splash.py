"""Splash attention: the Pallas kernels for TPU that come with JAX, forward and backward, under `jax.shard_map`.

Blocks above the diagonal and outside the window are never read. A packed row is masked by its segments; that key s
lies at index s of the same row as query s is what makes order by index and order by position the same.

Shapes: B batch, T position, N query heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.kernels.backend import platform
from jaxllm.kernels.reference import MASKED, NO_HEADS, SAVED, Form, PerHead, Where
from jaxllm.sharding import Sharding

#: Rows of queries and keys in a block, where the sequence has as many.
BLOCK = 512
LANES = 128


def splash(q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, sharding: Sharding):
    """`o_BTNH` of causal self-attention, each device by itself on its rows and heads. ALiBi is not known to it."""
    N, K = q_BTNH.shape[2], k_BKSH.shape[1]
    by_heads = sharding.activation(("batch", "heads", None, None), (q_BTNH.shape[0], N, 1, 1))
    by_kv_heads = sharding.activation(("batch", "kv_heads", None, None), (q_BTNH.shape[0], K, 1, 1))
    if by_heads != by_kv_heads:  # kv heads that every device holds: each query head takes its own along
        k_BKSH, v_BKSH = (jnp.repeat(x, N // K, axis=1) for x in (k_BKSH, v_BKSH))
    rows, sinks = PartitionSpec(by_heads[0], None), PartitionSpec(by_heads[1])
    arguments = [
        (q_BTNH.swapaxes(1, 2) * form.scale, by_heads),
        (k_BKSH, by_heads),
        (v_BKSH, by_heads),
        (where.q_segments_BT, rows),
        (heads.sinks_N, sinks),
    ]
    given = [(x, spec) for x, spec in arguments if x is not None]
    absent = [x is None for x, _ in arguments]

    def local(*xs):
        xs = iter(xs)
        return _on_a_device(form, *(None if gone else next(xs) for gone in absent))

    run = sharding.map(local, tuple(spec for _, spec in given), by_heads)
    return run(*(x for x, _ in given)).swapaxes(1, 2)


def _on_a_device(form: Form, q_BNTH, k_BKTH, v_BKTH, segments_BT, sinks_N):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    T = q_BNTH.shape[2]
    padded = -(-T // LANES) * LANES  # keys of the padding come after all real queries, and so are seen by none
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - T), (0, 0))) for x in (q_BNTH, k_BKTH, v_BKTH))
    kernel = _kernel(q.shape[1], padded, form.window, form.softcap, platform() == "cpu")
    if segments_BT is None:
        run = jax.vmap(lambda q, k, v: kernel(q, k, v, sinks=sinks_N))
        return run(q, k, v)[:, :, :T]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padded - T)), constant_values=-1)
    run = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=library.SegmentIds(s, s), sinks=sinks_N))
    return run(q, k, v, segments_BT)[:, :, :T]


def _kernel(heads: int, length: int, window: int | None, softcap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    one = masks.CausalMask((length, length))
    if window is not None:
        one = masks.LocalMask((length, length), (window - 1, 0), 0)
    size = next(n for n in range(min(BLOCK, length), 0, -LANES) if length % n == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    blocks = library.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), size))
    return library.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        mask_value=MASKED,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
