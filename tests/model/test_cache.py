"""Caches of every kind of layer: filling them in parts and decoding far past a window equals one forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.errors import UserError
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.sharding import ParallelConfig, make_sharding

LENGTH, CHUNK = 56, 8
LENGTHS = np.array([LENGTH, 44, 25])
PROMPTS = np.array([37, 8, 1])
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, LENGTH))

LOCAL = {"window": 9, "qk_norm": "head", "sinks": True}
LATENT = {"kv_heads": None, "head": 6, "latent": {"kv_rank": 12, "q_rank": 8, "rope_head": 4, "v_head": 5}}
LONG = {"scaling": "longrope", "original_context": 30, "short_factors": [1, 1, 2, 2], "long_factors": [2, 3, 5, 9]}
CONFIGS = {
    "full": tiny.config(),
    "window": tiny.config(LOCAL),
    "gemma3": tiny.config(
        pattern=[tiny.layer(LOCAL)] * 5 + [tiny.layer({"qk_norm": "head", "rope": {"base": 500.0}})],
        layers=8,
        norm="rms_unit_offset",
    ),
    "latent": tiny.config(LATENT, prefix=[tiny.layer(LATENT | {"window": 9, "sinks": True})], layers=3, moe={}),
    "longrope": tiny.config({"rope": LONG}),
    "dynamic_ntk": tiny.config({"rope": {"scaling": "dynamic_ntk", "factor": 4.0, "original_context": 30}}),
}


def decoded(model, params, lengths_B=None):
    """`(logits[B, T, V], cache)`: prompts in chunks, padded with position -1, then one token a row and call."""

    @jax.jit
    def step(cache, tokens, positions):
        hidden, cache, _ = model.apply(params, tokens, positions_BT=positions, lengths_B=lengths_B, cache=cache)
        return cache, model.unembed(model.head(params), hidden)

    cache = make_cache(model.config, 3, LENGTH, chunk=CHUNK, stored=model.kernels.cache)
    out = np.zeros((3, LENGTH, tiny.VOCAB))
    starts = [(start + np.arange(CHUNK), PROMPTS) for start in range(0, PROMPTS.max(), CHUNK)]
    starts += [((PROMPTS + i)[:, None], LENGTHS) for i in range(LENGTH)]
    for at, ends in starts:
        positions = np.where(at < ends[:, None], at, -1)
        tokens = np.take_along_axis(TOKENS, np.maximum(positions, 0), axis=1)
        cache, logits = step(cache, tokens, jnp.asarray(positions, jnp.int32))
        row, column = np.nonzero(positions >= 0)
        out[row, positions[row, column]] = np.asarray(logits)[row, column, : tiny.VOCAB]
    return out, cache


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_and_long_decoding_equal_one_forward(name):
    model = tiny.one_device(CONFIGS[name])
    params = tiny.weights(model)
    lengths = jnp.asarray(LENGTHS) if name in ("longrope", "dynamic_ntk") else None
    expected = np.asarray(jax.jit(model.logits)(params, TOKENS, lengths_B=lengths))
    found, cache = decoded(model, params, lengths)
    for row, length in enumerate(LENGTHS):
        assert tiny.relative(found[row, :length], expected[row, :length, : tiny.VOCAB]) < 1e-5
    for spec, layer in zip(model.config.layer_specs, cache, strict=True):
        slots = 16 if spec.attn.window else LENGTH  # a window of 9 and a chunk of 8, one token being in both
        assert layer.positions_BS.shape == (3, slots)
        assert layer.k_BKSH.shape[2] == slots and (layer.v_BKSH is None) == (spec.attn.latent is not None)


def test_the_devices_of_a_mesh_decode_what_one_does():
    """Latent attention has heads to split, though its cache has one."""
    one = tiny.one_device(CONFIGS["latent"])
    many = build(one.config, make_sharding(ParallelConfig(fsdp=2, expert=2, tensor=2, rules={"vocab": None})))
    params = tiny.weights(one)
    on_mesh = jax.tree.map(lambda w, a: jax.device_put(w, a.sharding), params, many.abstract)
    assert tiny.relative(decoded(many, on_mesh)[0], decoded(one, params)[0]) < 1e-5


def test_a_latent_cache_holds_one_short_vector_a_token():
    cache = make_cache(CONFIGS["latent"], 2, 64)
    assert tree.nbytes(cache[1]) == 2 * 64 * ((12 + 4) * 4 + 4)
    plain = make_cache(tiny.config({"kv_heads": None}), 2, 64)
    assert tree.nbytes(plain[0]) == 2 * 64 * (2 * 4 * 8 * 4 + 4)


@pytest.mark.parametrize("name", ["window", "latent"])
def test_a_cache_in_8_bits_rounds_each_head_at_each_position(name):
    """Each entry within half a step of what a float cache keeps, and so the logits nearly equal; half of the bytes."""
    plain, rounded = (tiny.one_device(CONFIGS[name], cache=cache) for cache in ("float", "int8"))
    params = tiny.weights(plain)
    (expected, floats), (found, ints) = decoded(plain, params), decoded(rounded, params)
    for row, length in enumerate(LENGTHS):
        assert 1e-5 < tiny.relative(found[row, :length], expected[row, :length]) < 0.05
    first, held = floats[0].read(jnp.float32)[0], ints[0]  # of the first layer, whose inputs are the same in both
    there = np.asarray(held.positions_BS)[:, None, :, None] >= 0
    error = np.abs(np.asarray(held.read(jnp.float32)[0] - first)) * there
    assert held.k_BKSH.dtype == jnp.int8 and (error <= 0.51 * np.asarray(held.k_scale_BKS)[..., None]).all()
    assert error.max() > 0
    entries = [sum(x.nbytes for x in (c[0].k_BKSH, c[0].k_scale_BKS) if x is not None) for c in (floats, ints)]
    assert entries[1] < 0.5 * entries[0]


@pytest.mark.parametrize("name", ["window", "latent"])
def test_what_comes_into_an_empty_cache_attends_to_itself_alone(name):
    """Ragged, and long enough for blocks of keys to be skipped: the same as attention over all slots."""
    config = CONFIGS[name]
    model = tiny.one_device(dataclasses.replace(config, layers=1 + len(config.prefix), context=320))
    params, lengths, T = tiny.weights(model), np.array([160, 131, 1]), 160
    tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (3, T))
    positions = np.where(np.arange(T) < lengths[:, None], np.arange(T), -1)
    step = jax.jit(lambda cache, positions: model.apply(params, tokens, positions_BT=positions, cache=cache)[:2])
    fresh = make_cache(model.config, 3, 2 * T)
    hidden, cache = step(fresh, positions)
    expected, filled = step(tuple(dataclasses.replace(layer, empty=False) for layer in fresh), positions)
    for row, length in enumerate(lengths):
        assert tiny.relative(hidden[row, :length], expected[row, :length]) < 1e-5
    for layer, other in zip(cache, filled, strict=True):
        assert not layer.empty and jax.tree.all(jax.tree.map(lambda a, b: tiny.relative(a, b) < 1e-5, layer, other))
    # One that was written is not taken for empty: the same tokens, further on, see those before them.
    later = np.where(positions < 0, -1, positions + T)
    assert tiny.relative(step(cache, later)[0][0, :8], step(fresh, later)[0][0, :8]) > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize("window,chunk", [(9, 8), (1, 8), (8, 1), (16, 1), (5, 12), (4, 21), (7, 3)])
def test_every_key_of_a_window_is_there_when_its_query_comes(window, chunk):
    """With these sizes but the last no slot is to spare; writes of other lengths, rows at other places."""
    (layer,) = make_cache(tiny.config({"window": window}, layers=1), 2, 200, chunk=chunk)
    assert layer.positions_BS.shape[1] == -(-(window + chunk - 1) // 8) * 8
    rng, at = np.random.default_rng(0), np.array([0, 5])
    write = jax.jit(lambda layer, positions: layer.write(*[jnp.zeros((2, chunk, 2, 8))] * 2, positions))
    for _ in range(30):
        count = rng.integers(0, chunk + 1, 2)
        count[0] = chunk
        step = np.arange(chunk)
        positions = np.where(step < count[:, None], at[:, None] + step, -1)
        layer = write(layer, jnp.asarray(positions))
        for row, start in enumerate(at):
            first = max(start - window + 1, 0 if row == 0 else 5)
            assert set(range(first, start + count[row])) <= set(np.asarray(layer.positions_BS[row]).tolist())
        at = at + count


def test_by_default_every_layer_has_all_slots():
    for name, config in CONFIGS.items():
        assert {layer.positions_BS.shape for layer in make_cache(config, 2, 40)} == {(2, 40)}, name
        assert {layer.chunk for layer in make_cache(config, 2, 12, chunk=12)} == {None}


@pytest.mark.fast
def test_what_a_cache_cannot_do_is_refused():
    model = tiny.one_device(CONFIGS["window"])
    cache = make_cache(model.config, 1, 64, chunk=8)
    with pytest.raises(UserError, match="9 tokens at once into a cache made with chunk=8"):
        jax.eval_shape(lambda p: model.apply(p, jnp.zeros((1, 9), int), cache=cache), model.abstract)
    for name in ("longrope", "dynamic_ntk"):
        model = tiny.one_device(CONFIGS[name])
        cache = make_cache(model.config, 1, 64)
        with pytest.raises(UserError, match=f"rope scaling {name} goes by how long a row will be: give lengths_B"):
            jax.eval_shape(lambda p: model.apply(p, jnp.zeros((1, 4), int), cache=cache), model.abstract)  # noqa: B023
