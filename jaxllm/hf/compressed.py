"""Weights quantised as compressed-tensors (llm-compressor, vLLM): what is stored is read off the tensors themselves.

pack-quantized: `weight_packed` int32 `[O, I / n]` packs n = 32 / bits numbers along the inputs, `weight_shape` has O
and I, `weight_zero_point` int32 `[O / n, G]` is packed along the outputs. The other formats: `weight` int8 or
float8, and `weight_zero_point` int8 `[O, G]`. All: `weight_scale` `[O, G]`, one for the whole matrix, or one for each
block of rows and columns. What is packed has half of its range added.

Shapes: O outputs, I inputs, G groups.
"""

import math
from typing import Any

import numpy as np

from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.coded import Coded, Codes
from jaxllm.hf.gptq import FLOATS
from jaxllm.hf.packing import BITS, expect, signed, unpack
from jaxllm.hf.safetensors import Entry, Tensors

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense")
PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")


def read_compressed(tensors: Tensors, settings: dict) -> dict[str, Any]:
    """The tensors, with quantised matrices by the names of the floats that they stand for.

    Raises SettingsError for what is computed otherwise than here, DataError for tensors that do not fit each other.
    """
    groups = _groups(tensors, settings)
    activations, bits = _activations(tensors, groups), {group["weights"].get("num_bits", 8) for group in groups}
    blocks = {tuple(shape) for group in groups if (shape := group["weights"].get("block_structure"))}
    out: dict[str, Any] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" not in tensors or part not in (*PARTS, "weight"):
            out[name] = tensors[name]
        elif part in ("weight", "weight_packed"):
            out[f"{module}.weight"] = _matrix(tensors, module, bits, activations, blocks)
    return out


def _groups(tensors: Tensors, settings: dict) -> list[dict]:
    """The schemes of weights; which matrices have which, the tensors say."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SettingsError(f"{tensors.folder}: config_groups must hold a scheme for each group of matrices")
    found = [group for group in groups.values() if isinstance(group.get("weights"), dict)]
    for kind in (settings.get("format", "dense"), *(group.get("format") for group in found)):
        if kind not in (None, *FORMATS):
            raise SettingsError(f"{tensors.folder}: format={kind!r} is not read here; known: {', '.join(FORMATS)}")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    outputs = any(group.get("output_activations") for group in found)
    if sparse != "dense" or outputs or settings.get("kv_cache_scheme") or settings.get("transform_config"):
        raise SettingsError(
            f"{tensors.folder}: sparse storage, quantised outputs, a kv_cache_scheme or a transform_config are not "
            "read here; use a folder without them, or the model's weights in bfloat16"
        )
    return found


def _activations(tensors: Tensors, groups: list[dict]) -> str | None:
    """int8 for activations that are rounded row by row as they come; None for floats."""
    kinds = set()
    for args in (group.get("input_activations") for group in groups):
        if not args:
            kinds.add(None)
            continue
        wanted = dict(num_bits=8, type="int", dynamic=True, strategy="token", symmetric=True)
        if other := {key: args.get(key) for key, value in wanted.items() if args.get(key) != value}:
            listed = ", ".join(f"{key}={value!r}" for key, value in other.items())
            raise SettingsError(
                f"{tensors.folder}: input_activations with {listed} are not computed here; known are 8-bit integers, "
                "dynamic for each token; or set input_activations to null in config.json to compute with floats"
            )
        kinds.add("int8")
    if len(kinds) > 1:
        raise SettingsError(f"{tensors.folder}: only some config_groups have input_activations; here all or none have")
    return kinds.pop() if kinds else None


def _matrix(tensors: Tensors, module: str, bits: set[int], activations: str | None, blocks: set[tuple]) -> Coded:
    packed = f"{module}.weight_packed" in tensors
    weight, scale = tensors[f"{module}.{'weight_packed' if packed else 'weight'}"], tensors[f"{module}.weight_scale"]
    kind, outputs, inputs = _packed(tensors, module, weight) if packed else _plain(module, weight, bits)
    rows, groups = _blocks(module, scale, outputs, inputs, blocks)
    zero, order = _zero(tensors, module, packed, kind, (outputs, groups)), _order(tensors, module, inputs, groups)
    if zero is not None and activations:
        raise SettingsError(f"{module} has zero points and 8-bit activations; here the latter need symmetric weights")

    def read() -> Codes:
        width = 4 if kind == "int4" else 8
        codes_OI = signed(unpack(weight.map(), width)[:, :inputs], width) if packed else np.asarray(weight.map())
        codes_OI = codes_OI if order is None else codes_OI[:, order]
        scale_OG = np.asarray(scale.map(), np.float32).reshape(-1, groups).repeat(rows, axis=0)[:outputs]
        return Codes(codes_OI, scale_OG, zero, order)

    return Coded(module, kind, outputs, inputs, groups, read, zero is None, order is not None, activations)


def _zero(tensors: Tensors, module: str, packed: bool, kind: str, shape: tuple[int, int]) -> np.ndarray | None:
    """float32 `[O, G]`; None where all are 0."""
    if (name := f"{module}.weight_zero_point") not in tensors:
        return None
    width = 4 if kind == "int4" else 8
    stored = (-(-shape[0] * width // 32), shape[1]) if packed else shape
    expect(name, tensors[name], stored, "int32" if packed else "int8")
    zero = np.asarray(tensors[name].map())
    zero = signed(unpack(zero.T, width)[:, : shape[0]], width).T if packed else zero
    return zero.astype(np.float32) if zero.any() else None


def _packed(tensors: Tensors, module: str, weight: Entry) -> tuple[str, int, int]:
    """`(format, outputs, inputs)`"""
    name = f"{module}.weight_shape"
    expect(name, tensors[name], (2,), "int32 int64")
    outputs, inputs = (int(n) for n in tensors[name].map())
    bits = next((n for n in BITS if weight.shape == (outputs, -(-inputs * n // 32))), None)
    if bits is None or weight.dtype != np.int32:
        raise DataError(
            f"tensor {module}.weight_packed is {weight.dtype.name}{list(weight.shape)}, which holds {outputs} x "
            f"{inputs} numbers in neither 4 nor 8 bits; other widths are not read, a damaged file must be got again"
        )
    return f"int{bits}", outputs, inputs


def _plain(module: str, weight: Entry, bits: set[int]) -> tuple[str, int, int]:
    if len(weight.shape) != 2 or weight.dtype.name not in ("int8", "float8_e4m3fn"):
        raise DataError(
            f"tensor {module}.weight is {weight.dtype.name}{list(weight.shape)} and has a weight_scale; read are int8 "
            "and float8_e4m3fn matrices (quantization_status=compressed)"
        )
    if weight.dtype.name != "int8":
        return "fp8", *weight.shape
    return "int4" if bits == {4} else "int8", *weight.shape


def _blocks(module: str, scale: Entry, outputs: int, inputs: int, blocks: set[tuple]) -> tuple[int, int]:
    """`(rows that share a scale, groups of columns)`: each row has its own, or all share one, or blocks do."""
    found, columns = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    rows = {1: outputs, outputs: 1}.get(found)
    fits = bool(columns) and inputs % columns == 0
    if rows is None and len(blocks) == 1:  # the last block of rows may be a part of one
        rows, width = next(iter(blocks))
        fits = fits and math.ceil(outputs / rows) == found and inputs == width * columns
    fits = fits and rows is not None
    if scale.dtype.name not in FLOATS.split() or not fits:
        raise DataError(
            f"tensor {module}.weight_scale is {scale.dtype.name}{list(scale.shape)}, which does not divide {outputs} x "
            f"{inputs} codes into groups of one size; the file is damaged, or its groups are not read here"
        )
    return rows, columns


def _order(tensors: Tensors, module: str, inputs: int, groups: int) -> np.ndarray | None:
    """The inputs by their groups, where these are not in order."""
    if (name := f"{module}.weight_g_idx") not in tensors:
        return None
    expect(name, tensors[name], (inputs,), "int32 int64")
    group_I = np.asarray(tensors[name].map())
    if (group_I < 0).all():
        return None  # older files: no order
    if not np.array_equal(np.sort(group_I), np.arange(inputs) // (inputs // groups)):
        raise DataError(f"tensor {name} does not give each of {groups} groups {inputs // groups} inputs; it is damaged")
    order = np.argsort(group_I, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(inputs)) else order
