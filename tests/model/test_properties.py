"""What must hold for any model: nothing crosses a document, nothing comes from the future, storage does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.objectives.lm import lm
from jaxllm.sharding import ParallelConfig, make_sharding

BATCH = tiny.batch()
MESHES = {"dense": {"data": 2, "fsdp": 2, "tensor": 2}, "moe": {"fsdp": 2, "expert": 2, "tensor": 2}}
CONFIGS = {"dense": tiny.DENSE, "moe": tiny.MOE}


@pytest.fixture(scope="module", params=["dense-1", "moe-1", "dense-8", "moe-8"])
def logits_of(request):
    """`tokens, positions, segments -> logits` of a dense or a mixture-of-experts model, on one device or eight."""
    kind, devices = request.param.split("-")
    model = tiny.one_device(CONFIGS[kind], unroll=0)
    if devices == "8":
        model = build(CONFIGS[kind], make_sharding(ParallelConfig(**MESHES[kind])), model.kernels)
    params = tiny.weights(model)
    f = jax.jit(lambda tokens, **where: model.logits(params, tokens, **where))
    return lambda batch, tokens=None: np.asarray(f(batch.tokens_BT if tokens is None else tokens, **tiny.where(batch)))


def changed_at(row: int, at: int):
    """The batch's tokens with another one at this place."""
    return BATCH.tokens_BT.at[row, at].set((BATCH.tokens_BT[row, at] + 7) % tiny.VOCAB)


def test_a_token_reaches_its_own_document_only_and_nothing_before_it(logits_of):
    before = logits_of(BATCH)
    segments = np.asarray(BATCH.segments_BT)
    for row, at in ((0, 0), (0, 6), (1, 4), (2, 12)):
        after = logits_of(BATCH, changed_at(row, at))
        reached = np.zeros(segments.shape, bool)
        reached[row, at:] = segments[row, at:] == segments[row, at]
        same = (before.view(np.int32) == after.view(np.int32)).all(axis=-1)
        assert same[~reached].all()
        assert not same[row, at]
        assert not same[reached].all()


def test_packed_documents_equal_each_one_alone(logits_of):
    tokens, segments = np.asarray(BATCH.tokens_BT), np.asarray(BATCH.segments_BT)
    documents = [(row, s) for row in range(4) for s in range(1, segments[row].max() + 1)]
    together = logits_of(BATCH)
    for four in (documents[:4], documents[4:8], documents[-4:]):
        alone = np.zeros((2, *tokens.shape), np.int32)
        for i, (row, s) in enumerate(four):
            here = segments[row] == s
            alone[0, i, : here.sum()], alone[1, i, : here.sum()] = tokens[row, here], 1
        found = logits_of(tiny.packed(*alone))
        for i, (row, s) in enumerate(four):
            expected = together[row, segments[row] == s]
            assert tiny.relative(found[i, : len(expected), : tiny.VOCAB], expected[:, : tiny.VOCAB]) < 1e-5


@pytest.fixture(scope="module")
def mixed():
    """A dense layer outside the scan, then two periods with experts."""
    return tiny.config({"window": 5}, prefix=[tiny.layer()], layers=3, moe={"shared_ffw": 16})


def loss_and_gradients(config, **kernels):
    model = tiny.one_device(config, **kernels)
    params = tiny.weights(model)
    return jax.jit(jax.value_and_grad(lambda p: lm(model, p, BATCH)[0]))(params)


@pytest.fixture(scope="module")
def unrolled(mixed):
    return loss_and_gradients(mixed, unroll=99)


def test_every_weight_has_a_gradient(unrolled):
    for path, gradient in tiny.tree.flatten(unrolled[1]).items():
        assert np.all(np.isfinite(gradient)) and np.any(gradient), path


@pytest.mark.parametrize(
    "remat,kernels",
    [
        ("none", {"unroll": 0}),
        ("none", {"unroll": 99, "attention": "reference"}),
        ("full", {"unroll": 0}),
        (("attention", "offload:q", "offload:up"), {"unroll": 0}),
    ],
    ids=str,
)
def test_how_layers_run_changes_no_number(mixed, unrolled, remat, kernels):
    loss, gradients = loss_and_gradients(dataclasses.replace(mixed, remat=remat), **kernels)
    assert tiny.relative(loss, unrolled[0]) < 1e-6
    assert tiny.worst(gradients, unrolled[1]) < 1e-5


LATENT = {"kv_heads": None, "head": 6, "latent": {"kv_rank": 12, "q_rank": 8, "rope_head": 4, "v_head": 5}}


@pytest.fixture(scope="module")
def latent():
    """Latent attention, experts with biases in groups, norms less one."""
    moe = {"bias": True, "router_bias": True, "groups": 2, "groups_per_token": 1, "group_score": "top2"}
    return tiny.config(LATENT, layers=2, moe=moe | {"activation": "swiglu_clamped"}, norm="rms_unit_offset")


@pytest.fixture(scope="module")
def latent_unrolled(latent):
    return loss_and_gradients(latent, unroll=99)


def test_every_weight_of_latent_attention_and_biases_has_a_gradient(latent_unrolled):
    test_every_weight_has_a_gradient(latent_unrolled)


@pytest.mark.parametrize(
    "remat,kernels",
    [
        ("qkv", {"unroll": 0}),
        ("none", {"unroll": 99, "attention": "reference"}),
        (("attention", "offload:q", "offload:up"), {"unroll": 0}),
    ],
    ids=str,
)
def test_how_layers_of_latent_attention_run_changes_no_number(latent, latent_unrolled, remat, kernels):
    test_how_layers_run_changes_no_number(latent, latent_unrolled, remat, kernels)


@pytest.mark.fast
def test_rematerialisation_keeps_less_of_latent_attention(latent):
    test_rematerialisation_keeps_less(latent)


def test_latent_attention_on_eight_devices_equals_one(latent):
    one = tiny.one_device(latent)
    params = tiny.weights(one)
    many = build(latent, make_sharding(ParallelConfig(fsdp=2, expert=2, tensor=2, rules={"vocab": None})))
    on_mesh = jax.tree.map(lambda w, a: jax.device_put(w, a.sharding), params, many.abstract)
    logits = [jax.jit(m.logits)(p, BATCH.tokens_BT, **tiny.where(BATCH)) for m, p in ((one, params), (many, on_mesh))]
    assert tiny.relative(logits[1], logits[0]) < 1e-5


@pytest.mark.slow
def test_norms_stored_less_one_start_as_plain_ones(latent):
    """The same function of the same key, with zeros where the others have ones."""
    out = []
    for norm in ("rms", "rms_unit_offset"):
        model = tiny.one_device(dataclasses.replace(latent, norm=norm))
        params = model.init(jax.random.key(0))
        out.append(jax.jit(model.logits)(params, BATCH.tokens_BT))
        starts = {float(w.mean()) for path, w in tiny.tree.flatten(params).items() if path.endswith(("norm", "scale"))}
        assert starts == {1.0 if norm == "rms" else 0.0}
    assert tiny.bit_equal(*out)


def saved_bytes(config) -> int:
    model = tiny.one_device(config, unroll=0)
    f = lambda p: lm(model, p, BATCH)[0]  # noqa: E731
    _, pull = jax.eval_shape(lambda p: jax.vjp(f, p), model.abstract)
    return tiny.tree.nbytes(pull)


@pytest.mark.fast
def test_rematerialisation_keeps_less(mixed):
    none, minimal, qkv, full = (
        saved_bytes(dataclasses.replace(mixed, remat=remat)) for remat in ("none", "minimal", "qkv", "full")
    )
    assert none > minimal > qkv > full


@pytest.fixture(scope="module")
def dropping():
    """Four layers that each add a constant, and nothing else: what comes out shows which masks were drawn.

    `key -> hidden[B, T, D]`, by a scan and unrolled.
    """
    config = tiny.config(mlp={"bias": True, "activation": "gelu"}, layers=4, dropout=0.5)
    out = []
    for unroll in (0, 99):
        model = tiny.one_device(config, unroll=unroll)
        params = jax.tree.map(jnp.zeros_like, model.abstract)
        params["layers"]["0"]["mlp"]["down_bias"] += 1
        params["norm"]["scale"] += 1
        out.append(jax.jit(lambda key, m=model, p=params: m.apply(p, BATCH.tokens_BT, key=key)[0]))
    return out


def test_dropout_is_deterministic_by_key_and_differs_between_layers(dropping):
    for hidden in dropping:
        one = np.asarray(hidden(jax.random.key(1)))
        assert tiny.bit_equal(one, hidden(jax.random.key(1)))
        # A value counts the layers that kept it, over the token's norm: one mask for all gives two levels, 0 and 4.
        counts = np.rint(one / np.min(np.where(one > 0, one, np.inf), axis=-1, keepdims=True)).astype(int)
        assert set(np.unique(counts)) == {0, 1, 2, 3, 4}
        share = np.bincount(counts.ravel(), minlength=5) / counts.size
        np.testing.assert_allclose(share, np.array([1, 4, 6, 4, 1]) / 16, atol=0.03)
        assert not tiny.bit_equal(one, hidden(jax.random.key(2)))
    assert tiny.relative(dropping[0](jax.random.key(1)), dropping[1](jax.random.key(1))) < 1e-6


@pytest.mark.fast
def test_without_a_key_nothing_is_dropped(dropping):
    np.testing.assert_allclose(dropping[0](None), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_prefill_then_decode_equals_one_forward(kind):
    """Prompts of different lengths, padded with position -1; then one token at a time."""
    model = tiny.one_device(CONFIGS[kind])
    params = tiny.weights(model)
    tokens, lengths = BATCH.tokens_BT[:2, :12], np.array([8, 5])
    full = np.asarray(jax.jit(model.logits)(params, tokens))
    step = jax.jit(lambda t, p, c: model.apply(params, t, positions_BT=p, cache=c)[:2])
    positions = np.arange(8)[None] + np.zeros((2, 1), int)
    positions = np.where(positions < lengths[:, None], positions, -1)
    hidden, cache = step(tokens[:, :8], jnp.asarray(positions), make_cache(model.config, 2, 16))
    found = np.asarray(model.unembed(model.head(params), hidden))
    for row, length in enumerate(lengths):
        assert tiny.relative(found[row, :length, : tiny.VOCAB], full[row, :length, : tiny.VOCAB]) < 1e-5
    for i in range(4):
        at = jnp.asarray(lengths + i)[:, None]
        hidden, cache = step(jnp.take_along_axis(tokens, at, axis=1), at, cache)
        found = np.asarray(model.unembed(model.head(params), hidden))
        for row, length in enumerate(lengths + i):
            assert tiny.relative(found[row, 0, : tiny.VOCAB], full[row, length, : tiny.VOCAB]) < 1e-5


def test_new_weights_have_the_stated_spread():
    """N(0, 1 / fan-in); matrices that add to the residual stream are smaller by sqrt(2 * layers)."""
    model = tiny.one_device(tiny.config(layers=2))
    params = model.init(jax.random.key(0))
    attn, mlp = params["layers"]["0"]["attn"], params["layers"]["0"]["mlp"]
    for weight, expected in ((attn["q"], 32), (mlp["up"], 32), (params["embed"], 32), (mlp["down"], 48 * 4)):
        np.testing.assert_allclose(np.std(weight), expected**-0.5, rtol=0.1)
    assert not np.allclose(attn["q"][0], attn["q"][1]) and not np.allclose(attn["k"], attn["v"])
    assert np.all(params["norm"]["scale"] == 1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract
    )
