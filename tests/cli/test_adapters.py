"""Adapters from the command line: written alone, laid over a model, merged, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jaxllm import api, cli, tree
from jaxllm.adapt.changes import Change
from jaxllm.adapt.lora import TRAINABLE, LoraConfig
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.checkpoint import load as load_arrays
from jaxllm.errors import SettingsError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory):
    """`(the run's model with an adapter, its folder, the folders of two adapters in PEFT's layout)`."""
    folder, rng = tmp_path_factory.mktemp("adapted"), np.random.default_rng(0)
    base = api.load(finished.folder)
    loaded = base.change(Change(lora=LoraConfig(pattern="**/attn/*,**/mlp/*,embed", rank=2, alpha=3.0)))

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(noise, leaf.sharding) if tree.matches(TRAINABLE, path) else leaf

    ones = [dataclasses.replace(loaded, params=tree.map_with_path(draw, loaded.params)) for _ in range(2)]
    api.save(ones[0], folder / "model")
    assert cli.main(["export", str(folder / "model"), "--to", "peft", "--out", str(folder / "0")]) == 0
    api.export(ones[1], folder / "1", to="peft")
    return ones[0], folder


def test_an_adapter_over_its_base_is_the_model_and_merged_it_is_plain(adapted, finished, capsys):
    loaded, folder = adapted
    again = api.load_adapter(api.load(finished.folder), folder / "0")
    tokens = np.arange(12)[None]
    logits = jax.jit(again.model.logits)(again.params, tokens)
    assert tiny.relative(logits, jax.jit(loaded.model.logits)(loaded.params, tokens)) < 1e-6
    words = ["merge", str(finished.folder), "--adapter", str(folder / "0")]
    assert cli.main([*words, "--out", str(folder / "plain")]) == 0
    assert cli.main(["merge", str(folder / "model"), "--to", "hf", "--out", str(folder / "hf")]) == 0
    assert "float32" in capsys.readouterr().out
    plain, published = api.load(folder / "plain"), api.load(folder / "hf")
    assert tree.flatten(plain.params).keys() == tree.flatten(api.load(finished.folder).params).keys()
    assert tiny.relative(jax.jit(plain.model.logits)(plain.params, tokens), logits) < 1e-5
    assert tiny.worst(published.params["layers"], plain.params["layers"]) < 1e-6
    assert load_arrays(folder / "plain", part="params").state is not None


def test_a_continuation_with_each_adapter(adapted, finished, capsys):
    _, folder = adapted
    words = ["generate", str(finished.folder), "--prompt", "def", "--temperature", "0", "--max-tokens", "8"]
    both = ["--adapter", str(folder / "0"), "--adapter", str(folder / "1")]
    alone = []
    for number in ("0", "1"):
        assert cli.main([*words, "--adapter", str(folder / number)]) == 0
        alone.append(capsys.readouterr().out)
    assert cli.main([*words, *both]) == 0
    assert capsys.readouterr().out == "".join(f"--- {folder / n}\n{text}" for n, text in zip("01", alone, strict=True))
    assert alone[0] != alone[1]


def test_what_does_not_fit_is_said(adapted, finished, tmp_path, capsys):
    _, folder = adapted
    run, model, out = str(finished.folder), str(folder / "model"), str(tmp_path / "out")
    for words, said in (
        (["export", model, "--out", out], "merge them first (jaxllm merge)"),
        (["export", run, "--to", "peft", "--out", out], "the model has none or several"),
        (["export", model, "--to", "peft", "--dtype", "bfloat16", "--out", out], "to=peft writes float32"),
        (["merge", run, "--out", out], "has no adapter and plain weights"),
        (["merge", model, "--adapter", str(folder / "0"), "--out", out], "has an adapter already"),
        (["merge", run, "--adapter", run, "--out", out], "adapter_config.json: no such file"),
        (["merge", run, "--adapter", str(folder / "0"), "--out", run], "nothing is written over"),
    ):
        assert cli.main(words) == 2, words
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    quantised = api.load(run).change(Change(quantize=QuantizeConfig(rules=(QuantizeRule(format="nf4", group=16),))))
    with pytest.raises(SettingsError, match="nf4.*jaxllm merge"):
        api.export(quantised, out, to="gguf")
