"""Ring attention on eight devices against the reference on one: windows, soft-caps, ALiBi, sinks, packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxllm.kernels.reference import Form, PerHead, Where, reference
from jaxllm.kernels.ring import ring
from jaxllm.sharding import ParallelConfig, make_sharding


@pytest.mark.parametrize(
    "T,ways,window,softcap,alibi,sinks,packed",
    [
        (48, 8, None, None, False, False, True),
        pytest.param(48, 4, 11, 3.0, True, True, True, marks=pytest.mark.slow),
        pytest.param(20, 4, None, None, False, True, False, marks=pytest.mark.slow),  # 20 is no multiple of 2 x 4
    ],
)
def test_ring_equals_reference(T, ways, window, softcap, alibi, sinks, packed):
    rng = np.random.default_rng(T)
    shapes = (2, T, 4, 8), (2, 2, T, 8), (2, 2, T, 8), (2, T, 4, 8)
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = np.ones((2, T), int)
    if packed:
        segments[0, T // 3 :], segments[1, T // 2 :] = 2, 0
    batch = tiny.packed(segments, segments)
    slopes = jnp.asarray(rng.uniform(0.01, 0.5, 4), jnp.float32) if alibi else None
    sink = jnp.asarray(rng.standard_normal(4), jnp.float32) if sinks else None
    form, ids = Form(0.7, window, softcap), batch.segments_BT if packed else None
    sharding = make_sharding(ParallelConfig(fsdp=1, context=ways), jax.devices()[:ways])
    local, halves = sharding.inside(), T % (2 * ways) == 0

    def on_a_device(q, k, v, do, sink, positions, ids):
        own = [None if x is None else local.part(x) for x in (positions, ids)]
        where = Where(own[0], own[0], own[1], own[1])
        f = lambda *x: ring(*x[:3], form, where, PerHead(slopes, x[3]), axis="context", halves=halves)  # noqa: E731
        out, pull = jax.vjp(f, local.part(q), local.part(k, 2), local.part(v, 2), sink)
        dq, dk, dv, ds = pull(local.part(do))
        ds = None if ds is None else jax.lax.psum(ds, "context")
        return local.whole(out), local.whole(dq), local.whole(dk, 2), local.whole(dv, 2), ds

    mapped = jax.shard_map(on_a_device, mesh=sharding.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = jax.jit(mapped)(q, k, v, do, sink, batch.positions_BT, ids)
    where = Where(batch.positions_BT, batch.positions_BT, ids, ids)
    out, pull = jax.vjp(lambda *x: reference(*x[:3], form, where, PerHead(slopes, x[3])), q, k, v, sink)
    assert tiny.worst(found, (out, *pull(do))) < 5e-6


@pytest.mark.parametrize("ways", [2, 8])
def test_each_device_has_as_much_to_see(ways):
    """The balanced order: pairs of (query, key) of each device are the same to within a piece."""
    T = 16 * ways
    order = make_sharding(ParallelConfig(fsdp=1, context=ways), jax.devices()[:ways]).order(T)
    assert sorted(order) == list(range(T))
    seen = (order + 1).reshape(ways, -1).sum(axis=1)
    assert seen.max() == seen.min()
