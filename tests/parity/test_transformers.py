"""The reference against transformers, on small random models of every family and on each mutation of their configs."""

import json
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import save_file  # noqa: E402

from jaxllm.errors import UserError  # noqa: E402
from jaxllm.parity import rope  # noqa: E402
from jaxllm.parity.blocks import layer_type, rotates  # noqa: E402
from jaxllm.parity.compare import compare_all  # noqa: E402
from jaxllm.parity.families import FAMILIES, fill  # noqa: E402
from jaxllm.parity.mutations import mutations  # noqa: E402
from jaxllm.parity.reference import forward  # noqa: E402
from jaxllm.parity.tensors import random_model  # noqa: E402
from jaxllm.parity.tiny import VARIANTS, old_form  # noqa: E402

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(1).integers(0, 97, 24)
STARTS = (0, 100)  # 100 is past the original context of every scaled variant
#: Mutations that transformers refuses too, by the number of entries of layer_types or the divisibility of heads.
REFUSED = {"num_hidden_layers", "num_attention_heads"}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def load(folder, config):
    """The model of a folder with another config.json, as a function (ids, start) -> logits."""
    (folder / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def logits(ids, start):
        positions = torch.arange(start, start + len(ids))[None]
        with torch.no_grad():
            return model(torch.tensor(ids)[None], position_ids=positions, use_cache=False).logits[0].numpy()

    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_computes_what_transformers_does(variant, tmp_path):
    config, tensors = random_model(variant)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    configs = {"as it is": config, "old form": old_form(config)} | dict(mutations(variant))
    compared = 0
    for key, mutated in configs.items():

        def reference(ids, start, mutated=mutated):
            return forward(mutated, tensors.__getitem__, ids, start)

        try:
            reference(IDS, 0)
        except (UserError, KeyError, ValueError, IndexError):
            continue
        try:
            theirs = load(tmp_path, mutated)
        except Exception:
            assert key in REFUSED, key
            continue
        for row in compare_all(f"{variant} {key}", theirs, reference, IDS, STARTS):
            assert row.holds, row
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_of_absent_keys_are_those_of_transformers(kind):
    """A config.json with the required keys alone, read by both; windows are on where a key switches them."""
    config = {"hidden_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4, "num_experts_per_tok": 2}
    if kind == "gpt2":
        config = {"n_embd": 64, "n_layer": 30, "n_head": 4, "n_positions": 128}
    if "use_sliding_window" in FAMILIES[kind][0]:
        config |= {"use_sliding_window": True, "sliding_window": 7}
    theirs = transformers.AutoConfig.for_model(kind, **config)
    ours, traits = fill({"model_type": kind} | config)
    derived = {"layer_types", "no_rope_layers", "rope_parameters"}
    derived |= {"num_key_value_heads", "head_dim"} if kind.startswith("deepseek") else set()
    for key in FAMILIES[kind][0].keys() - derived:
        if (default := getattr(theirs, key, None)) is not None:
            assert (key, ours[key]) == (key, default)
        elif key == "head_dim":
            assert ours[key] == 64 // 4
    if kind == "gpt2":
        return
    for i in range(30):
        if "layer_types" in ours:
            assert layer_type(ours, traits, i) == theirs.layer_types[i]
        if kind == "smollm3":
            assert rotates(ours, i) == bool(theirs.no_rope_layers[i])
    for own in ("sliding_attention", "full_attention") if kind == "gemma3_text" else (None,):
        spec = rope.parameters(ours, own)
        rope_theirs = theirs.rope_parameters[own] if own else theirs.rope_parameters
        for key in rope_theirs.keys() & {"factor", "beta_fast", "beta_slow", "truncate"}:
            assert spec[key] == rope_theirs[key]
        assert (spec["theta"], spec["type"]) == (rope_theirs["rope_theta"], rope_theirs["rope_type"])
