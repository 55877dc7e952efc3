"""Quantised weights go out as compressed-tensors and as blocks of GGUF with the codes they have."""

import dataclasses
import json

import gguf
import jax
import layouts
import numpy as np
import pytest

from jaxllm import api
from jaxllm.adapt.changes import Change
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.cli import main
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import SettingsError
from jaxllm.hf.folder import open_folder
from jaxllm.hf.gguf_export import export_gguf
from jaxllm.hf.gguf_file import read_gguf
from jaxllm.hf.safetensors import Tensors
from jaxllm.model.change import is_weight, weights_of
from jaxllm.sharding import ParallelConfig, make_sharding

pytestmark = pytest.mark.fast
SIZES = {"vocab_size": 320}


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310)


def loaded(folder, words, layout, variant="llama3", chosen="_proj.weight", **changes):
    """A model from a folder in a layout, with the tensors that were written."""
    stored, matrices = layouts.write(folder, layout, variant, chosen, **SIZES | changes)
    opened = open_folder(folder)
    return api.Loaded(*opened.load(), words, 0, opened.family.name, opened.changes), stored, matrices


@pytest.mark.parametrize("layout", ["packed", "packed asymmetric", "packed, 8 bits", "w8a8"])
def test_what_was_read_is_written_again_byte_for_byte(layout, tmp_path, words):
    model, stored, _ = loaded(tmp_path / "a", words, layout)
    api.export(model, tmp_path / "b")
    written = Tensors(tmp_path / "b")
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        assert np.array_equal(written[name].map(), value), name
        assert written[name].dtype == value.dtype, name
    before, after = (json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in "ab")
    assert after["ignore"] == ["lm_head"] and after["format"] == before["format"]
    theirs, ours = (found["config_groups"]["group_0"] for found in (before, after))
    assert {key: ours[key] for key in theirs} == theirs
    again = open_folder(tmp_path / "b").load()[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, again, model.params))


@pytest.mark.parametrize("variant", ["phi3", "qwen3_moe"])
def test_joined_matrices_and_experts_go_back_where_they_were(variant, tmp_path, words):
    changes = {"moe_intermediate_size": 32} if variant == "qwen3_moe" else {}
    model, stored, _ = loaded(tmp_path / "a", words, "packed", variant, **changes)
    api.export(model, tmp_path / "b", dtype="float16")
    written = Tensors(tmp_path / "b")
    assert all(np.array_equal(written[n].map(), x) for n, x in stored.items() if n.endswith(("_packed", "_scale")))
    ignored = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]["ignore"]
    assert any(name.endswith("mlp.gate") for name in ignored) == (variant == "qwen3_moe")


def test_several_schemes_name_their_modules_and_a_table_becomes_floats(tmp_path, words, caplog):
    stored, matrices = layouts.write(tmp_path / "a", "packed", **SIZES)
    layouts.write_dense(tmp_path / "floats", stored, matrices, open_folder(tmp_path / "a").raw)
    opened = open_folder(tmp_path / "floats")
    model = api.Loaded(*opened.load(), words, 0, "llama")
    rules = (
        QuantizeRule(pattern="**/mlp/*", format="int4", group=32),
        QuantizeRule(pattern="embed,layers/**", format="int8"),
    )
    model = model.change(Change(quantize=QuantizeConfig(rules=rules)))
    api.export(model, tmp_path / "b")
    assert "embed_tokens is written as the floats" in caplog.text
    config = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    bits = {name: g["weights"]["num_bits"] for g in config["config_groups"].values() for name in g["targets"]}
    assert bits["model.layers.1.mlp.up_proj"] == 4 and bits["model.layers.0.self_attn.k_proj"] == 8 and len(bits) == 14
    again = weights_of(open_folder(tmp_path / "b").load()[1])
    mine = weights_of(model.params)
    assert np.allclose(again.pop("embed"), mine.pop("embed").dense(np.float32), rtol=1e-6)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, mine))


def test_a_padded_vocabulary_is_not_written(tmp_path, words):
    layouts.write(tmp_path / "a", "packed", chosen=("_proj.weight", "lm_head.weight"), vocab_size=321)
    opened = open_folder(tmp_path / "a")
    sharding = make_sharding(ParallelConfig(fsdp=4, tensor=2))
    model = api.Loaded(*opened.load(sharding, vocab_multiple=8), words, 0, "llama", opened.changes)
    api.export(model, tmp_path / "b")
    assert Tensors(tmp_path / "b")["lm_head.weight_packed"].shape == (321, 8)


REFUSED = [
    ("nf4", "hf", r"stored as nf4, which to=hf does not write .*jaxllm merge"),
    ("gptq ordered", "hf", "ordered=true.*quantise without it"),
    ("nf4", "gguf", r"stored as nf4, which has no type in GGUF.*jaxllm merge"),
    ("packed asymmetric", "gguf", "with zeros of its own"),
    ("w8a8", "gguf", "with 8-bit activations"),
]


@pytest.mark.parametrize("layout, to, message", REFUSED)
def test_what_others_cannot_read_is_refused_with_the_next_step(layout, to, message, tmp_path, words):
    model, _, _ = loaded(tmp_path / "a", words, layout)
    with pytest.raises(SettingsError, match=message):
        api.export(model, tmp_path / "b", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


#: variant, layout, changes, tensor of the file, of the folder (experts: a list), what happens to rows.
PAIRS = np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()
MOE = {"sliding_window": None}
PARTIAL = {"rope_type": "default", "rope_theta": 3e3, "partial_rotary_factor": 0.5}
BLOCKS = [
    ("llama3", "packed", {}, "attn_q.weight", "self_attn.q_proj", PAIRS),
    ("llama3", "packed", {}, "ffn_down.weight", "mlp.down_proj", slice(None)),
    ("llama3", "packed, 8 bits", {}, "attn_q.weight", "self_attn.q_proj", PAIRS),
    ("phi3", "packed", {"sliding_window": None}, "attn_qkv.weight", "self_attn.qkv_proj", slice(None)),
    ("mixtral", "packed", MOE, "ffn_down_exps.weight", "block_sparse_moe.experts.{e}.w2", slice(None)),
]


@pytest.mark.parametrize("variant, layout, changes, name, module, rows", BLOCKS, ids=[f"{c[0]}-{c[3]}" for c in BLOCKS])
def test_blocks_of_gguf_hold_the_codes_and_half_precision_scales(
    variant, layout, changes, name, module, rows, tmp_path, words
):
    chosen = (".w1.weight", ".w2.weight", ".w3.weight") if variant == "mixtral" else "_proj.weight"
    if variant == "phi3":
        changes = changes | {"rope_parameters": PARTIAL}
    model, _, matrices = loaded(tmp_path / "a", words, layout, variant, chosen, **changes)
    api.export(model, tmp_path / "b.gguf", to="gguf")
    entry = read_gguf(tmp_path / "b.gguf").tensors[f"blk.1.{name}"]
    assert entry.kind.name == ("Q8_0" if "8 bits" in layout else "Q4_0")
    names = [f"model.layers.1.{module.format(e=e)}.weight" for e in range(6 if "{e}" in module else 1)]
    dense = np.stack([matrices[name].dense[rows] for name in names])
    assert np.array_equal(entry.map().reshape(dense.shape), dense)  # their scales are in half precision already
    kinds = {found.kind.name for found in read_gguf(tmp_path / "b.gguf").tensors.values()}
    assert kinds == {"F32", entry.kind.name}


@pytest.mark.parametrize(
    "scale, message",
    [((2, 128, 2), "up_proj.weight has a scale of .*half precision"), ((2, 128, 4), "groups of 16, .*--group 32")],
)
def test_scales_that_blocks_cannot_hold_are_refused(scale, message, tmp_path, words):
    model, _, _ = loaded(tmp_path / "a", words, "packed")
    weights = weights_of(model.params)
    weights["layers/0/mlp/up"] = dataclasses.replace(weights["layers/0/mlp/up"], scale=np.full(scale, 1e6, np.float32))
    params = jax.tree.structure(model.params, is_leaf=is_weight).unflatten(weights.values())
    with pytest.raises(SettingsError, match=message):
        export_gguf(model.model.config, params, words, tmp_path / "b.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_floats_as_q4_0_are_within_their_rounding(tmp_path, words):
    model, _, matrices = loaded(tmp_path / "a", words, "packed, 8 bits")
    api.export(model.plain(), tmp_path / "b.gguf", to="gguf", dtype="q4_0")
    file = read_gguf(tmp_path / "b.gguf")
    assert file.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    entry, dense = file.tensors["blk.0.ffn_up.weight"], matrices["model.layers.0.mlp.up_proj.weight"].dense
    assert entry.kind.name == "Q4_0" and file.tensors["token_embd.weight"].kind.name == "Q4_0"
    blocks = dense.reshape(128, -1, 32)
    bound = np.abs(blocks).max(-1, keepdims=True) / 8 * 1.01  # the other end of the range is one step short
    assert np.all(np.abs(entry.map().reshape(blocks.shape) - blocks) <= bound)


def test_a_gguf_file_can_be_quantised(here, tmp_path, words):
    """The floats behind its blocks are rounded again."""
    model, _, _ = loaded(tmp_path / "a", words, "packed")
    api.export(model, "b.gguf", to="gguf")
    assert main(["quantize", "b.gguf", "--format", "int8", "--group", "32", "--out", "c"]) == 0
    report = json.loads((tmp_path / "c/report.json").read_text())
    assert 0 < max(max(layers) for layers in report["errors"].values()) < 0.01
    assert [change.quantize.rules[0].group for change in api.load("c").changes] == [32]
