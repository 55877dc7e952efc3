"""Runs that train adapters over the weights of another run, which may be quantised first."""

import jax
import numpy as np
import pytest
import small

from jaxllm import api, tree
from jaxllm.adapt.changes import Change
from jaxllm.errors import SettingsError

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8.0, "pattern": "**/attn/*,**/mlp/*", "dropout": 0.1}
INT8 = {"rules": [{"format": "int8"}]}


def run(corpus, out, **changes):
    return api.train(small.settings(corpus, out, **changes), quiet=True)


@pytest.fixture(scope="module")
def qlora(finished, corpus, tmp_path_factory):
    """A run of adapters over int8 weights."""
    out = tmp_path_factory.mktemp("qlora") / "run"
    return run(corpus, out, train__init=str(finished.folder), lora=LORA, quantize=INT8)


def test_only_the_adapters_train(qlora, finished):
    """Codes and scales are those of the run before, bit for bit; the optimizer knows the adapters alone."""
    before = tree.flatten(api.load(finished.folder).change(Change(quantize=INT8)).params)
    after = tree.flatten(qlora.params)
    adapters = {path for path in after if "lora_" in path}
    assert {path.replace("/base/", "/") for path in after.keys() - adapters} == before.keys()
    for path in after.keys() - adapters:
        assert np.array_equal(after[path], before[path.replace("/base/", "/")]), path
    assert all(np.abs(after[path]).max() > 0 for path in adapters)
    saved = small.saved(qlora.folder)
    opt = [path for path in saved if path.startswith("opt/")]
    assert any("lora_a" in path for path in opt)
    assert all("lora_" in path or saved[path].ndim == 0 for path in opt)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(qlora, finished, corpus, tmp_path, stop_at):
    """Stopped after 3 steps and gone on with: the same losses and weights, whatever has become of the first model."""
    out = tmp_path / "run"
    options = dict(train__init=str(finished.folder), lora=LORA, quantize=INT8)
    raw = small.settings(corpus, out, **options)
    stop_at(3)
    assert api.train(raw, quiet=True).status == "preempted"
    again = api.train(raw, quiet=True)
    assert small.losses(out) == small.losses(qlora.folder)
    for path, value in tree.flatten(again.params).items():
        assert np.array_equal(value, tree.flatten(qlora.params)[path]), path


def test_the_checkpoint_is_a_model_of_its_own(qlora, tmp_path):
    loaded = api.load(qlora.folder)
    assert [bool(c.quantize) for c in loaded.changes] == [True, False]
    plain = loaded.plain()
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(plain.params))
    api.save(plain, tmp_path / "plain")
    (one,) = api.generate(loaded, "def f", max_tokens=8, temperature=0)
    (two,) = api.generate(api.load(tmp_path / "plain"), "def f", max_tokens=8, temperature=0)
    assert one.ids == two.ids and np.allclose(one.logprobs, two.logprobs, atol=1e-4)


def test_what_cannot_be_is_refused(finished, qlora, corpus, tmp_path):
    init = dict(train__init=str(finished.folder))
    for changes, message in [
        (dict(lora=LORA), "set train.init"),
        (init | dict(quantize=INT8), "set lora too"),
        (init | dict(lora=LORA, quantize=INT8, train__trainable="**"), "is quantised and cannot be trained"),
        (
            init | dict(lora=LORA | {"pattern": "layers/0/attn/Q"}),
            "no matrix matches 'layers/0/attn/Q'.*layers/0/attn/",
        ),
        (dict(train__init=str(qlora.folder), lora=LORA), "has an adapter already; merge it first"),
    ]:
        with pytest.raises(SettingsError, match=message):
            run(corpus, tmp_path / "never", **changes)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("init", [pytest.param(True, marks=pytest.mark.slow), False])
def test_weights_train_for_the_format_they_are_stored_in(init, finished, corpus, tmp_path):
    """From a trained model or from new weights; the loss falls, and storing them changes no token."""
    qat = {"rules": [{"format": "int8"}], "activations": "int8"}
    more = dict(train__init=str(finished.folder)) if init else {}
    result = run(corpus, tmp_path / "run", qat=qat, train__steps=4, **more)
    losses = [float.fromhex(x) for x in small.losses(result.folder).values()]
    assert losses[-1] < losses[0]
    loaded = api.load(result.folder)
    stored = loaded.change(Change(store=True))
    one, two = (api.generate(m, "def f", max_tokens=8, temperature=0)[0] for m in (loaded, stored))
    assert one.ids == two.ids and tree.nbytes(stored.params["layers"]) < 0.4 * tree.nbytes(loaded.params["layers"])
