"""cuDNN's fused attention for NVIDIA GPUs, forward and backward, each device by itself on its rows and heads.

The documents of packed rows reach cuDNN as sequences of their own, by offsets and lengths. A mask would be T by T, and
cuDNN would go over all of it. cuDNN's workspace is as if each sequence had the longest one's length, so sequences are
taken in levels, of (T/2, T] tokens, (T/4, T/2], ...: each has at most two tokens of workspace for one of the rows.

`jax.nn.dot_product_attention` has no offsets, keeps the log-sum-exp from rematerialisation, and asks the GPU of this
process what it can do; so what it calls is called here.

Shapes: B batch, T position, N query heads, K kv heads, H head dim; U all tokens of a device's rows, L tokens of the
longest sequence of a level, R places for sequences, all of one call.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm.errors import SettingsError
from jaxllm.kernels.reference import NO_HEADS, SAVED, Form, PerHead, Where
from jaxllm.sharding import Sharding

#: Sequences of up to this many tokens are one level; there may be more of them than places, and they take turns.
SHORT = 1024
HALVES = ("bfloat16", "float16")


def lacks(q_BTNH, v_BKSH, form: Form, where: Where, heads: PerHead, sharding: Sharding | None) -> str | None:
    """What cuDNN, or JAX's way to it, does not have of this attention, as the end of a sentence; None if nothing."""
    H, capability = q_BTNH.shape[-1], _capability(sharding)
    widest = 256 if capability >= 9 else 128
    packed = where.q_segments_BT is not None
    missing = {
        "cuDNN is for NVIDIA GPUs, and this is none": not capability,
        f"cuDNN computes in bfloat16 or float16, and this is {q_BTNH.dtype} (model.dtype)": q_BTNH.dtype not in HALVES,
        f"cuDNN has no soft-cap, and this attention has {form.softcap}": form.softcap is not None,
        "cuDNN has no ALiBi": heads.slopes_N is not None,
        "cuDNN has no attention sinks": heads.sinks_N is not None,
        f"cuDNN wants heads of a multiple of 8 and up to {widest} dimensions, and these have {H}": H % 8 or H > widest,
        f"cuDNN wants values as wide as keys, and they have {v_BKSH.shape[-1]} and {H} dimensions": (
            v_BKSH.shape[-1] != H
        ),
        f"packed rows need a GPU of compute capability 9.0 or later, and this has {capability}": (
            packed and capability < 9
        ),
    }
    return next((reason for reason, holds in missing.items() if holds), None)


def _capability(sharding: Sharding | None) -> float:
    """CUDA's compute capability, such as 9.0; 0 for GPUs of others, infinite for ones that are absent."""
    device = sharding.mesh.devices.flat[0] if sharding else jax.local_devices()[0]
    try:
        return float(getattr(device, "compute_capability", "inf"))
    except ValueError:  # AMD's are words
        return 0


def cudnn(
    q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead = NO_HEADS, *, sharding: Sharding | None = None
) -> jax.Array:
    """`o_BTNH` of causal self-attention; key s lies at index s of the same row as query s.

    The tokens of a segment stand together, as packing puts them. A padding of position -1 comes after all other tokens
    of its row, so that none of them sees it.
    """
    assert heads == NO_HEADS and form.softcap is None, "see lacks"
    N, K = q_BTNH.shape[2], k_BKSH.shape[1]
    arguments = [q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2), where.q_segments_BT]
    if sharding is None:
        return _attention(form, *arguments)
    by_heads, by_kv_heads = (
        sharding.activation(("batch", None, axis, None), (q_BTNH.shape[0], 1, n, 1))
        for axis, n in (("heads", N), ("kv_heads", K))
    )
    if by_heads != by_kv_heads:  # kv heads that every device holds: each query head takes its own along
        arguments[1:3] = [jnp.repeat(x, N // K, axis=2) for x in arguments[1:3]]
    specs = [by_heads] * 3 + [PartitionSpec(by_heads[0], None)] * (where.q_segments_BT is not None)
    run = sharding.map(lambda q, k, v, s=None: _attention(form, q, k, v, s), tuple(specs), by_heads)
    return run(*arguments[: len(specs)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: Form, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    return _compute(form, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _save(form, q, k, v, segments):
    o, lse = (checkpoint_name(x, SAVED) for x in _compute(form, q, k, v, segments))
    return o, (q, k, v, segments, o, lse)


def _compute(form, q, k, v, segments_BT):
    """`(o_BTNH, lse)`, the logarithms `[B, N, T]`, or `[U, N]` of packed rows."""
    if segments_BT is None:
        return kernel(q, k, v, None, None, form)
    U = segments_BT.size
    out = jnp.zeros((U, *q.shape[2:]), q.dtype), jnp.zeros((U, q.shape[2]), jnp.float32)
    for level in levels(segments_BT):

        def add(turn, out, level=level):
            now = level.turn(turn)
            o, lse_RNL = kernel(*map(level.rows, (q, k, v)), now.lengths_R, now.starts_R, form)
            lse_UN = lse_RNL[now.place_U, :, level.within_U]
            return now.put(out[0], o.reshape(out[0].shape)), now.put(out[1], lse_UN)

        out = jax.lax.fori_loop(0, level.turns, add, out)
    return out[0].reshape(q.shape), out[1]


def _backward(form, saved, do_BTNH):
    q, k, v, segments_BT, o, lse = saved
    if segments_BT is None:
        return *kernel_backward(q, k, v, o, do_BTNH, lse, None, None, form), None
    out = tuple(jnp.zeros((segments_BT.size, *x.shape[2:]), x.dtype) for x in (q, k, v))
    for level in levels(segments_BT):

        def add(turn, out, level=level):
            now = level.turn(turn)
            at_RL = now.starts_R[:, None] + jnp.arange(level.longest)
            lse_RNL = lse.at[at_RL].get(mode="clip").swapaxes(1, 2)
            rows = map(level.rows, (q, k, v, o, do_BTNH))
            made = kernel_backward(*rows, lse_RNL, now.lengths_R, now.starts_R, form)
            return tuple(now.put(old, new.reshape(old.shape)) for old, new in zip(out, made, strict=True))

        out = jax.lax.fori_loop(0, level.turns, add, out)
    return *(d.reshape(x.shape) for d, x in zip(out, (q, k, v), strict=True)), None


_attention.defvjp(_save, _backward)


class Turn(NamedTuple):
    """The sequences of one call: where they are, and which tokens are theirs. cuDNN leaves the others unwritten."""

    starts_R: jax.Array
    """Index of the first token among all of the device; U for a place that is not taken."""
    lengths_R: jax.Array
    mine_U: jax.Array
    place_U: jax.Array

    def put(self, old_U, new_U):
        return jnp.where(self.mine_U.reshape(-1, *[1] * (old_U.ndim - 1)), new_U, old_U)


class Level(NamedTuple):
    """Sequences of a range of lengths among the rows of a device, in turns of as many as there are places."""

    longest: int
    places: int
    start_U: jax.Array
    """Index of the first token of each token's sequence."""
    length_U: jax.Array
    """Of each token's sequence."""
    number_U: jax.Array
    """Of each token's sequence in this level; -1 in another one."""

    @property
    def turns(self) -> jax.Array:
        return (jnp.max(self.number_U) + self.places) // self.places

    @property
    def within_U(self) -> jax.Array:
        """Index of each token in its sequence, if that is of this level."""
        return jnp.minimum(jnp.arange(self.start_U.size) - self.start_U, self.longest - 1)

    def rows(self, x_BTNH: jax.Array) -> jax.Array:
        """The same tokens as rows of the longest sequence: cuDNN takes that length from their shape."""
        return x_BTNH.reshape(-1, self.longest, *x_BTNH.shape[2:])

    def turn(self, turn: jax.Array) -> Turn:
        at_U, U = jnp.arange(self.start_U.size), self.start_U.size
        mine_U, place_U = self.number_U // self.places == turn, self.number_U % self.places
        first_U = jnp.where(mine_U & (self.start_U == at_U), place_U, self.places)
        starts_R = jnp.full(self.places, U).at[first_U].set(at_U, mode="drop")
        return Turn(starts_R, self.length_U.at[starts_R].get(mode="fill", fill_value=0), mine_U, place_U)


def levels(segments_BT: jax.Array) -> list[Level]:
    """The sequences of packed rows by length: runs of tokens of one segment, padding being one too."""
    T, U = segments_BT.shape[1], segments_BT.size
    at_U = jnp.arange(U)
    new_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first_U = new_BT.reshape(U)
    start_U = jax.lax.cummax(jnp.where(first_U, at_U, 0))
    next_U = jax.lax.cummin(jnp.where(first_U, at_U, U), reverse=True)  # the first start at or after a token
    length_U = jnp.append(next_U[1:], U) - start_U
    found, last = [], False
    while not last:
        last = T <= SHORT or T % 2 == 1
        ours_U = (length_U <= T) & (length_U > (0 if last else T // 2))
        number_U = jnp.where(ours_U, jnp.cumsum(ours_U & first_U) - 1, -1)
        found.append(Level(T, 2 * (U // T), start_U, length_U, number_U))
        T //= 2
    return found


def kernel(q_BTNH, k_BTKH, v_BTKH, lengths_R, starts_R, form: Form):
    """`(o_BTNH, lse)` by cuDNN; of sequences at the starts among all tokens if there are any, else of rows.

    lse is `[B, N, T]`, or `[R, N, T]` of sequences. Tokens of no sequence are not written.
    """
    operands, settings = _call(q_BTNH, k_BTKH, lengths_R, starts_R, form)
    made = fused_attention()._dot_product_attention_fwd_p.bind(
        q_BTNH, k_BTKH, v_BTKH, *operands, **settings, is_training=True
    )
    return tuple(made)


def kernel_backward(q_BTNH, k_BTKH, v_BTKH, o_BTNH, do_BTNH, lse, lengths_R, starts_R, form: Form):
    """`(dq, dk, dv)` by cuDNN, with the log-sum-exp that `kernel` gave."""
    operands, settings = _call(q_BTNH, k_BTKH, lengths_R, starts_R, form)
    saved = (lse, o_BTNH, do_BTNH.astype(q_BTNH.dtype))
    return fused_attention()._dot_product_attention_bwd_p.bind(q_BTNH, k_BTKH, v_BTKH, *operands, *saved, **settings)[
        :3
    ]


def _call(q_BTNH, k_BTKH, lengths_R, starts_R, form: Form):
    """Operands and settings that both directions have."""
    library = fused_attention()
    unused = jnp.zeros(0, q_BTNH.dtype)
    packed, kind = [unused] * 4, library.MaskType.CAUSAL
    if starts_R is not None:
        packed, kind = _packed(q_BTNH, k_BTKH, lengths_R, starts_R), library.MaskType.PADDING_CAUSAL
    settings = dict(
        scale=form.scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=kind,
        layout=library.AttentionLayout.BTNH.value,
        sliding_window_length=form.window,
    )
    if "score_mod_name" in inspect.signature(library._dot_product_attention_fwd_cuda_lowering).parameters:
        settings |= dict(score_mod_name=None, score_mod_jaxpr=None)  # jax 0.11 and later
    return (unused, *packed, unused, unused), settings


def _packed(q_BTNH, k_BTKH, lengths_R, starts_R):
    """Lengths `[B, M]` and offsets `[B, M + 1]`, in elements, for M places a row. cuDNN reads the first R + 1."""
    rows, tokens = len(q_BTNH), q_BTNH.shape[0] * q_BTNH.shape[1]
    if tokens * q_BTNH.shape[2] * q_BTNH.shape[3] >= 2**31:
        raise SettingsError(
            f"kernels.attention=cudnn: {tokens} packed tokens a device x {q_BTNH.shape[2]} heads x {q_BTNH.shape[3]} "
            "do not fit its 32-bit offsets; set fewer rows a device (train.accumulate), or kernels.attention=blockwise"
        )
    lengths = lengths_R.astype(jnp.int32).reshape(rows, -1)
    places = lengths.shape[1]
    ends = jnp.full(rows * (places + 1) - len(starts_R), tokens)
    starts = jnp.append(starts_R, ends).astype(jnp.int32).reshape(rows, places + 1)
    by_q, by_kv = (starts * (x.shape[2] * x.shape[3]) for x in (q_BTNH, k_BTKH))
    return [lengths, lengths, by_q, by_kv]


def fused_attention():
    """JAX's own functions for cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
