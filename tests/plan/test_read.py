"""What can be planned: settings without text, and models by themselves."""

import json

import plans
import pytest
import yaml

from jaxllm.errors import SettingsError
from jaxllm.parity.tiny import VARIANTS
from jaxllm.plan.read import LONGEST, read

pytestmark = pytest.mark.fast


def test_neither_text_nor_tokenizer_is_needed(tmp_path):
    raw = plans.settings() | {"data": {"sources": [{"name": "a", "path": "gs://nowhere/*"}], "tokenizer": "nowhere"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    config, assumed = read(str(tmp_path / "run.yaml"))
    assert (config.model.vocab, config.data.sources[0].path, assumed) == (1024, "gs://nowhere/*", ())
    assert read(plans.settings()).config.train.batch == 16


def test_only_the_size_of_the_vocabulary_is_asked_for():
    raw = plans.settings()
    del raw["model"]["vocab"]
    with pytest.raises(SettingsError, match=r"how large is the vocabulary\? set model.vocab=N"):
        read(raw)
    with pytest.raises(SettingsError, match="data.tokenizer=nowhere is not there; set model.vocab=N instead"):
        read(raw | {"data": {"sources": [{"name": "a", "path": "b"}], "tokenizer": "nowhere"}})
    assert read(raw, ["model.vocab=77"]).config.model.vocab == 77
    trained = raw | {"data": {"sources": [{"name": "a", "path": "b"}], "vocab": 500}}
    assert read(trained).config.model.vocab == 500


def test_adapters_over_weights_that_are_not_there():
    config = read(plans.settings(train__init="absent", lora={"rank": 4})).config
    assert config.lora.rank == 4 and config.train.init == "absent"
    raw = plans.settings(train__init="absent", lora={"rank": 4})
    del raw["model"]
    with pytest.raises(SettingsError, match="train.init=absent is not there; bring it, or give the model"):
        read(raw)


def test_a_model_by_itself():
    config, assumed = read("llama3.1-8b", ["train.batch=64"], devices=16)
    assert (config.train.batch, config.train.seq_len, config.model.context) == (64, LONGEST, 131072)
    assert assumed == ("model.dtype=bfloat16", "model.remat=full", f"train.seq_len={LONGEST}")
    assert read("llama3.1-8b", devices=16).config.train.batch == 16
    generates = read("llama3.1-8b", devices=16, generates=True)
    assert generates.config.parallel.tensor == 8 and "parallel.tensor=8" in generates.assumed
    with pytest.raises(
        SettingsError, match="no such settings file, run, or model: lama3.1-8b; did you mean llama3.1-8b?"
    ):
        read("lama3.1-8b")


def test_a_published_model_and_a_run(tmp_path, finished):
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["llama3"]))
    config, assumed = read(str(tmp_path))
    assert config.model.vocab == VARIANTS["llama3"]["vocab_size"] and "model.dtype=bfloat16" in assumed
    assert read(str(finished.folder)).config.model == finished.config.model
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="neither a run .* nor a published model"):
        read(str(tmp_path / "empty"))


#: As their config.json and papers say: arXiv 2307.09288, 2407.21783, 2401.04088.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name, parameters", PUBLISHED.items())
def test_shipped_models_have_the_published_numbers_of_weights(name, parameters):
    step, _ = plans.described(name, "v5p:2x2x2")
    assert sum(leaf.size for leaf in _leaves(step.state.params)) == parameters


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
