"""`jaxllm info`: sizes that agree with the weights, and what a name says."""

import json

import jax
import pytest

from jaxllm import api, cli, tree
from jaxllm.families.registry import read_config
from jaxllm.hf.export import write_shards
from jaxllm.info import cache_bytes, describe, info, name_says
from jaxllm.model.build import build
from jaxllm.model.cache import make_cache
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS


@pytest.mark.fast
@pytest.mark.parametrize("variant", ["llama3", "gemma3", "mixtral", "deepseek_v3", "gpt2"])
def test_sizes_are_those_of_the_weights_and_of_the_cache(variant):
    config = read_config(VARIANTS[variant])[1]
    found = describe(config)
    total = tree.count(build(config).abstract)
    assert found["parameters"] == total == sum(found["by part"].values())
    assert found["bytes"]["float32"] == 4 * total and found["bytes"]["int8"] == total
    one, two = (sum(x.nbytes for x in jax.tree.leaves(make_cache(config, 1, slots)) if x.ndim == 4) for slots in (8, 9))
    assert two - one == cache_bytes(config, 4) == found["cache per token"]["float32"]


@pytest.mark.fast
def test_a_folder_is_described_without_its_weights(tmp_path, capsys):
    raw, tensors = random_model("gemma3")
    write_shards(tmp_path, tensors.items(), 1 << 30)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert info(tmp_path)["weights"] == {"tensors": len(tensors), "changes": "none"}
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in info(tmp_path)["weights"]["problem"]
    assert cli.main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "family            gemma3" in out and "attention         6 x window 7, 1 x full" in out
    assert "context           256" in out and "problem" in out, "it has no tokenizer, and says so"
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"] == 97


def test_a_run_is_described_from_its_checkpoint(finished):
    found = info(finished.folder)
    loaded = api.load(finished.folder)
    assert found["weights"] == {"changes": "none"}
    assert found["parameters"] == tree.count(loaded.params) and found["steps"] == loaded.step
    assert found["tokenizer"]["ids"] == loaded.tokenizer.vocab and found["tokenizer"]["bos"].endswith("<bos>")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf",
            dict(experts="8", size="7B", quantisation="Q4_K_M", kind="Instruct"),
        ),
        ("Qwen3-30B-A3B-Base", dict(size="30B", active="3B", kind="Base")),
        ("gemma-3-270m-it-128k", dict(size="270m", context="128k", kind="it")),
        ("Llama-3.2-1B-bf16", dict(size="1B", quantisation="bf16")),
        ("model", {}),
    ],
)
def test_names_say_what_they_say(name, says):
    assert name_says(name) == says
