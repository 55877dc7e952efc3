"""GGUF files that are cut short, mutated, or not what they seem: one typed error each, in little time and memory."""

import dataclasses
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError, SettingsError, UserError
from jaxllm.families.registry import read_config
from jaxllm.hf.gguf import open_gguf
from jaxllm.hf.gguf_export import export_gguf
from jaxllm.hf.gguf_file import read_gguf
from jaxllm.hf.weights import read
from jaxllm.model.build import build
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS


@dataclasses.dataclass
class Held:
    value: np.ndarray

    @property
    def shape(self):
        return self.value.shape

    def map(self):
        return self.value


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole file, as bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "wide", VARIANTS["llama3.1"] | {"vocab_size": 320, "num_hidden_layers": 2})
        raw, tensors = random_model("wide")
    family, config, _ = read_config(raw)
    words = Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310)
    path = tmp_path_factory.mktemp("good") / "a.gguf"
    export_gguf(config, read(build(config), family, {n: Held(x) for n, x in tensors.items()}), words, path)
    return path.read_bytes()


def attempt(path, data: bytes):
    """Opens everything in a file; gives the error, and the largest memory held beside the device's."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        opened = open_gguf(path)
        opened.tokenizer()
        for tensor in opened.tensors().values():
            tensor.map()
        opened.load()
        return None, 0
    except UserError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_whole_file_is_read(good, tmp_path):
    assert attempt(tmp_path / "a.gguf", good) == (None, 0)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    lengths = [0, 3, 4, 8, 23, 24, 25, *np.linspace(30, len(good) - 1, 30).astype(int)]
    for length in lengths:
        error, held = attempt(tmp_path / "a.gguf", good[:length])
        assert isinstance(error, DataError), length
        assert str(tmp_path) in str(error) and held < 2 * len(good) + 200_000, length


def header(data: bytes) -> int:
    return data.index(b"token_embd.weight") + 2000


@pytest.mark.slow
def test_a_mutated_header_is_refused_or_harmless_and_never_costs_much(good, tmp_path):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        data, at = bytearray(good), int(rng.integers(4, header(good)))
        size = int(rng.choice([1, 1, 4, 8]))
        data[at : at + size] = bytes(rng.integers(0, 256, size, np.uint8)) if rng.random() < 0.7 else b"\xff" * size
        start = time.monotonic()
        error, held = attempt(tmp_path / "a.gguf", bytes(data))
        assert time.monotonic() - start < 20, at
        assert held < 2 * len(good) + 2_000_000, (at, held)
        refused += error is not None
    assert refused > 20  # most others fall on the text of a token or of the template, which may be anything


def where(data: bytes, key: str) -> int:
    """Where the value of a key begins, after its type."""
    return data.index(key.encode()) + len(key) + 4


KEYS = "block_count embedding_length head_count head_count_kv key_length feed_forward_length dimension_count".split()


@pytest.mark.parametrize("number", [0, 1, 5, 2**31, 2**32 - 1])
@pytest.mark.parametrize("key", KEYS)
def test_sizes_of_another_model_are_refused(good, tmp_path, key, number):
    data = bytearray(good)
    struct.pack_into("<I", data, where(good, key), number)
    start = time.monotonic()
    assert isinstance(attempt(tmp_path / "a.gguf", bytes(data))[0], UserError)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("count", [0, 2**63, 2**64 - 1])
@pytest.mark.parametrize("at", [8, 16])
def test_counts_beyond_the_file_end_at_once(good, tmp_path, at, count):
    data = bytearray(good)
    struct.pack_into("<Q", data, at, count)
    error, _ = attempt(tmp_path / "a.gguf", bytes(data))
    assert isinstance(error, UserError)


def test_the_error_names_what_is_wrong(good, tmp_path):
    path = tmp_path / "a.gguf"
    assert "it does not begin with GGUF" in str(attempt(path, b"GGML" + good[4:])[0])
    assert "version 1 is not read here" in str(attempt(path, good[:4] + b"\x01" + good[5:])[0])
    assert "version 50331648" in str(attempt(path, good[:4] + b"\x00\x00\x00\x03" + good[8:])[0])  # big-endian
    assert "rope_freqs.weight needs 32 bytes, and 31 are there" in str(attempt(path, good[:-1])[0])
    other = good.replace(b"llama", b"llamX")
    assert "'llamX' is not known; did you mean llama?" in str(attempt(path, other)[0])
    renamed = good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight")
    assert "model.layers.1.self_attn.q_proj.weight is missing" in str(attempt(path, renamed)[0])


def rewritten(path, **metadata):
    """An empty file of the architecture llama with some metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        key = key.replace("__", ".")
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_parts_and_adapters_are_no_models(tmp_path):
    with pytest.raises(SettingsError, match="one of 3 parts.*--merge"):
        open_gguf(rewritten(tmp_path / "a.gguf", split__count=3))
    with pytest.raises(SettingsError, match="general.type='adapter'"):
        open_gguf(rewritten(tmp_path / "b.gguf", general__type="adapter"))


def test_a_key_that_is_not_understood_is_refused_and_can_be_ignored(good, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(good.replace(b"llama.vocab_size", b"llama.logitscale"))
    with pytest.raises(SettingsError, match="logitscale=320.*--ignore-key logitscale"):
        open_gguf(path)
    opened = open_gguf(path, ignore_keys=("logitscale",))
    assert opened.keys.ignored["logitscale"] == "ignored on request" and opened.config.vocab == 320


def test_only_the_header_is_read_when_a_file_is_opened(good, tmp_path):
    (tmp_path / "a.gguf").write_bytes(good)
    file = read_gguf(tmp_path / "a.gguf")
    data = bytearray(good)
    for name, entry in file.tensors.items():
        if name != "rope_freqs.weight":  # settings of Llama 3.1 that are stored as a tensor
            data[entry.start : entry.start + entry.nbytes] = bytes(entry.nbytes)
    (tmp_path / "b.gguf").write_bytes(data)
    assert str(open_gguf(tmp_path / "b.gguf").config) == str(open_gguf(tmp_path / "a.gguf").config)
