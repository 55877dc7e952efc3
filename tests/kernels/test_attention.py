"""Blockwise attention against the reference, and the reference against a loop over queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.kernels.attention import Form, PerHead, Where, attention
from jaxllm.sharding import ParallelConfig, make_sharding

H = 8
#: T, query heads, kv heads, window, softcap, ALiBi, sinks, packed
CASES = [
    (1, 2, 2, None, None, False, False, False),
    (5, 4, 2, None, None, False, True, True),
    (128, 2, 1, None, 3.0, False, False, True),
    (300, 4, 2, None, 3.0, True, True, True),
    (300, 4, 1, 40, None, False, True, True),
    (300, 2, 2, 200, 3.0, True, False, False),
    (300, 4, 2, 1, None, False, True, False),
]


def inputs(T, N, K, alibi, sinks, packed, dtype=np.float32):
    rng = np.random.default_rng(T + N + K)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((2, T, N, H), (2, K, T, H), (2, K, T, H), (2, T, N, H))
    )
    segments = np.ones((2, T), int)
    if packed:
        segments[0, T // 3 :] = 2
        segments[1, T // 2 : T - T // 9] = 2
        segments[1, T - T // 9 :] = 0
    positions = tiny.packed(segments, segments).positions_BT
    slopes = jnp.asarray(rng.uniform(0.01, 0.5, N), np.float32) if alibi else None
    sink = jnp.asarray(rng.standard_normal(N), np.float32) if sinks else None
    return (q, k, v, sink), do, slopes, Where(positions, positions, *[jnp.asarray(segments) if packed else None] * 2)


@functools.partial(jax.jit, static_argnames=("form", "kind"))
def output_and_gradients(args, do, slopes, where, form, kind):
    def f(q, k, v, sinks):
        return attention(q, k, v, form, where, PerHead(slopes, sinks), kind=kind)

    out, pull = jax.vjp(f, *args)
    return out, pull(do)


@pytest.mark.parametrize("T,N,K,window,softcap,alibi,sinks,packed", CASES)
def test_blockwise_equals_reference(T, N, K, window, softcap, alibi, sinks, packed):
    args, do, slopes, where = inputs(T, N, K, alibi, sinks, packed)
    form = Form(0.7, window, softcap)
    expected, expected_gradients = output_and_gradients(args, do, slopes, where, form, "reference")
    out, gradients = output_and_gradients(args, do, slopes, where, form, "blockwise")
    assert tiny.relative(out, expected) < 1e-6
    assert tiny.worst(gradients, expected_gradients) < 5e-6


@pytest.mark.parametrize("width", [3, 11])
def test_values_may_have_another_width_than_keys(width):
    """Blockwise equals the reference, and column by column both equal what square values give."""
    (q, k, v, sinks), do, slopes, where = inputs(300, 4, 2, True, True, True)
    v, do = (jnp.concatenate([x, 0.5 - x], axis=-1)[..., :width] for x in (v, do))
    form, got = Form(0.7, 40, 3.0), {}
    for kind in ("reference", "blockwise"):
        got[kind] = output_and_gradients((q, k, v, sinks), do, slopes, where, form, kind)
        square = (q, k, jnp.tile(v[..., :1], H), sinks), jnp.tile(do[..., :1], H), slopes, where
        first = output_and_gradients(*square, form, kind)
        assert got[kind][0].shape == do.shape
        assert tiny.relative(got[kind][0][..., 0], first[0][..., 0]) < 1e-6
        assert tiny.relative(got[kind][1][2][..., 0], first[1][2][..., 0]) < 1e-6
    assert tiny.worst(got["blockwise"], got["reference"]) < 5e-6


@pytest.mark.fast
def test_blockwise_in_bfloat16_stays_near_float32():
    """Rounding of inputs and outputs to 8 bits: within 2 % of the largest entry, sums in float32."""
    args, do, slopes, where = inputs(300, 4, 2, False, True, True)
    form = Form(0.35, 100, None)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (args[:3], do))
    expected = output_and_gradients(args, do, slopes, where, form, "reference")
    out, gradients = output_and_gradients((*half[0], args[3]), half[1], slopes, where, form, "blockwise")
    assert out.dtype == jnp.bfloat16 and gradients[0].dtype == jnp.bfloat16 and gradients[3].dtype == jnp.float32
    assert tiny.worst((out, gradients), expected) < 0.02


@pytest.mark.parametrize("kind", ["reference", "blockwise"])
def test_attention_equals_a_loop(kind):
    """Also pins what a window of w means: w positions, the query's own included."""
    (q, k, v, sinks), do, slopes, where = inputs(9, 4, 2, True, True, True)
    out = attention(q, k, v, Form(0.7, 3, 2.0), where, PerHead(slopes, sinks), kind=kind)
    q, k, v, sinks, slopes, positions, segments = (
        np.asarray(x, np.float64) for x in (q, k, v, sinks, slopes, where[0], where[2])
    )
    for b, t, n in np.ndindex(2, 9, 4):
        seen = [s for s in range(9) if segments[b, s] == segments[b, t] and 0 <= positions[b, t] - positions[b, s] < 3]
        distance = positions[b, t] - positions[b, seen]
        logits = 2.0 * np.tanh(0.7 * k[b, n // 2, seen] @ q[b, t, n] / 2.0) - slopes[n] * distance
        p = np.exp(logits)
        np.testing.assert_allclose(
            out[b, t, n], p @ v[b, n // 2, seen] / (p.sum() + np.exp(sinks[n])), rtol=2e-5, atol=1e-6
        )


def test_blockwise_never_holds_all_logits():
    """The largest array of a forward and backward pass at T=1024: a chunk of 128 queries, not T by T."""
    args, do, slopes, where = inputs(1024, 2, 2, False, False, False)
    sizes = {}
    for kind in ("reference", "blockwise"):
        jaxpr = output_and_gradients.trace(args, do, slopes, where, Form(1.0), kind).jaxpr
        sizes[kind] = max(aval.size for aval in tiny.arrays(jaxpr))
    assert sizes["reference"] == 2 * 2 * 1024 * 1024
    assert sizes["blockwise"] == 2 * 2 * 128 * 1024


@pytest.mark.parametrize("kind", ["reference", "blockwise"])
def test_a_query_that_sees_nothing_gives_numbers(kind):
    args, do, slopes, where = inputs(5, 2, 2, False, False, False)
    where = Where(jnp.full((2, 5), -1), jnp.full((2, 5), -1))
    out, gradients = output_and_gradients(args, jnp.zeros_like(do), slopes, where, Form(1.0), kind)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((out, gradients)))


def test_a_forced_kernel_gives_way_where_rows_are_split_and_no_step_runs():
    """Self-checks look at whole rows from outside; the step's own kernel needs a device's part of them."""
    (q, k, v, _), _, _, where = inputs(8, 2, 1, False, False, False)
    sharding = make_sharding(ParallelConfig(fsdp=4, context=2))
    form = Form(0.7, None, None)
    out = attention(q, k, v, form, where, kind="blockwise", sharding=sharding)
    np.testing.assert_array_equal(out, attention(q, k, v, form, where, kind="reference"))
