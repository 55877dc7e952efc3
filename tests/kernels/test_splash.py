"""The TPU kernel, interpreted on CPU, against the reference; its masks by block; queries split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxllm.kernels.reference import Form, PerHead, Where, reference
from jaxllm.kernels.splash import _mask, fits, splash
from jaxllm.sharding import ParallelConfig, make_sharding

H = 128


def inputs(T: int, sinks: bool, packed: bool):
    rng = np.random.default_rng(T)
    shapes = (1, T, 2, H), (1, 1, T, H), (1, 1, T, H), (1, T, 2, H)
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32) for shape in shapes)
    segments = np.ones((1, T), int)
    if packed:
        segments[:, T // 3 :], segments[:, -T // 5 :] = 2, 0
    where = tiny.packed(segments, segments)
    sink = jnp.asarray([0.3, -0.5]) if sinks else None
    ids = [where.segments_BT if packed else None] * 2
    return (q, k, v, sink), do, Where(where.positions_BT, where.positions_BT, *ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "T,window,softcap,sinks,packed",
    [(256, None, None, False, True), (200, None, None, False, False), (256, 70, 3.0, True, True)],
)
def test_splash_equals_reference(T, window, softcap, sinks, packed):
    """200: rows are padded to whole blocks. Rows of padding (segment 0) see each other, as in the reference."""
    args, do, where = inputs(T, sinks, packed)
    form, sharding = Form(0.09, window, softcap), make_sharding(devices=jax.devices()[:1])
    got = {}
    for name, f in {"splash": splash, "reference": reference}.items():
        more = {"sharding": sharding} if name == "splash" else {}
        run = lambda q, k, v, s: f(q, k, v, form, where, PerHead(None, s), **more)  # noqa: B023, E731
        out, pull = jax.jit(lambda *args: jax.vjp(run, *args))(*args)  # noqa: B023
        got[name] = out, pull(do)
    assert tiny.worst(got["splash"], got["reference"]) < 2e-5


@pytest.mark.parametrize("window", [None, 1, 5, 17])
@pytest.mark.parametrize("parts", [1, 4])
def test_blocks_of_a_mask_are_what_their_entries_say(parts, window):
    order = (
        np.arange(64) if parts == 1 else make_sharding(ParallelConfig(fsdp=1, context=4), jax.devices()[:4]).order(64)
    )
    mask, size = _mask(order, window), 8
    distance = order[:, None] - np.arange(64)
    seen = (distance >= 0) & (distance < (window or 64))
    assert (np.asarray(mask.mask_function(order[:, None], np.arange(64))) == seen).all()
    for i, j in np.ndindex(8, 8):
        block = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        found = mask[block]
        assert (found.any(), found.all()) == (seen[block].any(), seen[block].all()), (i, j)


@pytest.mark.slow
def test_queries_split_over_devices_see_all_keys():
    """Two devices with an early and a late piece each, keys and values of the whole row on both."""
    T, sharding = 512, make_sharding(ParallelConfig(fsdp=1, context=2), jax.devices()[:2])
    assert fits(T, 2) and not fits(T, 4)
    (q, k, v, _), do, where = inputs(T, False, True)
    form, local = Form(0.09, 300), sharding.inside()

    def on_a_device(q, k, v, do, positions, segments):
        k, v = (local.whole(local.part(x, 2), 2) for x in (k, v))  # there and back
        own = Where(local.part(positions), positions, local.part(segments), segments)
        f = lambda q, k, v: splash(q, k, v, form, own, sharding=local, parts=2)  # noqa: E731
        out, pull = jax.vjp(f, local.part(q), k, v)
        dq, dk, dv = pull(local.part(do))
        return local.whole(out), local.whole(dq), *jax.lax.psum((dk, dv), "context")

    mapped = jax.shard_map(on_a_device, mesh=sharding.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = jax.jit(mapped)(q, k, v, do, where.q_positions_BT, where.q_segments_BT)
    out, pull = jax.vjp(lambda q, k, v: reference(q, k, v, form, where), q, k, v)
    assert tiny.worst(found, (out, *pull(do))) < 2e-5
