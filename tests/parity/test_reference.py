"""The reference on its own: every key of config.json acts or is refused, and tensors are read one at a time."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from jaxllm.errors import DataError, UserError
from jaxllm.parity.compare import compare, compare_all, perplexity, reference_logits, starts, table
from jaxllm.parity.folder import Folder
from jaxllm.parity.layers import mxfp4
from jaxllm.parity.mutations import INERT, SHAPES, mutations
from jaxllm.parity.reference import forward
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS, old_form

IDS = np.random.default_rng(1).integers(0, 97, 24)
#: Much more than what parity allows: 1e-4 of the largest logit.
MATTERS = 1e-2


def logits(config, tensors):
    """At the beginning, and past the original context of every scaled variant (32)."""
    return np.stack([forward(config, tensors.__getitem__, IDS, start) for start in (0, 100)])


@pytest.mark.parametrize("variant", tiny.families(VARIANTS))
def test_every_key_that_changes_the_function_changes_the_logits_or_is_refused(variant):
    config, tensors = random_model(variant)
    plain = logits(config, tensors)
    for key, mutated in mutations(variant):
        try:
            changed = logits(mutated, tensors)
        except (UserError, KeyError, ValueError, IndexError):
            continue  # refused, or the tensors that it asks for are not there
        assert np.abs(changed - plain).max() > MATTERS * np.abs(plain).max(), key


@pytest.mark.parametrize("variant", tiny.families(VARIANTS))
def test_both_forms_of_config_json_are_the_same_model(variant):
    config, tensors = random_model(variant)
    np.testing.assert_array_equal(logits(old_form(config), tensors), logits(config, tensors))


def test_keys_said_to_be_inert_change_nothing():
    for variant in ("gpt2", "llama3", "gemma3", "deepseek_v3"):
        config, tensors = random_model(variant)
        other = {k: "other" if k in INERT - {"model_type", "quantization_config"} else v for k, v in config.items()}
        np.testing.assert_array_equal(logits(other, tensors), logits(config, tensors))
    assert not INERT & SHAPES


@pytest.mark.parametrize("variant", ["gpt2", "qwen3_moe", "gpt_oss-mxfp4", "deepseek_v3"])
def test_tensors_are_let_go_of_before_the_next_layer_is_read(variant):
    config, tensors = random_model(variant)
    alive = weakref.WeakSet()

    class Held(np.ndarray):
        __hash__ = object.__hash__

    def tensor(name):
        assert len(alive) <= 2, name
        fresh = np.array(tensors[name]).view(Held)
        alive.add(fresh)
        return fresh

    forward(config, tensor, IDS)


def test_only_the_chosen_experts_are_read():
    config, tensors = random_model("mixtral")
    read = []
    forward(config, lambda name: read.append(name) or tensors[name], IDS[:1])
    assert len({name.split(".w")[0] for name in read if ".experts." in name}) == 2 * config["num_hidden_layers"]


def test_logits_of_some_rows_are_those_of_all_rows():
    config, tensors = random_model("gemma2")
    some = forward(config, tensors.__getitem__, IDS, rows=[3, -1])
    np.testing.assert_allclose(some, forward(config, tensors.__getitem__, IDS)[[3, -1]], rtol=1e-12)


@pytest.mark.parametrize(("variant", "prefix"), [("gpt2", ""), ("gemma3", "language_model.model."), ("llama2", "")])
def test_other_prefixes_of_published_names(variant, prefix):
    config, tensors = random_model(variant)
    renamed = {name.replace("transformer.", prefix).replace("model.", prefix, 1): x for name, x in tensors.items()}
    other = {"model_type": "gemma3", "text_config": config} if variant == "gemma3" else config
    np.testing.assert_array_equal(logits(other, renamed), logits(config, tensors))


def test_mxfp4_by_the_definition_of_the_format():
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2, 16), np.uint8)
    scales = np.array([[127, 128], [126, 120], [0, 130]], np.uint8)
    got = mxfp4(blocks, scales)
    for row, group, i in np.ndindex(3, 2, 32):
        nibble = int(blocks[row, group, i // 2]) >> 4 * (i % 2) & 15
        sign, exponent, mantissa = -1 if nibble & 8 else 1, nibble >> 1 & 3, nibble & 1
        value = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert got[row, group * 32 + i] == sign * value * 2.0 ** (int(scales[row, group]) - 127)


def test_fp8_blocks_are_multiplied_by_their_scales():
    config, tensors = random_model("deepseek_v3")
    block, packed, plain = (16, 32), {}, {}
    for name, x in tensors.items():
        if "_proj" not in name or not name.endswith("weight"):
            packed[name] = plain[name] = x
            continue
        rows, columns = -(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])
        scale = np.random.default_rng(len(name)).uniform(0.5, 2, (rows, columns)).astype(np.float32)
        packed[name], packed[f"{name}_scale_inv"] = x.astype(ml_dtypes.float8_e4m3fn), scale
        index = np.arange(x.shape[0])[:, None] // block[0], np.arange(x.shape[1]) // block[1]
        plain[name] = packed[name].astype(np.float64) * scale[index]
    quantized = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    np.testing.assert_allclose(logits(quantized, packed), logits(config, plain), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"hidden_act": "sillu"}, "did you mean silu"),
        ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, "did you mean yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"model_type": "deepseek_v2"}, "missing num_experts_per_tok"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, message):
    config, tensors = random_model("llama3")
    with pytest.raises(UserError, match=message):
        forward(config | change, tensors.__getitem__, IDS)


def test_a_folder_gives_the_stored_arrays_and_the_same_logits(tmp_path):
    config, tensors = random_model("qwen2")
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    names = sorted(half)
    save_file(
        {name: half[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    save_file({name: half[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(DataError, match="config.json"):
        Folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = Folder(tmp_path)
    for name in names:
        np.testing.assert_array_equal(folder(name), half[name])
    with pytest.raises(KeyError):
        folder("lm_head.weight")
    np.testing.assert_array_equal(reference_logits(folder, IDS), forward(config, half.__getitem__, IDS))


def test_a_comparison_says_where_the_largest_error_is():
    reference = np.random.default_rng(0).standard_normal((24, 97))
    reference[5, 7] = -20
    ours = reference.copy()
    ours[3, 11] += 20 * 2e-4
    row = compare("x", ours, reference, IDS, start=100)
    assert (row.position, row.token, row.agreement, row.holds) == (103, 11, 1.0, False)
    assert row.error == pytest.approx(2e-4)
    assert "over 0.0001" in table([row])
    assert compare("x", reference + 1e-3, reference, IDS).holds
    ours[9, 9] = np.nan
    assert not compare("x", ours, reference, IDS).holds
    with pytest.raises(DataError, match=r"\(24, 96\).*\(24, 97\)"):
        compare("x", ours[:, :-1], reference, IDS)
    assert perplexity(np.zeros((24, 97)), IDS) == pytest.approx(97)


def test_long_positions_lie_past_the_context_before_scaling():
    for variant, long in (
        ("llama3.1", 32),
        ("phi3-longrope", 32),
        ("llama-linear", 64),
        ("gpt2", 232),
        ("llama3", 232),
    ):
        config, tensors = random_model(variant)
        assert starts(config, 24) == (0, long)
        ours = lambda ids, start: forward(config, tensors.__getitem__, ids, start)  # noqa: B023, E731
        assert all(row.holds and row.error == 0 for row in compare_all(variant, ours, ours, IDS, starts(config, 24)))
