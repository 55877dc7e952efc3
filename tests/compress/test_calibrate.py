"""Layers run one by one are the model, and what an observer notes is what reached the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllm.compress.calibrate import Flow, Observed, batches_of, layer_of
from jaxllm.data.prepare import prepare_source
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError
from jaxllm.model.change import forms
from jaxllm.model.param import rms
from jaxllm.weights.form import Form

BATCH = tiny.batch()


@pytest.mark.parametrize("config", [tiny.DENSE, tiny.MOE], ids=["dense", "experts"])
def test_layers_one_by_one_are_the_model(config):
    model = tiny.one_device(config)
    params = tiny.weights(model)

    def one_by_one(params):
        x_BTD = model.embedded(params, BATCH.tokens_BT, **tiny.where(BATCH))
        for where in model.layers:
            x_BTD = model.layer(*where[:2], layer_of(params, where), x_BTD, **tiny.where(BATCH))
        return rms(config, x_BTD, params["norm"]["scale"])

    assert len(model.layers) == config.layers
    expected = jax.jit(model.apply)(params, BATCH.tokens_BT, **tiny.where(BATCH))[0]
    assert tiny.relative(jax.jit(one_by_one)(params), expected) < 1e-6


def test_statistics_are_sums_over_what_reaches_a_weight():
    """Of plain and of expert-major rows, by NumPy in float64; rows after the last expert's are no one's."""
    rng, found = np.random.default_rng(0), []
    x = rng.standard_normal((2, 5, 4, 8))
    seen = Observed(jnp.zeros((4, 8, 3)), Form("iio", (4, 8, 3)), found.append)
    seen.einsum("BTNH,NHD->BTD", jnp.asarray(x, jnp.float32))
    rows = x.reshape(10, 32)
    assert tiny.relative(found[0].gram_II, rows.T @ rows) < 1e-5
    assert tiny.relative(found[0].size_I, np.abs(rows).sum(0)) < 1e-5

    x, sizes = rng.standard_normal((16, 6)), [4, 0, 8]
    seen = Observed(jnp.zeros((3, 6, 2)), Form("eio", (3, 6, 2)), found.append)
    seen.grouped_matmul(jnp.asarray(x, jnp.float32), jnp.asarray(sizes), block=4)
    for expert, rows in enumerate((x[:4], x[4:4], x[4:12])):
        np.testing.assert_allclose(found[1].gram_II[expert], rows.T @ rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1].size_I[expert], np.abs(rows).sum(0), rtol=1e-4)

    x = rng.standard_normal((2, 3, 5, 6))
    seen.einsum("BECD,EDF->BECF", jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found[2].gram_II, np.einsum("BECD,BECF->EDF", x, x), rtol=1e-4, atol=1e-4)


def test_text_flows_through_the_layers_and_is_observed_before_each():
    """The first layer's queries read the normed embeddings; experts together see each token's choices."""
    model = tiny.one_device(tiny.config(layers=1, moe={"shared_ffw": 16}))
    params, of = tiny.weights(model), forms(model)
    flow = Flow(model, params, [BATCH, BATCH])
    where, names = model.layers[0], ("attn/q", "moe/up", "moe/shared/up")
    stats = flow.observe(where, layer_of(params, where), {name: of[f"layers/0/{name}"] for name in names})
    embedded = np.asarray(params["embed"])[np.asarray(BATCH.tokens_BT)]
    x = np.asarray(rms(model.config, embedded, params["layers"]["0"]["attn_norm"]["scale"][0])).reshape(-1, 32)
    assert tiny.relative(stats["attn/q"].gram_II, 2 * x.T @ x) < 1e-5
    once = np.asarray(stats["moe/shared/up"].gram_II)
    assert tiny.relative(np.asarray(stats["moe/up"].gram_II).sum(0), 2 * once) < 1e-4  # two experts a token
    before = flow.x[0]
    flow.advance(where, layer_of(params, where))
    assert tiny.relative(flow.x[0], before) > 0.1


def test_calibration_rows_hold_no_padding_and_too_short_a_text_says_so(tmp_path):
    text = "the quick brown fox jumps over the lazy dog, and so on: yes, no, maybe.\n"
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text * (20 + i))
    tokenizer = Tokenizer.train([text], vocab=300)
    source = Source(name="calibration", path=str(tmp_path / "*.txt"))
    store = prepare_source(source, tokenizer, tmp_path / "cache", say=lambda _: None)
    model = tiny.one_device(tiny.config(vocab=300))
    batches = batches_of(model, store, 10 * 32, 100, seq_len=32, rows=4)
    assert [b.tokens_BT.shape for b in batches] == [(4, 32), (4, 32), (2, 32)]
    assert all((b.segments_BT > 0).all() for b in batches)
    whole = int(store.lengths.sum() - 4) // 32 * 32
    with pytest.raises(
        DataError, match=rf"too short.*{whole:,} tokens, and the widest matrix has {whole + 1:,} inputs"
    ):
        batches_of(model, store, 10**6, whole + 1, seq_len=32)
