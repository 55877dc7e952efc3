"""Folders quantised by others: their codes become ours, bit for bit, and compute what the floats behind them do."""

import json
import types

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import tiny

from jaxllm import api
from jaxllm.adapt.changes import Change
from jaxllm.adapt.lora import LoraConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError
from jaxllm.hf import compressed, gptq
from jaxllm.hf.folder import open_folder
from jaxllm.model.change import weights_of
from jaxllm.parity.prove import Held
from jaxllm.sharding import ParallelConfig, make_sharding
from jaxllm.weights.formats import get_format
from jaxllm.weights.quantized import Quantized

pytestmark = pytest.mark.fast
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def load(folder):
    return open_folder(folder).load()[1]


def dense(params):
    """`{path: float32 array}` of weights of any type."""

    def one(w):
        if not isinstance(w, Quantized):
            return np.asarray(w)
        values = w.matrix(jnp.float32)
        stacked = values.ndim > len(w.form.experts) + 2
        return np.asarray(jax.vmap(w.form.weight)(values) if stacked else w.form.weight(values))

    return {path: one(w) for path, w in weights_of(params).items()}


def both(folder, layout, variant="llama3", chosen="_proj.weight", **changes):
    """Weights of a quantised folder, those of its floats, and the matrices in it."""
    stored, matrices = layouts.write(folder / "q", layout, variant, chosen, **changes)
    layouts.write_dense(folder / "dense", stored, matrices, open_folder(folder / "q").raw)
    return load(folder / "q"), load(folder / "dense"), matrices


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_codes_are_kept_bit_for_bit_and_stand_for_the_same_floats(layout, tmp_path):
    params, floats, matrices = both(tmp_path, layout)
    values, expected = dense(params), dense(floats)
    for path in expected:
        np.testing.assert_allclose(values[path], expected[path], rtol=2e-7, atol=1e-9, err_msg=path)
    q, m = params["layers"]["0"]["attn"]["q"], matrices[f"{Q}.weight"]
    assert isinstance(q, Quantized) and q.scale.dtype == jnp.float32
    order = np.argsort(m.group_I, kind="stable")
    assert (q.order is not None) == (layout == "gptq ordered")
    codes = np.asarray(get_format(q.format).unpack(q.codes[1])).astype(np.float32)
    if q.format != "fp8":
        assert np.array_equal(codes, m.codes[:, order])
    assert np.array_equal(q.scale[1], m.scale)
    assert (q.zero is None) == ("asymmetric" in layout or layout in ("gptq ordered", "gptq v2, 8 bits", "awq")) ^ True
    assert q.activations == ("int8" if layout == "w8a8" else None)


#: Joined tensors, experts, rows in pairs for RoPE (deepseek), bias beside the codes (qwen2), a head of codes.
FAMILIES = [
    ("phi3", "packed", "_proj.weight", {}),
    ("qwen3_moe", "gptq", "_proj.weight", {"moe_intermediate_size": 32, "head_dim": 16}),
    pytest.param(
        *("deepseek_v3", "w8a8", ("_proj.weight", "_mqa.weight"), {"first_k_dense_replace": 1, "num_hidden_layers": 3}),
        marks=pytest.mark.slow,
    ),
    ("qwen2", "awq", "_proj.weight", {}),
    ("llama3", "packed", ("_proj.weight", "lm_head.weight"), {}),
]


@pytest.mark.parametrize("variant, layout, chosen, changes", FAMILIES)
def test_rows_go_where_the_family_puts_them(variant, layout, chosen, changes, tmp_path):
    params, floats, _ = both(tmp_path, layout, variant, chosen, **changes)
    values, expected = dense(params), dense(floats)
    for path in expected:
        np.testing.assert_allclose(values[path], expected[path], rtol=2e-7, atol=1e-9, err_msg=path)
    assert sum(isinstance(w, Quantized) for w in weights_of(params).values()) >= 6


@pytest.mark.parametrize("layout", ["gptq ordered", "nf4"])
def test_logits_are_those_of_the_floats(layout, tmp_path):
    stored, matrices = layouts.write(tmp_path / "q", layout)
    layouts.write_dense(tmp_path / "dense", stored, matrices, open_folder(tmp_path / "q").raw)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 24)))

    def logits(folder):
        model, params = open_folder(folder).load()
        return jax.jit(lambda p, ids: model.unembed(model.head(p), model.apply(p, ids)[0]))(params, ids)

    assert tiny.relative(logits(tmp_path / "q"), logits(tmp_path / "dense")) < 1e-5


def test_devices_and_a_padded_vocabulary_change_no_code(tmp_path):
    layouts.write(tmp_path / "q", "packed", chosen=("_proj.weight", "lm_head.weight"), vocab_size=97)
    one = weights_of(load(tmp_path / "q"))
    sharding = make_sharding(ParallelConfig(fsdp=4, tensor=2))
    eight = weights_of(open_folder(tmp_path / "q").load(sharding, vocab_multiple=8)[1])
    assert eight["head"].shape == (104, 64) and not np.asarray(eight["head"].scale[97:]).any()
    assert not eight["layers/0/mlp/up"].codes.sharding.is_fully_replicated
    for path, weight in one.items():
        pairs = zip(jax.tree.leaves(weight), jax.tree.leaves(eight[path]), strict=True)
        assert all(np.array_equal(a, np.asarray(b)[:97] if path in ("head", "embed") else b) for a, b in pairs), path


@pytest.mark.slow
def test_every_verb_takes_what_was_loaded(tmp_path):
    layouts.write(tmp_path / "q", "gptq ordered", vocab_size=320)
    Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310).to_hf(tmp_path / "q")
    loaded = api.load(tmp_path / "q")
    assert [change.quantize.rules[0].format for change in loaded.changes] == ["int4"]
    api.save(loaded, tmp_path / "saved")
    again = api.load(tmp_path / "saved")
    assert tiny.bit_equal(again.params, loaded.params) and again.changes == loaded.changes
    said = api.generate(again, "the quick", max_tokens=4, temperature=0)[0].ids
    assert said == api.generate(loaded.plain(), "the quick", max_tokens=4, temperature=0)[0].ids and len(said) == 4
    merged = dense(again.change(Change(lora=LoraConfig(rank=2))).plain().params)
    for path, value in dense(loaded.params).items():
        np.testing.assert_allclose(merged[path], value, rtol=1e-6, atol=1e-8)


def test_a_bias_of_zeros_is_nothing_and_another_one_is_refused(tmp_path):
    """AutoGPTQ gives every matrix a bias."""
    layouts.write(tmp_path / "q", "gptq", edit=lambda t: t | {f"{Q}.bias": np.zeros(64, np.float16)})
    load(tmp_path / "q")
    layouts.write(tmp_path / "r", "gptq", edit=lambda t: t | {f"{Q}.bias": np.ones(64, np.float16)})
    with pytest.raises(DataError, match=f"{Q}.bias .* not in a llama model"):
        load(tmp_path / "r")


def test_plain_weights_are_not_made_of_codes_in_silence(tmp_path):
    from jaxllm.hf.weights import read
    from jaxllm.model.build import build

    layouts.write(tmp_path / "q", "packed")
    opened = open_folder(tmp_path / "q")
    with pytest.raises(SettingsError, match="stored in int4, and layers/0/attn/q is wanted in floats"):
        read(build(opened.config), opened.family, opened.tensors())


def without(*names):
    return lambda t: {name: x for name, x in t.items() if name not in names}


def change(name, f):
    return lambda t: t | {name: f(t[name])}


def state(**keys):
    """The state of a matrix of bitsandbytes with other keys."""
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"

    def edit(t):
        return t | {name: np.frombuffer(json.dumps(json.loads(t[name].tobytes()) | keys).encode(), np.uint8)}

    return edit


BAD = [
    ("gptq", None, {"bits": 3}, "bits=3.*4 and 8 bits as gptq"),
    ("gptq", None, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    ("gptq", without(f"{Q}.g_idx"), {"desc_act": True}, f"no tensor {Q}.g_idx"),
    ("gptq", without(f"{Q}.scales"), {}, f"no tensor {Q}.scales"),
    ("gptq", change(f"{Q}.g_idx", np.zeros_like), {}, "does not give each of 2 groups 32 inputs"),
    ("gptq", change(f"{Q}.qweight", lambda x: x[:-1]), {}, "in 2 groups|g_idx is int32"),
    ("gptq", change(f"{Q}.qweight", lambda x: x.astype(np.int64)), {}, "qweight is int64"),
    ("gptq", change(f"{Q}.qzeros", lambda x: x[:, :-1]), {}, r"qzeros is int32\[2, 7\], .* int32\[2, 8\]"),
    ("gptq", None, {"quant_method": "aqlm"}, "quant_method='aqlm' is not read here; known: fp8, mxfp4, gptq"),
    ("awq", None, {"version": "gemv"}, "version='gemv'"),
    ("awq", change(f"{DOWN}.scales", lambda x: x[:, :-8]), {}, "down_proj.scales is float16"),
    ("packed", without(f"{Q}.weight_shape"), {}, "no tensor .*weight_shape"),
    ("packed", change(f"{Q}.weight_packed", lambda x: x[:, :6]), {}, "in neither 4 nor 8 bits"),
    ("packed", change(f"{Q}.weight_scale", lambda x: x[:, :1].repeat(3, 1)), {}, r"float32\[64, 3\].*does not divide"),
    ("packed", change(f"{Q}.weight_scale", lambda x: x[:, :1]), {}, "stored in different ways"),
    ("packed", None, {"format": "marlin-24"}, "format='marlin-24' is not read"),
    ("packed", None, {"config_groups": None}, "config_groups must hold"),
    ("packed", None, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("packed", without(*[f"{Q}.weight_{part}" for part in ("packed", "scale", "shape")]), {}, f"{Q}.weight is missing"),
    (
        "w8a8",
        None,
        {"config_groups": layouts.group_args(8, 0, activations=layouts.TOKEN | {"dynamic": False})},
        "input_activations with dynamic=False",
    ),
    ("int8 asymmetric", change(f"{Q}.weight_zero_point", lambda x: x[:-1]), {}, "weight_zero_point is int8"),
    ("nf4", None, {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
    ("nf4", state(shape=[64]), {}, "quant_state.* is damaged"),
    ("nf4", state(shape=[64, 48]), {}, "48 inputs in blocks of 64"),
    ("nf4", state(shape=[32, 64]), {}, "two codes a byte of 32 x 64"),
    ("nf4", change(f"{Q}.weight.quant_map", lambda x: x + 0.1), {}, "other levels than nf4"),
    ("nf4", change(f"{Q}.weight.absmax", lambda x: x[:-1]), {}, "absmax is float32"),
    ("nf4 nested", without(f"{Q}.weight.nested_absmax"), {}, "nested_absmax"),
]


@pytest.mark.parametrize("layout, edit, settings, message", BAD, ids=[f"{case[0]}-{case[3][:30]}" for case in BAD])
def test_damaged_and_unknown_folders_say_what_is_wrong(layout, edit, settings, message, tmp_path):
    layouts.write(tmp_path / "q", layout, edit=edit, settings=settings)
    with pytest.raises((DataError, SettingsError), match=message):
        load(tmp_path / "q")


def test_a_matrix_of_another_model_names_both_shapes(tmp_path):
    layouts.write(tmp_path / "q", "packed")
    config = json.loads((tmp_path / "q/config.json").read_text())
    (tmp_path / "q/config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(DataError, match="gate_proj.weight make 128 x 64 codes, and config.json makes it 192 x 64"):
        load(tmp_path / "q")


def test_a_quantised_folder_without_its_settings_is_refused(tmp_path):
    layouts.write(tmp_path / "q", "gptq")
    config = json.loads((tmp_path / "q/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="quantize_config.json: copy it there"):
        load(tmp_path / "q")


def test_a_truncated_file_is_refused(tmp_path):
    layouts.write(tmp_path / "q", "awq")
    file = tmp_path / "q/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="header is damaged"):
        load(tmp_path / "q")


def test_layers_of_one_stack_must_be_stored_alike(tmp_path):
    stored, matrices = layouts.write(tmp_path / "q", "packed")
    plain = {f"{Q}.weight": matrices[f"{Q}.weight"].dense}
    edit = lambda t: without(*[f"{Q}.weight_{p}" for p in ("packed", "scale", "shape")])(t) | plain  # noqa: E731
    layouts.write(tmp_path / "r", "packed", edit=edit)
    with pytest.raises(SettingsError, match="layers/0/attn/q is one stack here"):
        load(tmp_path / "r")


def test_rows_of_a_block_are_what_the_settings_say():
    """576 rows in blocks of 128 have five scales, the last for half a block: not 116 rows each."""
    scale = types.SimpleNamespace(shape=(5, 4), dtype=np.dtype("float32"))
    assert compressed._blocks("kv", scale, 576, 512, {(128, 128)}) == (128, 4)
    for blocks in (set(), {(64, 128)}, {(128, 64)}):
        with pytest.raises(DataError, match="groups of one size"):
            compressed._blocks("kv", scale, 576, 512, blocks)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_fill_no_whole_words(symmetric):
    """12 outputs of 4 bits take a word and a half: what pads the second is no zero point."""
    m = layouts.matrix(np.random.default_rng(0), (12, 64), symmetric=symmetric)
    coded = gptq._gptq(Held(layouts.gptq("m.weight", m)), "m", 4, True, False)
    assert coded.shape == (12, 64) and coded.symmetric is symmetric
    np.testing.assert_allclose(coded.map(), m.dense, rtol=1e-6)
