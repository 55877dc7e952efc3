"""Weights quantised by bitsandbytes to nf4 (QLoRA, arXiv 2305.14314).

`weight` uint8 `[O I / 2, 1]` packs two codes to a byte, the first one in the high bits, row after row.
`weight.absmax` has a scale for each block of 64 of them, or its 8-bit code in `weight.nested_quant_map`, times a scale
for 256 of those in `weight.nested_absmax`, plus an offset. `weight.quant_map` has the levels, and
`weight.quant_state.bitsandbytes__nf4` the sizes, as JSON in bytes.

Shapes: O outputs, I inputs, G groups.
"""

import json
import math
from typing import Any

import numpy as np

from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.coded import Coded, Codes
from jaxllm.hf.packing import expect
from jaxllm.hf.safetensors import Tensors
from jaxllm.weights.formats import FORMATS

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


def read_bitsandbytes(tensors: Tensors, settings: dict) -> dict[str, Any]:
    """The tensors, with quantised matrices as codes.

    Scales in 8 bits become floats: their blocks run over rows, and ours do not. Raises SettingsError for other kinds
    than nf4, DataError for tensors that do not fit each other.
    """
    kind = settings.get("bnb_4bit_quant_type")
    if not settings.get("load_in_4bit") or kind != "nf4":
        raise SettingsError(
            f"{tensors.folder}: bitsandbytes with load_in_4bit={settings.get('load_in_4bit')!r}, "
            f"bnb_4bit_quant_type={kind!r} is not read here; known is nf4; or use the model's weights in bfloat16"
        )
    out: dict[str, Any] = {}
    for name in tensors:
        if name.endswith(STATE):
            whole = name.removesuffix(STATE)
            out[whole] = _matrix(tensors, whole)
        elif not name.endswith(PARTS):
            out.setdefault(name, tensors[name])
    return out


def _matrix(tensors: Tensors, name: str) -> Coded:
    state = _state(tensors, name)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    if inputs % block:
        raise SettingsError(
            f"{name} has {inputs} inputs in blocks of {block}, which run on from one row into the next; use the "
            "model's weights in bfloat16"
        )
    groups = inputs // block
    nested = "nested_blocksize" in state
    weight, scale = tensors[name], tensors[name + ".absmax"]
    if weight.dtype != np.uint8 and weight.dtype.kind in "fV":
        raise SettingsError(
            f"tensor {name} keeps its codes as {weight.dtype.name} (bnb_4bit_quant_storage); read are those in uint8"
        )
    if math.prod(weight.shape) * 2 != outputs * inputs or weight.dtype != np.uint8:
        raise DataError(
            f"tensor {name} is {weight.dtype.name}{list(weight.shape)}, and two codes a byte of {outputs} x {inputs} "
            "are wanted; the file is damaged"
        )
    expect(name + ".absmax", scale, (outputs * groups,), "uint8" if nested else "float32")
    _check_levels(tensors, name)

    def read() -> Codes:
        packed = np.asarray(weight.map()).reshape(outputs, -1)
        codes_OI = np.stack([packed >> 4, packed & 15], axis=-1).reshape(outputs, inputs).astype(np.int8)
        scales = _nested(tensors, name, state) if nested else np.asarray(scale.map())
        return Codes(codes_OI, scales.reshape(outputs, groups))

    return Coded(name, "nf4", outputs, inputs, groups, read)


def _state(tensors: Tensors, name: str) -> dict:
    where = name + STATE
    try:
        state = json.loads(np.asarray(tensors[where].map(), np.uint8).tobytes())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if len(sizes) != 4 or not all(type(n) is int and n > 0 for n in sizes) or state["quant_type"] != "nf4":
            raise ValueError("shape, blocksize or quant_type is not what it must be")
        if "nested_blocksize" in state:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"tensor {where} is damaged ({error}); download the file again") from None
    return state


def _nested(tensors: Tensors, name: str, state: dict) -> np.ndarray:
    """The scales that 8-bit codes stand for."""
    codes, block = np.asarray(tensors[name + ".absmax"].map()), state["nested_blocksize"]
    expect(name + ".nested_quant_map", tensors[name + ".nested_quant_map"], (256,), "float32")
    expect(name + ".nested_absmax", tensors[name + ".nested_absmax"], (-(-codes.size // block),), "float32")
    levels, steps = (np.asarray(tensors[name + part].map()) for part in (".nested_quant_map", ".nested_absmax"))
    return levels[codes] * steps.repeat(block)[: codes.size] + np.float32(state["nested_offset"])


def _check_levels(tensors: Tensors, name: str) -> None:
    expect(name + ".quant_map", tensors[name + ".quant_map"], (16,), "float32")
    found, ours = np.asarray(tensors[name + ".quant_map"].map()), np.asarray(FORMATS["nf4"].levels)
    if not np.allclose(found, ours, rtol=0, atol=1e-6):
        raise SettingsError(f"tensor {name}.quant_map has other levels than nf4; use the model's weights in bfloat16")
