"""Attention by cuDNN against the reference, on a stand-in for cuDNN that takes what the real one takes.

The stand-in reads lengths and offsets as XLA hands them to cuDNN: R sequences, each from its offset in elements, none
longer than a row. What it gives for tokens of no sequence is NaN. Its attention is JAX's own in plain operations.
"""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.errors import SettingsError
from jaxllm.kernels import cudnn
from jaxllm.kernels.attention import Form, PerHead, Where, attention
from jaxllm.kernels.backend import tracing_for
from jaxllm.kernels.reference import reference
from jaxllm.sharding import ParallelConfig, Sharding, make_sharding

H = 8
AT = jnp.zeros((1, 256), jnp.int32)
PACKED = Where(AT, AT, AT, AT)


def sequences(x_BTNH, lengths, offsets):
    """`(x_RTNH, index_RT)`: the tokens of each sequence, or of each row; index U where there is none."""
    B, T, N, H = x_BTNH.shape
    R, at_T = lengths.size, jnp.arange(T)
    starts_R = offsets.reshape(-1)[:R] // (N * H) if offsets.ndim == 2 else jnp.arange(B) * T
    at_RT = jnp.where(at_T < lengths.reshape(R, 1), starts_R[:, None] + at_T, B * T)
    return x_BTNH.reshape(B * T, N, H).at[at_RT].get(mode="fill", fill_value=0), at_RT


def written(x_RTNH, at_RT, shape):
    tokens = jnp.full((shape[0] * shape[1], *shape[2:]), jnp.nan, x_RTNH.dtype)
    return tokens.at[at_RT].set(x_RTNH, mode="drop").reshape(shape)


def lengths_of(q, q_lengths, kv_lengths, q_offsets):
    return (q_lengths, kv_lengths) if q_offsets.ndim == 2 else [jnp.full(len(q), q.shape[1])] * 2


class Forward:
    @staticmethod
    def bind(q, k, v, _, q_lengths, kv_lengths, q_offsets, kv_offsets, *unused, is_training, mask_type, **settings):
        kind = "PADDING_CAUSAL" if q_offsets.ndim == 2 else "CAUSAL"
        assert is_training and mask_type == cudnn.fused_attention().MaskType[kind]
        q_lengths, kv_lengths = lengths_of(q, q_lengths, kv_lengths, q_offsets)
        q_rows, at = sequences(q, q_lengths, q_offsets)
        k_rows, v_rows = (sequences(x, kv_lengths, kv_offsets)[0] for x in (k, v))
        window = settings["sliding_window_length"]
        o, lse_RTN = jax.nn.dot_product_attention(
            q_rows,
            k_rows,
            v_rows,
            scale=settings["scale"],
            is_causal=True,
            query_seq_lengths=q_lengths.reshape(-1),
            key_value_seq_lengths=kv_lengths.reshape(-1),
            local_window_size=window and (window - 1, 0),
            implementation="xla",
            return_residual=True,
        )
        lse_RTN = jnp.where((at < q.shape[0] * q.shape[1])[..., None], lse_RTN, jnp.nan)
        return [written(o, at, q.shape), lse_RTN.swapaxes(1, 2)]


class Backward:
    @staticmethod
    def bind(q, k, v, _, q_lengths, kv_lengths, q_offsets, kv_offsets, *rest, mask_type, **settings):
        """From the log-sum-exp that it is given, which must be the forward pass's."""
        lse_RNT, o, do = rest[2:]
        q_lengths, kv_lengths = lengths_of(q, q_lengths, kv_lengths, q_offsets)
        (q_rows, at), (o, _), (do, _) = (sequences(x, q_lengths, q_offsets) for x in (q, o, do))
        (k_rows, at_kv), (v_rows, _) = (sequences(x, kv_lengths, kv_offsets) for x in (k, v))
        G, window, T = q.shape[2] // k.shape[2], settings["sliding_window_length"] or q.shape[1], jnp.arange(q.shape[1])
        k_all, v_all = (jnp.repeat(x, G, axis=2) for x in (k_rows, v_rows))
        distance = T[:, None] - T
        seen = (distance >= 0) & (distance < window) & (T[:, None] < q_lengths.reshape(-1, 1, 1, 1))
        s = settings["scale"] * jnp.einsum("RTNH,RSNH->RNTS", q_rows, k_all)
        p = jnp.where(seen, jnp.exp(s - lse_RNT[..., None]), 0)
        delta = jnp.einsum("RTNH,RTNH->RNT", do, o)[..., None]
        ds = settings["scale"] * p * (jnp.einsum("RTNH,RSNH->RNTS", do, v_all) - delta)
        dk, dv = jnp.einsum("RNTS,RTNH->RSNH", ds, q_rows), jnp.einsum("RNTS,RTNH->RSNH", p, do)
        dk, dv = (x.reshape(*x.shape[:2], -1, G, x.shape[-1]).sum(3) for x in (dk, dv))
        dq = jnp.einsum("RNTS,RSNH->RTNH", ds, k_all)
        return [written(dq, at, q.shape), written(dk, at_kv, k.shape), written(dv, at_kv, v.shape)]


@pytest.fixture
def stand_in(monkeypatch):
    real = cudnn.fused_attention()
    fake = types.SimpleNamespace(
        _dot_product_attention_fwd_p=Forward,
        _dot_product_attention_bwd_p=Backward,
        _dot_product_attention_fwd_cuda_lowering=real._dot_product_attention_fwd_cuda_lowering,
        MaskType=real.MaskType,
        AttentionLayout=real.AttentionLayout,
    )
    monkeypatch.setattr(cudnn, "fused_attention", lambda: fake)
    monkeypatch.setattr(cudnn, "SHORT", 16)


def documents(kind, T, rng):
    """Lengths of the documents of a row."""
    fixed = {"one": [T], "single tokens": [1] * T, "halves": [T // 2, T - T // 2]}
    if kind in fixed:
        return fixed[kind]
    found = []
    while sum(found) < T:
        found.append(int(rng.integers(1, T // 2) if rng.random() < 0.3 else rng.integers(1, 6)))
    return [*found[:-1], T - sum(found[:-1])]


def inputs(kinds, T, N, K):
    """Rows of such documents, the last fifth of the last row padding, whose outputs have no gradient."""
    rng, B = np.random.default_rng(T + N), len(kinds)
    sizes = ((B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H))
    q, k, v, do = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
    segments = np.stack([np.repeat(np.arange(len(n)) + 1, n) for n in (documents(kind, T, rng) for kind in kinds)])
    segments[-1, T - T // 5 :] = 0
    positions = tiny.packed(segments, segments).positions_BT
    do = do * (segments > 0)[:, :, None, None]
    return (q, k, v), do, Where(positions, positions, *[jnp.asarray(segments)] * 2)


@functools.partial(jax.jit, static_argnums=0)
def run(f, args, do, where):
    """Outputs of real tokens, and gradients."""
    out, pull = jax.vjp(lambda *args: f(*args, where=where), *args)
    return jnp.where(do == 0, 0, out), pull(do)


def error(args, do, where, form, sharding=None):
    """The largest difference to the reference, of its largest entry."""
    got = run(functools.partial(cudnn.cudnn, form=form, sharding=sharding), args, do, where)
    return tiny.worst(got, run(functools.partial(reference, form=form), args, do, where))


@pytest.mark.parametrize(
    "kinds, T, N, K, window",
    [
        (("one", "one"), 96, 2, 2, None),
        (("mixed", "mixed", "mixed"), 96, 4, 2, None),
        (("mixed", "one", "halves"), 96, 4, 1, 7),
        (("single tokens", "mixed"), 128, 2, 1, None),  # more of the shortest level than places: several turns
        (("mixed", "halves"), 75, 4, 2, 20),  # an odd number of tokens: a single level
    ],
)
def test_packed_rows_are_the_references(stand_in, kinds, T, N, K, window):
    assert error(*inputs(kinds, T, N, K), Form(0.35, window)) < 5e-6


@pytest.mark.parametrize("window", [None, 9])
def test_a_prompt_with_padding_is_the_references(stand_in, window):
    """Positions of -1 at the end of a row, no segments: real tokens see nothing of it."""
    args, do, _ = inputs(("one", "one"), 40, 4, 2)
    positions = jnp.where(jnp.arange(40) < jnp.asarray([40, 23])[:, None], jnp.arange(40), -1)
    do = do * (positions >= 0)[:, :, None, None]
    assert error(args, do, Where(positions, positions), Form(0.35, window)) < 5e-6


def test_each_device_takes_its_own_rows_and_heads(stand_in):
    """On 4 x 2 devices, both of the tensor axis with the same kv head."""
    sharding = make_sharding(ParallelConfig(fsdp=4, tensor=2, rules={"kv_heads": None}))
    assert error(*inputs(("mixed", "one", "halves", "mixed"), 96, 4, 1), Form(0.35), sharding) < 5e-6


def lowered(f, *args):
    """The program for CUDA, which JAX writes without a GPU or its libraries."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shapes(B, T, N, K, H):
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, T, N, H), (B, K, T, H)))
    return q, k, k, jax.ShapeDtypeStruct((B, T), jnp.int32)


@pytest.mark.parametrize("packed", [False, True])
def test_rematerialisation_that_keeps_attention_keeps_all_of_it(packed):
    """Else the backward pass would run the forward kernel once more."""

    def step(policy, q, k, v, s):
        where = Where(s, s, s, s) if packed else Where(s, s)
        kept = jax.checkpoint(lambda *args: cudnn.cudnn(*args, Form(0.1), where), policy=policy)
        out, pull = jax.vjp(kept, q, k, v)
        return out, pull(q)

    for name, runs in {"attention": 1, "nothing": 2}.items():
        policy = jax.checkpoint_policies.save_only_these_names(name)
        text = lowered(functools.partial(step, policy), *shapes(1, 512, 2, 2, 64))
        assert text.count("@__cudnn$fmhaSoftmax(") == runs


@pytest.mark.fast
def test_jax_makes_cudnns_calls_of_it_and_no_array_of_T_by_T():
    """Levels of 2048 and 1024 tokens, both directions."""
    q, *_ = args = shapes(2, 2048, 8, 2, 64)

    def step(q, k, v, s):
        return jax.vjp(lambda *args: cudnn.cudnn(*args, Form(0.1, 100), Where(s, s, s, s)), q, k, v)[1](q)

    text = lowered(step, *args)
    assert [text.count(f"@__cudnn$fmhaSoftmax{way}(") for way in ("", "Backward")] == [2, 2]
    plain = text.replace("\\22", "")
    for setting in ("mask_type: PADDING_CAUSAL", "sliding_window_length: 100", "max_seg_per_batch: 2,"):
        assert plain.count(setting) == 4
    # Four places of 2048 tokens, then eight of 1024 in the same tokens as four rows: 8192 tokens of workspace each.
    assert "tensor<4x8x2048xf32>" in text and "tensor<8x8x1024xf32>" in text
    sizes = [math.prod(map(int, dims.rstrip("x").split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)", text)]
    assert max(sizes) == q.size < 2048 * 2048 * 2


def choose(kind="cudnn", form=None, where=None, heads=None, dtype=jnp.bfloat16, H=64, width=None, sharding=None):
    """Traces attention of 256 tokens as for a GPU."""
    form, where, heads, width = form or Form(0.3), where or Where(AT, AT), heads or PerHead(), width or H
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 256, 2, H), (1, 2, 256, H), (1, 2, 256, width)))
    with tracing_for("gpu"):
        attend = functools.partial(attention, form=form, where=where, heads=heads, kind=kind, sharding=sharding)
        return jax.eval_shape(attend, q, k, v)


@dataclasses.dataclass(frozen=True)
class Gpu:
    compute_capability: str


def on(capability):
    """A mesh of one such GPU, as far as the choice looks at it."""
    return Sharding(types.SimpleNamespace(devices=np.array([Gpu(capability)], object), shape={"context": 1}))


@pytest.mark.parametrize(
    "asked, says",
    [
        (dict(form=Form(0.3, softcap=50.0)), "no soft-cap, and this attention has 50.0"),
        (dict(heads=PerHead(slopes_N=jnp.ones(2))), "no ALiBi"),
        (dict(heads=PerHead(sinks_N=jnp.ones(2))), "no attention sinks"),
        (dict(dtype=jnp.float32), "computes in bfloat16 or float16, and this is float32"),
        (dict(H=320), "up to 256 dimensions, and these have 320"),
        (dict(H=60), "a multiple of 8 .* these have 60"),
        (dict(width=32), "values as wide as keys, and they have 32 and 64"),
        (dict(H=192, sharding=on("8.0")), "up to 128 dimensions, and these have 192"),
        (dict(where=PACKED, sharding=on("8.6")), "compute capability 9.0 or later, and this has 8.6"),
        (dict(sharding=on("gfx942")), "for NVIDIA GPUs"),
    ],
)
def test_what_cudnn_lacks_is_refused_where_forced_and_else_left_to_another_kernel(asked, says, monkeypatch):
    with pytest.raises(SettingsError, match=f"kernels.attention=cudnn: .*{says}.*set kernels.attention=auto"):
        choose(**asked)
    monkeypatch.setattr("jaxllm.kernels.attention.cudnn", None)
    choose(kind="auto", **asked)


def test_auto_is_cudnn_on_gpu_and_elsewhere_it_is_refused(monkeypatch):
    used = []
    monkeypatch.setattr("jaxllm.kernels.attention.cudnn", lambda q, *_, **__: used.append(1) or q)
    for asked in (dict(), dict(where=PACKED), dict(where=PACKED, sharding=on("9.0")), dict(sharding=on("8.0"))):
        choose(kind="auto", **asked)
    assert len(used) == 4
    with pytest.raises(SettingsError, match="kernels.attention=cudnn is for GPU, and this mesh is of cpu"):
        attention(*[jnp.zeros((1, 1, 1, 8))] * 3, Form(1.0), Where(AT, AT), kind="cudnn")
    with pytest.raises(SettingsError, match="kernels.attention=splash is for TPU, and this mesh is of gpu"):
        choose(kind="splash")


def test_more_elements_than_offsets_can_count_are_refused():
    def attend(q, k, v, s):
        return cudnn.cudnn(q, k, v, Form(0.1), Where(s, s, s, s))

    with pytest.raises(SettingsError, match="524288 packed tokens a device x 64 heads x 64 do not fit"):
        jax.eval_shape(attend, *shapes(512, 1024, 64, 8, 64))
