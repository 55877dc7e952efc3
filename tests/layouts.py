"""Quantised folders as other software writes them, made number by number from the published descriptions.

Nothing here is shared with the readers: packing is loops over shifts.

Shapes: O outputs, I inputs, G groups.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jaxllm.hf.export import write_shards
from jaxllm.parity.tensors import random_model
from jaxllm.parity.tiny import VARIANTS
from jaxllm.weights.formats import FORMATS

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@dataclasses.dataclass
class Matrix:
    """Codes and what they stand for; `order` says which group each input is in."""

    codes: np.ndarray
    """Signed `[O, I]`, columns in the order of the inputs."""
    scale: np.ndarray
    zero: np.ndarray
    group_I: np.ndarray
    levels: tuple[float, ...] | None = None

    @property
    def dense(self) -> np.ndarray:
        values = self.codes.astype(np.float32) if self.levels is None else np.float32(self.levels)[self.codes]
        return ((values - self.zero[:, self.group_I]) * self.scale[:, self.group_I]).astype(np.float32)


def matrix(rng, shape, *, bits=4, group=32, symmetric=True, ordered=False, levels=None, dtype=np.float16) -> Matrix:
    """Random codes of a matrix about as large as it has to be."""
    outputs, inputs = shape
    group = group or inputs
    half = 2 ** (bits - 1)
    low, high = (0, 16) if levels else (-half, half)
    scale = rng.uniform(0.5, 2, (outputs, inputs // group)) / (1 if levels else half) / inputs**0.5
    scale = scale.astype(dtype).astype(np.float32)
    zero = np.zeros(scale.shape) if symmetric else rng.integers(-half, half, scale.shape)
    group_I = np.arange(inputs) // group
    group_I = rng.permutation(group_I) if ordered else group_I
    return Matrix(rng.integers(low, high, shape), scale, zero.astype(np.float32), group_I, levels)


def model(variant="llama3", chosen="_proj.weight", **how):
    """`(config.json, plain tensors, {name: Matrix})` of a random model; `how`: see `matrix`."""
    changes = how.pop("changes", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "changed", VARIANTS[variant] | SIZES | changes)
        raw, tensors = random_model("changed")
    rng = np.random.default_rng(3)
    matrices = {name: matrix(rng, x.shape, **how) for name, x in tensors.items() if name.endswith(chosen)}
    return raw, {name: x for name, x in tensors.items() if name not in matrices}, matrices


def pack(numbers, bits, axis):
    """Unsigned numbers in words of 32 along an axis, the first one lowest."""
    numbers = np.moveaxis(np.asarray(numbers, np.uint32), axis, -1)
    per = 32 // bits
    words = np.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // per)), np.uint32)
    for i in range(numbers.shape[-1]):
        words[..., i // per] |= numbers[..., i] << np.uint32(bits * (i % per))
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq(name, m, *, bits=4, version=1, g_idx=True):
    """AutoGPTQ's `QuantLinear`; version 1 stores zeros less one."""
    module, half = name.removesuffix(".weight"), 2 ** (bits - 1)
    stored = (m.zero.T.astype(int) + half - (version == 1)) % 2**bits
    out = {
        "qweight": pack(m.codes.T + half, bits, 0),
        "qzeros": pack(stored, bits, 1),
        "scales": np.ascontiguousarray(m.scale.T.astype(np.float16)),
    }
    out |= {"g_idx": m.group_I.astype(np.int32)} if g_idx else {}
    return {f"{module}.{part}": value for part, value in out.items()}


def awq(name, m):
    """AutoAWQ's `WQLinear_GEMM`: of eight columns, the low bits hold columns 0 2 4 6 1 3 5 7."""
    module, order = name.removesuffix(".weight"), [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers):
        mixed = np.concatenate([numbers[:, i : i + 8][:, order] for i in range(0, numbers.shape[1], 8)], axis=1)
        return pack(mixed, 4, 1)

    scales = np.ascontiguousarray(m.scale.T.astype(np.float16))
    parts = {"qweight": packed(m.codes.T + 8), "qzeros": packed(m.zero.T.astype(int) + 8), "scales": scales}
    return {f"{module}.{part}": value for part, value in parts.items()}


def packed(name, m, *, bits=4, symmetric=True):
    """compressed-tensors, pack-quantized."""
    module, half = name.removesuffix(".weight"), 2 ** (bits - 1)
    out = {"weight_packed": pack(m.codes + half, bits, 1), "weight_scale": m.scale, "weight_shape": m.codes.shape}
    out["weight_shape"] = np.array(m.codes.shape, np.int64)
    out |= {} if symmetric else {"weight_zero_point": pack(m.zero + half, bits, 0)}
    return {f"{module}.{part}": value for part, value in out.items()}


def plain(name, m, *, dtype=np.int8, symmetric=True):
    """compressed-tensors, int-quantized, naive-quantized and float-quantized."""
    module = name.removesuffix(".weight")
    out = {"weight": m.codes.astype(dtype), "weight_scale": m.scale}
    out |= {} if symmetric else {"weight_zero_point": m.zero.astype(np.int8)}
    return {f"{module}.{part}": value for part, value in out.items()}


def nf4(name, m, *, nested=False):
    """bitsandbytes' `Params4bit`; nested: the scales in 8 bits, whose values then are m's scales only roughly."""
    flat = m.codes.ravel()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(m.codes.shape)}
    levels = np.float32(FORMATS["nf4"].levels)
    out = {"": (flat[::2] << 4 | flat[1::2]).astype(np.uint8)[:, None], ".quant_map": levels}
    if nested:
        table = np.linspace(-1, 1, 256).astype(np.float32)
        scales = m.scale.ravel()
        offset = float(scales.mean(dtype=np.float64))
        blocks = [scales[i : i + 256] - np.float32(offset) for i in range(0, scales.size, 256)]
        steps = np.array([np.abs(block).max() for block in blocks], np.float32)
        codes = np.concatenate([np.abs(b[:, None] / s - table).argmin(1) for b, s in zip(blocks, steps, strict=True)])
        m.scale = (table[codes] * steps.repeat(256)[: codes.size] + np.float32(offset)).reshape(m.scale.shape)
        out |= {".absmax": codes.astype(np.uint8), ".nested_absmax": steps, ".nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        out[".absmax"] = m.scale.ravel()
    out[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name + part: value for part, value in out.items()}


def group_args(bits=4, group=32, symmetric=True, activations=None, kind="int") -> dict:
    """`config_groups` with one scheme."""
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(format, **how) -> dict:
    head = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return head | {"format": format, "config_groups": group_args(**how)}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NF4 = dict(levels=FORMATS["nf4"].levels, group=64, dtype=np.float32)
#: layout: (arguments of `matrix`, writer, its arguments, quantization_config).
LAYOUTS = {
    "gptq": ({}, gptq, {}, GPTQ),
    "gptq without g_idx": ({}, gptq, {"g_idx": False}, GPTQ),
    "gptq asymmetric": ({"symmetric": False}, gptq, {}, GPTQ | {"sym": False}),
    "gptq ordered": ({"symmetric": False, "ordered": True}, gptq, {}, GPTQ | {"desc_act": True}),
    "gptq v2, 8 bits": (
        {"bits": 8, "symmetric": False, "group": None},
        gptq,
        {"bits": 8, "version": 2},
        GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": ({"symmetric": False}, awq, {}, AWQ),
    "packed": ({}, packed, {}, compressed("pack-quantized")),
    "packed asymmetric": (
        {"symmetric": False, "group": 64},
        packed,
        {"symmetric": False},
        compressed("pack-quantized", group=64, symmetric=False),
    ),
    "packed, 8 bits": ({"bits": 8, "group": None}, packed, {"bits": 8}, compressed("pack-quantized", bits=8, group=0)),
    "w8a8": (
        {"bits": 8, "group": None, "dtype": np.float32},
        plain,
        {},
        compressed("int-quantized", bits=8, group=0, activations=TOKEN),
    ),
    "int8 asymmetric": (
        {"bits": 8, "symmetric": False},
        plain,
        {"symmetric": False},
        compressed("naive-quantized", bits=8, symmetric=False),
    ),
    "int4 as int8": ({}, plain, {}, compressed("int-quantized")),
    "fp8": (
        {"group": None},
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn},
        compressed("float-quantized", bits=8, group=0, kind="float"),
    ),
    "nf4": (NF4, nf4, {}, BNB),
    "nf4 nested": (NF4, nf4, {"nested": True}, BNB | {"bnb_4bit_use_double_quant": True}),
}


def write(folder, layout: str, variant="llama3", chosen="_proj.weight", *, edit=None, settings=None, **changes):
    """A folder of a random model in a layout; gives its plain tensors and matrices. `edit` changes the tensors."""
    how, writer, options, quantization = LAYOUTS[layout]
    raw, tensors, matrices = model(variant, chosen, changes=changes, **how)
    for name, m in matrices.items():
        tensors = tensors | writer(name, m, **options)
    stored = dict(tensors)
    stored = stored if edit is None else edit(stored) or stored
    folder.mkdir(exist_ok=True)
    write_shards(folder, stored.items(), 1 << 30)
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization | (settings or {})}))
    return stored, matrices


def write_dense(folder, stored, matrices, raw) -> None:
    """The same model in floats."""
    folder.mkdir(exist_ok=True)
    modules = {name.removesuffix(".weight") for name in matrices}
    mine = {n for n in stored if any(n.startswith(module + ".") for module in modules) and not n.endswith(".bias")}
    kept = {name: x for name, x in stored.items() if name not in mine}
    write_shards(folder, (kept | {name: m.dense for name, m in matrices.items()}).items(), 1 << 30)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "quantization_config"}))
