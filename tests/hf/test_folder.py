"""Hugging Face folders in and out: shards, dtypes, devices, and what damaged ones say."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from jaxllm import tree
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.export import cast, write_shards
from jaxllm.hf.folder import is_folder, open_folder
from jaxllm.hf.safetensors import INDEX, SINGLE, Tensors, read_header
from jaxllm.hf.weights import write
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS
from jaxllm.sharding import ParallelConfig, make_sharding

pytestmark = pytest.mark.fast


def save(folder, variant="llama3.1", *, change=None, shard=1 << 30, **keys):
    """A folder of a random model; `change` edits its tensors first."""
    raw, tensors = random_model(variant)
    tensors = tensors if change is None else change(dict(tensors))
    folder.mkdir(exist_ok=True)
    write_shards(folder, tensors.items(), shard)
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return folder, tensors


def leaves(params):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[path].tobytes() == b[path].tobytes() for path in a)


@pytest.mark.parametrize("variant", tiny.families(VARIANTS))
def test_import_export_and_import_again_are_bit_equal(variant, tmp_path):
    folder, tensors = save(tmp_path / "a", variant)
    opened = open_folder(folder)
    model, params = opened.load()
    written = dict(write(opened.family, opened.config, params))
    if "quantization_config" not in opened.raw:
        assert written.keys() == tensors.keys()
        assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    raw = {key: value for key, value in opened.raw.items() if key != "quantization_config"}
    write_shards(make(tmp_path / "b"), written.items(), 1 << 30)
    (tmp_path / "b/config.json").write_text(json.dumps(raw))
    assert equal(leaves(open_folder(tmp_path / "b").load()[1]), leaves(params))


def make(folder):
    folder.mkdir()
    return folder


def test_shards_and_devices_change_no_bit(tmp_path):
    whole = leaves(open_folder(save(tmp_path / "one", "mixtral")[0]).load()[1])
    folder, tensors = save(tmp_path / "many", "mixtral", shard=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3 and not (folder / SINGLE).exists()
    assert equal(leaves(open_folder(folder).load()[1]), whole)
    eight = make_sharding(ParallelConfig(fsdp=2, tensor=2, expert=2))
    with pytest.raises(SettingsError, match="vocab=97 does not divide"):
        open_folder(folder).load(eight)
    _, spread = open_folder(folder).load(eight, vocab_multiple=2)
    assert not spread["embed"].sharding.is_fully_replicated
    padded = leaves(spread)
    for name in ("embed", "head"):
        assert padded[name].shape == (98, 48) and not padded[name][97:].any()
        padded[name] = padded[name][:97]
    assert equal(padded, whole)


def test_weights_are_no_longer_the_file(tmp_path):
    """jax on CPU would keep aligned memory as it is, a file's too, and weights would change with it."""
    folder, _ = save(tmp_path / "x")
    edit_header(folder, lambda header: None, align=64)
    one = make_sharding(ParallelConfig(data=1, fsdp=1), devices=jax.devices()[:1])  # it takes whole tensors
    _, params = open_folder(folder).load(one)
    before = leaves(jax.tree.map(np.array, params))
    start = min(entry.start for entry in read_header(folder / SINGLE).values())
    with (folder / SINGLE).open("r+b") as stream:
        size = stream.seek(0, 2)
        stream.seek(start)
        stream.write(bytes(size - start))
    assert equal(leaves(params), before)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stored_dtypes_are_read_exactly(dtype, tmp_path):
    folder, tensors = save(tmp_path / "x", change=lambda t: {name: x.astype(dtype) for name, x in t.items()})
    _, params = open_folder(folder).load()
    name = "model.norm.weight"
    assert np.array_equal(np.asarray(params["norm"]["scale"]), tensors[name].astype(np.float32))
    _, small = open_folder(folder).load(dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(small)} == {"bfloat16"}


def test_float8_blocks_are_multiplied_by_their_scales(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"  # 56 x 48, in blocks of 32: two by two, the last ones cut

    def quantise(tensors):
        scales = np.array([[0.5, 2.0], [4.0, 0.25]], np.float32)
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        return tensors | {name + "_scale_inv": scales}

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    folder, tensors = save(tmp_path / "x", change=quantise, quantization_config=settings)
    up = np.asarray(open_folder(folder).load()[1]["layers"]["0"]["mlp"]["up"][1]).T
    for rows, columns, scale in ((slice(0, 32), slice(0, 32), 0.5), (slice(32, 56), slice(32, 48), 0.25)):
        assert np.array_equal(up[rows, columns], tensors[name][rows, columns].astype(np.float32) * scale)
    plain = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "aqlm"}}
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(SettingsError, match="quant_method='aqlm' is not read here; known: fp8, mxfp4"):
        open_folder(folder).load()


def test_the_folder_of_a_bare_decoder_and_a_tied_head_are_read(tmp_path):
    def bare(tensors):
        return {name.removeprefix("model."): x for name, x in tensors.items()}

    plain = leaves(open_folder(save(tmp_path / "a", "llama3.2")[0]).load()[1])
    assert equal(leaves(open_folder(save(tmp_path / "b", "llama3.2", change=bare)[0]).load()[1]), plain)
    head = {"lm_head.weight": random_model("llama3.2")[1]["model.embed_tokens.weight"]}
    folder, _ = save(tmp_path / "c", "llama3.2", change=lambda t: t | head)
    assert equal(leaves(open_folder(folder).load()[1]), plain)


def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path):
    head = {"lm_head.weight": 2 * random_model("llama3.2")[1]["model.embed_tokens.weight"]}
    folder, _ = save(tmp_path / "x", "llama3.2", change=lambda t: t | head)
    with pytest.raises(DataError, match="lm_head.weight differs from model.embed_tokens.weight"):
        open_folder(folder).load()


def edit_header(folder, change, align=1):
    """Rewrites the header of a folder's only file; spaces after it align the data."""
    path = folder / SINGLE
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def drop(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


Q = "model.layers.0.self_attn.q_proj.weight"
HEADERS = {
    "offsets": (lambda h: h[Q].update(data_offsets=[0, 10**9]), r"bytes 0 to 1,000,000,000 of"),
    "shape": (lambda h: h[Q].update(shape=[64, 47]), r"12,288 bytes for F32\[64, 47\], which needs 12,032"),
    "negative": (lambda h: h[Q].update(shape=[-64, -48]), "are no sizes"),
    "dtype": (lambda h: h[Q].update(dtype="F4"), "dtype 'F4' is not known"),
    "keys": (lambda h: h[Q].pop("shape"), "its header is damaged"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(name, tmp_path):
    change, message = HEADERS[name]
    folder, _ = save(tmp_path / "x")
    edit_header(folder, change)
    with pytest.raises(DataError, match=message):
        open_folder(folder).load()


def test_a_mutated_header_is_refused_or_describes_what_is_in_the_file(tmp_path):
    folder, tensors = save(tmp_path / "x")
    good, rng, refused = (folder / SINGLE).read_bytes(), np.random.default_rng(0), 0
    length = int.from_bytes(good[:8], "little")
    for _ in range(200):
        data, at = bytearray(good), int(rng.integers(0, 8 + length))
        data[at] = rng.integers(0, 256)
        (folder / SINGLE).write_bytes(data)
        try:
            found = {name: entry.map() for name, entry in Tensors(folder).items()}
        except DataError as error:
            refused += SINGLE in str(error)
        else:
            assert sum(x.nbytes for x in found.values()) <= len(good)
    assert refused > 100


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder, _ = save(tmp_path / "x")
    Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310).save(folder)
    with pytest.raises(DataError, match="tokenizer has 310 ids and the embedding 97 rows; they are not of one model"):
        open_folder(folder).tokenizer()


@pytest.mark.parametrize("size", [0, 5, 8, 100, 5000])
def test_a_file_cut_short_is_refused(size, tmp_path):
    folder, _ = save(tmp_path / "x")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:size])
    with pytest.raises(DataError, match="download it again"):
        open_folder(folder).load()


def test_a_folder_that_is_not_of_one_model_is_refused(tmp_path):
    folder, _ = save(tmp_path / "a", change=drop(Q))
    with pytest.raises(DataError, match=rf"tensor {Q} is missing; did you mean"):
        open_folder(folder).load()
    folder, _ = save(tmp_path / "b", change=lambda t: t | {"model.layers.0.self_attn.q_norm.weight": t[Q][0]})
    with pytest.raises(DataError, match=r"q_norm.weight \(1 in all\) is in the folder and not in a llama model"):
        open_folder(folder).load()
    folder, _ = save(tmp_path / "c", num_hidden_layers=2)
    with pytest.raises(DataError, match=r"model.layers.2.* is in the folder and not in a llama model of 2 layers"):
        open_folder(folder).load()
    folder, _ = save(tmp_path / "d", intermediate_size=64)
    expected = r"gate_proj.weight has shape \[56, 48\], and config.json makes it \[64, 48\] .*intermediate_size"
    with pytest.raises(DataError, match=expected):
        open_folder(folder).load()


def test_index_and_shards_are_checked(tmp_path):
    folder, _ = save(tmp_path / "x", shard=50_000)
    shards = sorted(folder.glob("model-*"))
    index = json.loads((folder / INDEX).read_text())
    aside = shards[1].rename(folder / "aside")
    with pytest.raises(DataError, match=f"{shards[1].name} is missing, and {INDEX} names it"):
        open_folder(folder).load()
    aside.rename(shards[1])
    for outside in ("../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."):
        (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {Q: outside}}))
        with pytest.raises(DataError, match="is not a file of this folder"):
            open_folder(folder).load()
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"model.extra": shards[0].name}}))
    with pytest.raises(DataError, match="has no tensor model.extra"):
        open_folder(folder).load()
    (folder / INDEX).unlink()
    with pytest.raises(DataError, match="safetensors files and no model.safetensors.index.json"):
        open_folder(folder).load()


def test_pickles_and_broken_settings_are_refused(tmp_path):
    folder, _ = save(tmp_path / "x")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="is a pickle, which can run code.*save_pretrained"):
        open_folder(folder).load()
    (folder / "config.json").write_text('{"a": ')
    with pytest.raises(DataError, match="not JSON at line 1, column 7"):
        open_folder(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 7"):
        open_folder(folder)
    assert is_folder(folder) and not is_folder(tmp_path)


def test_a_number_that_a_dtype_cannot_hold_is_not_written():
    tensors = [("w", np.array([1e5], np.float32))]
    with pytest.raises(SettingsError, match="w holds numbers beyond the range of float16"):
        list(cast(tensors, "float16"))
    assert next(cast(tensors, "bfloat16"))[1].dtype == ml_dtypes.bfloat16


def test_our_files_are_those_of_the_library(tmp_path):
    folder, tensors = save(tmp_path / "x")
    assert {name: entry.map().tobytes() for name, entry in read_header(folder / SINGLE).items()} == {
        name: x.tobytes() for name, x in safetensors.numpy.load_file(folder / SINGLE).items()
    }


def test_others_may_read_what_is_written(tmp_path):
    write_shards(tmp_path, {"a": np.zeros(2, np.float32)}.items(), 1 << 30)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == 0o044
