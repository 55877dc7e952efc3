"""GGUF files in and out: every architecture and dtype, what is stored where, and what cannot be said."""

import dataclasses
import sys

import gguf
import numpy as np
import pytest
import tiny

from jaxllm import tree
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, MissingExtra, SettingsError
from jaxllm.families.export import essence
from jaxllm.families.registry import read_config
from jaxllm.hf import gguf_file
from jaxllm.hf.gguf import open_gguf
from jaxllm.hf.gguf_export import export_gguf
from jaxllm.hf.gguf_file import PLAIN, read_gguf
from jaxllm.hf.gguf_rope import canonical
from jaxllm.hf.weights import read
from jaxllm.model.build import build
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS

PARTIAL = {"rope_type": "default", "rope_theta": 3e3, "partial_rotary_factor": 0.5}
#: llama.cpp reads no other bounds than 32 and 1; both lie between the dimensions of these heads.
YARN = {"rope_type": "yarn", "rope_theta": 30.0, "factor": 8.0, "original_max_position_embeddings": 64}
#: variant: (architecture, what of config.json differs from `tiny.VARIANTS`, so that llama.cpp can compute it).
EXPORTABLE = {
    "gpt2": ("gpt2", {}),
    "llama2": ("llama", {}),
    "llama3": ("llama", {}),
    "llama3.1": ("llama", {}),
    "llama3.2": ("llama", {}),
    "llama-linear": ("llama", {}),
    "mistral-full": ("llama", {}),
    "mixtral": ("llama", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2.5-yarn": ("qwen2", {"use_sliding_window": False, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "qwen3_moe": ("qwen3moe", {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16}),
    "gemma3-old": ("gemma3", {"query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL}),
    "phi3-longrope": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"clip_qkv": None, "num_key_value_heads": 4}),
    "smollm2": ("llama", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "gpt_oss": (
        "gpt-oss",
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_parameters": YARN | {"truncate": False}},
    ),
}
#: What llama.cpp has no architecture for: what differs from `tiny.VARIANTS`, and a setting that the error names.
REFUSED = {
    "llama-dynamic": ({}, "rope"),
    "mistral": ({}, "layer.0.attn.window=7"),
    "phi3": ({}, "layer.0.attn.window=7"),
    "mixtral": ({}, "layer.0.attn.window=7"),
    "qwen2.5-yarn": ({}, "layer.1.attn.window=7"),
    "qwen3_moe": ({}, "layer.0.moe.experts=None"),
    "qwen3": ({"attention_bias": True, "rope_parameters": YARN}, "qkv_bias=True"),
    "qwen2": ({"rope_parameters": YARN | {"beta_fast": 2.0}}, "rope.beta_fast=2.0"),
    "gemma2": ({}, "layer.0.attn.scale=0.158"),
    "gemma3": ({"hidden_activation": "silu"}, "activation"),
    "smollm3": ({}, "rope"),
    "olmoe": ({"clip_qkv": None, "num_key_value_heads": 4, "norm_topk_prob": True}, "renormalize"),
    "deepseek_v3": ({}, "layer.0.attn"),
}


@pytest.fixture(scope="module")
def words():
    """A tokenizer with fewer ids than the models have rows."""
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310)


@dataclasses.dataclass
class Held:
    value: np.ndarray

    @property
    def shape(self):
        return self.value.shape

    def map(self):
        return self.value


def random(variant: str, **changes):
    """config.json and tensors of a random model with a vocabulary of 320."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "changed", VARIANTS[variant] | {"vocab_size": 320} | changes)
        return random_model("changed")


def small(variant: str, **changes):
    """Its settings and weights."""
    raw, tensors = random(variant, **changes)
    family, config, _ = read_config(raw)
    return config, read(build(config), family, {name: Held(value) for name, value in tensors.items()})


def leaves(config, params):
    """`{path: array}` without rows that pad the vocabulary."""
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(params).items()}
    return {path: leaf[: config.vocab] if path in ("embed", "head") else leaf for path, leaf in flat.items()}


@pytest.mark.parametrize("variant", tiny.families(EXPORTABLE))
def test_exported_and_imported_weights_are_bit_equal(variant, tmp_path, words):
    architecture, changes = EXPORTABLE[variant]
    config, params = small(variant, **changes)
    assert export_gguf(config, params, words, tmp_path / "a.gguf") == architecture
    opened = open_gguf(tmp_path / "a.gguf")
    assert str(essence(canonical(opened.config))) == str(essence(canonical(config)))
    before, after = leaves(config, params), leaves(opened.config, opened.load()[1])
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if path.endswith(("scale", "q_norm", "k_norm")) and variant.startswith("gemma"):
            np.testing.assert_allclose(after[path], leaf, rtol=0, atol=2.5e-7)  # 1 + w loses the last bits of w
        else:
            assert np.array_equal(after[path], leaf), path


@pytest.mark.parametrize("variant", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_setting(variant, tmp_path, words):
    changes, named = REFUSED[variant]
    config, params = small(variant, **changes)
    with pytest.raises(SettingsError, match=f"no architecture.*{named}"):
        export_gguf(config, params, words, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["gemma2", "llama3.1", "gpt_oss"])
def test_a_file_imported_and_exported_again_is_the_same_file(variant, tmp_path, words):
    config, params = small(variant, **EXPORTABLE[variant][1])
    (tmp_path / "b").mkdir()
    export_gguf(config, params, words, tmp_path / "a.gguf")
    opened = open_gguf(tmp_path / "a.gguf")
    export_gguf(opened.config, opened.load()[1], opened.tokenizer(), tmp_path / "b/a.gguf")
    first, second = (read_gguf(tmp_path / name) for name in ("a.gguf", "b/a.gguf"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(np.array_equal(entry.map(), second.tensors[name].map()) for name, entry in first.tensors.items())
    own = [key for key in first.metadata if not key.startswith("tokenizer")]
    assert {key: str(first.metadata[key]) for key in own} == {key: str(second.metadata[key]) for key in own}


#: variant: {tensor of the file: what it must be, made of a folder's tensors `t` by their names in layer 1}.
STORED = {
    "llama3": {
        # Two rotated rows side by side: head 0 is stored as rows 0 8 1 9 2 10 ...
        "attn_q.weight": lambda t: t("self_attn.q_proj.weight")[np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).ravel()],
        "attn_k.weight": lambda t: t("self_attn.k_proj.weight")[np.arange(32).reshape(2, 2, 8).swapaxes(1, 2).ravel()],
        "attn_v.weight": lambda t: t("self_attn.v_proj.weight"),
        "ffn_norm.weight": lambda t: t("post_attention_layernorm.weight"),
    },
    "qwen3": {"attn_q.weight": lambda t: t("self_attn.q_proj.weight")},
    "gemma2": {
        "post_attention_norm.weight": lambda t: 1 + t("post_attention_layernorm.weight"),
        "ffn_norm.weight": lambda t: 1 + t("pre_feedforward_layernorm.weight"),
    },
    "gpt2": {"attn_qkv.weight": lambda t: t("attn.c_attn.weight").T, "ffn_down.bias": lambda t: t("mlp.c_proj.bias")},
    "mixtral": {
        "ffn_gate_exps.weight": lambda t: np.stack([t(f"block_sparse_moe.experts.{e}.w1.weight") for e in range(6)]),
        "ffn_down_exps.weight": lambda t: np.stack([t(f"block_sparse_moe.experts.{e}.w2.weight") for e in range(6)]),
    },
    "phi3": {"ffn_up.weight": lambda t: t("mlp.gate_up_proj.weight")},
    "gpt_oss": {
        "ffn_gate_exps.weight": lambda t: t("mlp.experts.gate_up_proj")[:, :, 0::2].swapaxes(1, 2),
        "ffn_up_exps.bias": lambda t: t("mlp.experts.gate_up_proj_bias")[:, 1::2],
        "ffn_down_exps.weight": lambda t: t("mlp.experts.down_proj").swapaxes(1, 2),
        "post_attention_norm.weight": lambda t: t("post_attention_layernorm.weight"),
        "attn_sinks.weight": lambda t: t("self_attn.sinks"),
    },
}


@pytest.mark.parametrize("variant", STORED)
def test_tensors_are_stored_in_the_form_that_llama_cpp_reads(variant, tmp_path, words):
    config, params = small(variant, **EXPORTABLE[variant][1])
    export_gguf(config, params, words, tmp_path / "a.gguf")
    raw, tensors = random(variant, **EXPORTABLE[variant][1])
    prefix = "transformer.h.1." if variant == "gpt2" else "model.layers.1."
    found = read_gguf(tmp_path / "a.gguf").tensors
    for name, made in STORED[variant].items():
        assert np.array_equal(found[f"blk.1.{name}"].map(), made(lambda theirs: tensors[prefix + theirs])), name


@pytest.mark.parametrize(
    "dtype, kind, bound", [("f16", "F16", 2**-11), ("bf16", "BF16", 2**-8), ("q8_0", "Q8_0", 1 / 254 + 2**-11)]
)
def test_smaller_dtypes_are_within_their_rounding_and_vectors_stay_exact(dtype, kind, bound, tmp_path, words):
    config, params = small("mixtral", sliding_window=None, hidden_size=64, head_dim=16)
    export_gguf(config, params, words, tmp_path / "a.gguf", dtype=dtype)
    export_gguf(config, params, words, tmp_path / "b.gguf")
    exact = read_gguf(tmp_path / "b.gguf").tensors
    for name, entry in read_gguf(tmp_path / "a.gguf").tensors.items():
        a, b = np.asarray(entry.map(), np.float32), exact[name].map()
        if b.ndim == 1 or "gate_inp" in name:
            assert np.array_equal(a, b) and entry.kind.name == "F32", name
            continue
        # Rows of 56 have no blocks of 32: f16.
        assert entry.kind.name == (kind if kind != "Q8_0" or b.shape[-1] % 32 == 0 else "F16"), name
        scale = np.abs(b) if kind != "Q8_0" else np.abs(b).max(-1, keepdims=True)
        assert (np.abs(a - b) <= 1.01 * bound * scale + 1e-7).all(), name


def test_a_number_beyond_a_dtype_is_refused(tmp_path, words):
    config, params = small("qwen2")
    params["embed"] = params["embed"].at[0, 0].set(1e5)
    with pytest.raises(SettingsError, match="token_embd.weight holds 100000.*bf16 or f32"):
        export_gguf(config, params, words, tmp_path / "a.gguf", dtype="f16")
    assert not list(tmp_path.iterdir())


def packed(path, kind, rng, rows=9):
    """A file with one tensor of random bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "llama")
    data = rng.integers(0, 256, (rows, 2 * size), np.uint8)
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


KINDS = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name[0] in "QITNM" and not kind.name.startswith("I") or "IQ" in kind.name
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_that_the_library_dequantises_is_read_piece_by_piece(kind, tmp_path, monkeypatch):
    data = packed(tmp_path / "a.gguf", kind, np.random.default_rng(0))
    monkeypatch.setattr(gguf_file, "CHUNK", 4 * 2 * gguf.GGML_QUANT_SIZES[kind][0])
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(data, kind)
    except NotImplementedError:
        with pytest.raises(DataError, match=f"type {kind.name}.*Q8_0 or F16"):
            read_gguf(tmp_path / "a.gguf")
        return
    entry = read_gguf(tmp_path / "a.gguf").tensors["x"]
    assert np.array_equal(entry.map(), expected, equal_nan=True)
    assert entry.shape == expected.shape and kind.name not in PLAIN


def test_the_factors_of_llama_3_1_become_its_rule_again(tmp_path, words):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    rope |= {"original_max_position_embeddings": 8192}
    config, params = small("llama3.1", rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    export_gguf(config, params, words, tmp_path / "a.gguf")
    assert str(essence(open_gguf(tmp_path / "a.gguf").config)) == str(essence(config))


def test_the_library_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"jaxllm\[gguf\]"):
        open_gguf(tmp_path / "a.gguf")
