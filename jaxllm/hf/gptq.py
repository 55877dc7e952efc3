"""Weights quantised by GPTQ (AutoGPTQ, GPTQModel, optimum) and by AWQ (AutoAWQ), whose layouts differ in their order.

GPTQ: `qweight` int32 `[I / n, O]` packs n = 32 / bits numbers along the inputs, `qzeros` int32 `[G, O / n]` along the
outputs, `scales` `[G, O]`, and `g_idx` `[I]` has the group of each input. A value is (number - zero) * scale. Files of
version 1 store each zero less one. AWQ: `qweight` int32 `[I, O / 8]` packs both along the outputs, in the order
0 2 4 6 1 3 5 7, and stores zeros as they are.

Shapes: O outputs, I inputs, G groups.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.coded import Coded, Codes
from jaxllm.hf.packing import BITS, expect, signed, unpack
from jaxllm.hf.safetensors import Entry, Tensors

FLOATS = "float16 bfloat16 float32"
#: Which of eight packed numbers is which column: the inverse of AutoAWQ's order.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def read_gptq(tensors: Tensors, settings: dict) -> dict[str, Any]:
    """The tensors, with quantised matrices by the names of the floats that they stand for.

    Raises SettingsError for another layout, DataError for tensors that do not fit each other.
    """
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in BITS or layout not in ("gptq", "gptq_v2"):
        raise SettingsError(
            f"{tensors.folder}: quantization_config has bits={bits!r}, checkpoint_format={layout!r}; read are 4 and 8 "
            "bits as gptq or gptq_v2; save it so with gptqmodel, or use the model's weights in bfloat16"
        )

    def one(name: str) -> Coded:
        return _gptq(tensors, name, bits, layout == "gptq", bool(settings.get("desc_act")))

    return _matrices(tensors, one, ("qweight", "qzeros", "scales", "g_idx"))


def read_awq(tensors: Tensors, settings: dict) -> dict[str, Any]:
    """The same for AWQ."""
    bits, version = settings.get("bits", settings.get("w_bit")), settings.get("version", "gemm")
    if bits != 4 or str(version).lower() != "gemm":
        raise SettingsError(
            f"{tensors.folder}: quantization_config has bits={bits!r}, version={version!r}; read are 4 bits as gemm; "
            "save it so with AutoAWQ, or use the model's weights in bfloat16"
        )
    return _matrices(tensors, lambda name: _awq(tensors, name), ("qweight", "qzeros", "scales"))


def _matrices(tensors: Tensors, one: Callable[[str], Coded], parts: tuple[str, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part not in parts or f"{module}.qweight" not in tensors:
            out[name] = tensors[name]
        elif part == "qweight":
            out[f"{module}.weight"] = one(module)
    return out


def _gptq(tensors: Tensors, module: str, bits: int, less_one: bool, ordered: bool) -> Coded:
    weight, zeros, scales = _three(tensors, module)
    inputs, outputs, groups = weight.shape[0] * 32 // bits, weight.shape[1], scales.shape[0]
    _check(module, weight, zeros, scales, inputs, outputs, bits)
    group_I = _groups(tensors, module, inputs, groups, ordered)
    by_group = np.argsort(group_I, kind="stable").astype(np.int32)
    order = None if np.array_equal(by_group, np.arange(inputs)) else by_group

    def zero() -> np.ndarray:
        stored_GO = unpack(zeros.map(), bits)[:, :outputs]
        return signed((stored_GO + np.uint8(less_one)) & (2**bits - 1), bits).T

    symmetric = not zero().any()

    def read() -> Codes:
        codes_OI = signed(unpack(np.asarray(weight.map()).T, bits), bits)
        codes_OI = codes_OI if order is None else codes_OI[:, order]
        scale_OG = np.asarray(scales.map(), np.float32).T
        return Codes(codes_OI, scale_OG, None if symmetric else zero().astype(np.float32), order)

    return Coded(module, f"int{bits}", outputs, inputs, groups, read, symmetric, order is not None)


def _awq(tensors: Tensors, module: str) -> Coded:
    weight, zeros, scales = _three(tensors, module)
    inputs, outputs, groups = weight.shape[0], weight.shape[1] * 8, scales.shape[0]
    expect(f"{module}.scales", scales, (groups, outputs), FLOATS)
    expect(f"{module}.qzeros", zeros, (groups, outputs // 8), "int32")
    _check_groups(module, inputs, groups)

    def numbers(entry: Entry) -> np.ndarray:
        """int8 `[O, ...]`"""
        packed = unpack(entry.map(), 4)
        return signed(packed.reshape(len(packed), -1, 8)[..., AWQ_ORDER].reshape(packed.shape), 4).T

    symmetric = not numbers(zeros).any()

    def read() -> Codes:
        zero_OG = None if symmetric else numbers(zeros).astype(np.float32)
        return Codes(numbers(weight), np.asarray(scales.map(), np.float32).T, zero_OG)

    return Coded(module, "int4", outputs, inputs, groups, read, symmetric)


def _three(tensors: Tensors, module: str) -> tuple[Entry, Entry, Entry]:
    weight, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if len(weight.shape) != 2 or len(scales.shape) != 2 or weight.dtype.name != "int32":
        raise DataError(
            f"tensor {module}.qweight is {weight.dtype.name}{list(weight.shape)} with scales {list(scales.shape)}; "
            "both must have two axes, and qweight be int32; the file is damaged"
        )
    return weight, zeros, scales


def _check(module: str, weight: Entry, zeros: Entry, scales: Entry, inputs: int, outputs: int, bits: int) -> None:
    groups = scales.shape[0]
    expect(f"{module}.scales", scales, (groups, outputs), FLOATS)
    expect(f"{module}.qzeros", zeros, (groups, -(-outputs * bits // 32)), "int32")
    _check_groups(module, inputs, groups)


def _check_groups(module: str, inputs: int, groups: int) -> None:
    if not groups or inputs % groups:
        raise SettingsError(
            f"{module} has {inputs} inputs in {groups} groups, which are not of one size; use the model's weights in "
            "bfloat16"
        )


def _groups(tensors: Tensors, module: str, inputs: int, groups: int, ordered: bool) -> np.ndarray:
    """The group of each input."""
    name, in_order = f"{module}.g_idx", np.arange(inputs) // (inputs // groups)
    if name not in tensors and not ordered:
        return in_order
    expect(name, tensors[name], (inputs,), "int32 int64")
    found = np.asarray(tensors[name].map())
    if not np.array_equal(np.sort(found), in_order):
        raise DataError(f"tensor {name} does not give each of {groups} groups {inputs // groups} inputs; it is damaged")
    return found
