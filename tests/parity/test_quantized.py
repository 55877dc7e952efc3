"""Quantised folders between here and compressed-tensors, transformers and bitsandbytes: the same codes and logits."""

import json

import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
bitsandbytes = pytest.importorskip("bitsandbytes")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils.helpers import calculate_qparams  # noqa: E402

from jaxllm import api  # noqa: E402
from jaxllm.data.tokenizer import Tokenizer  # noqa: E402
from jaxllm.hf.folder import open_folder  # noqa: E402
from jaxllm.hf.safetensors import Tensors  # noqa: E402
from jaxllm.model.change import weights_of  # noqa: E402
from jaxllm.parity.compare import perplexity  # noqa: E402
from jaxllm.parity.prove import ours as run  # noqa: E402

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(1).integers(0, 320, 48)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789 " * 40], 310)


def ours(folder) -> np.ndarray:
    return np.asarray(run(*open_folder(folder).load())(IDS, 0))


def theirs(folder) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)[None]).logits[0].numpy()


FLOATS = ("packed", "packed asymmetric", "packed, 8 bits")
CASES = [(variant, layout) for variant in ("llama3", "qwen3", "phi3") for layout in (*FLOATS, "w8a8")]
CASES += [("qwen3_moe", "packed"), ("qwen3_moe", "packed, 8 bits")]  # transformers 5.23 has no w8a8 experts


@pytest.mark.parametrize("variant, layout", CASES)
def test_transformers_computes_what_we_do_on_what_we_export(variant, layout, tmp_path, words):
    changes = {"moe_intermediate_size": 32} if variant == "qwen3_moe" else {}
    layouts.write(tmp_path / "a", layout, variant, vocab_size=320, **changes)
    opened = open_folder(tmp_path / "a")
    api.export(api.Loaded(*opened.load(), words, 0, opened.family.name, opened.changes), tmp_path / "b")
    mine, other = ours(tmp_path / "a"), theirs(tmp_path / "b")
    if layout == "w8a8":  # activations are rounded to 127 steps here and to 127.5 there
        assert tiny.relative(other, mine) < 0.03
        return
    assert tiny.relative(other, mine) < 1e-4
    assert abs(perplexity(other, IDS) / perplexity(mine, IDS) - 1) < 0.005


TOKEN = layouts.TOKEN
SCHEMES = {
    "int4": ({"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4 asymmetric": ({"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, None),
    "int8": ({"num_bits": 8, "strategy": "channel"}, None),
    "w8a8": ({"num_bits": 8, "strategy": "channel"}, TOKEN),
    "one scale": ({"num_bits": 8, "strategy": "tensor"}, TOKEN),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_compressed_tensors_writes_is_what_we_read(name, tmp_path):
    raw, tensors, matrices = layouts.model("llama3", changes={"vocab_size": 320})
    stored = tensors | {name: m.dense for name, m in matrices.items()}
    layouts.write_dense(tmp_path / "floats", stored, matrices, raw)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    _round(model, *SCHEMES[name])
    with torch.no_grad():
        expected = model(torch.tensor(IDS)[None]).logits[0].numpy()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "q")
    compressor.update_config(tmp_path / "q")
    assert tiny.relative(ours(tmp_path / "q"), expected) < (0.03 if SCHEMES[name][1] else 1e-4)


def _round(model, weights, activations):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format="dense", quantization_status="initialized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            args, w = scheme.weights, module.weight.data
            parts = {"group": (len(w), -1, args.group_size or 1), "channel": (len(w), 1, -1), "tensor": (1, 1, -1)}
            grouped = w.reshape(parts[args.strategy])
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape)
            kind = module.weight_zero_point
            module.weight_zero_point.data = zero.round().reshape(kind.shape).to(kind.dtype)
            module.quantization_status = QuantizationStatus.FROZEN


@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_writes_is_what_we_read(nested, tmp_path):
    raw, tensors, matrices = layouts.model("llama3", **layouts.NF4)
    expected = {}
    for name, m in matrices.items():
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.tensor(m.dense), quant_type="nf4", blocksize=64, compress_statistics=nested
        )
        expected[name] = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
        tensors |= {name: packed.numpy()}
        tensors |= {f"{name}.{part}": x.numpy() for part, x in state.as_dict(packed=True).items()}
    (tmp_path / "q").mkdir()
    layouts.write_shards(tmp_path / "q", tensors.items(), 1 << 30)
    (tmp_path / "q/config.json").write_text(json.dumps(raw | {"quantization_config": layouts.BNB}))
    weights = weights_of(open_folder(tmp_path / "q").load()[1])
    for path, name in (("layers/0/mlp/down", "mlp.down_proj"), ("layers/0/attn/q", "self_attn.q_proj")):
        values = np.asarray(weights[path].matrix(jnp.float32))
        for i in range(2):
            np.testing.assert_allclose(values[i], expected[f"model.layers.{i}.{name}.weight"], rtol=1e-5, atol=1e-7)
    assert "model.layers.0.mlp.up_proj.weight.absmax" in Tensors(tmp_path / "q")


def test_the_layouts_of_the_tests_are_those_of_bitsandbytes():
    _, _, matrices = layouts.model("llama3", **layouts.NF4)
    name, m = next(iter(matrices.items()))
    m.codes[:, ::64] = 15  # the level 1, so that rounding finds the scale again
    packed, state = bitsandbytes.functional.quantize_4bit(torch.tensor(m.dense), quant_type="nf4", blocksize=64)
    made = layouts.nf4(name, m)
    assert np.array_equal(made[name], packed.numpy())
    for part, value in state.as_dict(packed=True).items():
        if part.startswith("quant_state"):
            mine = json.loads(made[f"{name}.{part}"].tobytes())
            assert mine | {"dtype": ...} == json.loads(value.numpy().tobytes()) | {"dtype": ...}
        else:
            np.testing.assert_allclose(made[f"{name}.{part}"], value.numpy(), rtol=1e-6, atol=1e-7)
