"""Stored tensors that stand for others, by the `quant_method` of a folder.

Float8 with block scales (DeepSeek-V3) and MXFP4 (GPT-OSS), in which models are published, become floats. What was
rounded from a published model (GPTQ, AWQ, compressed-tensors, bitsandbytes) stays codes: `coded.Coded`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import DataError, SettingsError
from jaxllm.hf.bitsandbytes import read_bitsandbytes
from jaxllm.hf.compressed import read_compressed
from jaxllm.hf.gptq import read_awq, read_gptq
from jaxllm.hf.safetensors import Entry, Tensors

#: Ends of names that only tensors of quantised models have.
ODD = ("_scale_inv", "_blocks", ".qweight", ".weight_packed", ".weight_scale", ".absmax")


@dataclasses.dataclass(frozen=True)
class Float8:
    """A float8 matrix times its scales, one for each block of rows by columns (arXiv 2412.19437, section 3.3)."""

    values: Entry
    scales: Entry
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def map(self) -> np.ndarray:
        rows, columns = self.shape
        scales = np.asarray(self.scales.map(), np.float32)
        scales = scales.repeat(self.block[0], axis=0)[:rows].repeat(self.block[1], axis=1)[:, :columns]
        return np.asarray(self.values.map(), np.float32) * scales


#: The sixteen values of E2M1 (OCP Microscaling Formats 1.0, table 5), by their four bits.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Experts in MXFP4: blocks of 32 numbers of 4 bits with a shared power of two (OCP Microscaling Formats 1.0).

    Stored as blocks [E, rows, B, 16] of two numbers a byte, low bits first, and scales [E, rows, B] with bias 127;
    they stand for [E, B * 32, rows].
    """

    blocks: Entry
    scales: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        E, rows, B, half = self.blocks.shape
        return E, B * half * 2, rows

    def map(self) -> np.ndarray:
        out = np.empty(self.shape, np.float32)
        blocks, scales = self.blocks.map(), self.scales.map()
        for e in range(len(out)):  # one expert at a time: the floats are eight times as large
            packed = np.asarray(blocks[e])
            values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=-1).reshape(*packed.shape[:2], -1)
            powers = np.exp2(np.asarray(scales[e], np.float32) - 127)[..., None]
            out[e] = (values * powers).reshape(packed.shape[0], -1).T
        return out


def dequantized(tensors: Tensors, raw: dict[str, Any]) -> Mapping[str, Any]:
    """The tensors by the names of the floats that they stand for.

    Raises SettingsError for an unknown quantisation, DataError for tensors that do not fit each other.
    """
    settings = raw.get("quantization_config")
    if settings is None:
        odd = next((name for name in tensors if name.endswith(ODD)), None)
        if odd is not None:
            raise DataError(
                f"{tensors.folder}: {odd} is of a quantised model, and config.json has no quantization_config; older "
                "GPTQ folders have it in quantize_config.json: copy it there, with quant_method"
            )
        return tensors
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in METHODS:
        raise SettingsError(
            f"{tensors.folder}: quant_method={method!r} is not read here; known: {', '.join(METHODS)}; or get the "
            "folder in bfloat16"
        )
    return METHODS[method](tensors, settings)


def _float8(tensors: Tensors, settings: dict) -> dict[str, Any]:
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise SettingsError(f"{tensors.folder}: weight_block_size={block!r} must be two sizes, such as [128, 128]")
    out: dict[str, Any] = {}
    for name, entry in tensors.items():
        if name.endswith("_scale_inv"):
            values = tensors[name.removesuffix("_scale_inv")]
            grid = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=False))
            if len(values.shape) != 2 or entry.shape != grid:
                raise DataError(
                    f"tensor {name} has shape {list(entry.shape)}, and blocks of {block} make it {list(grid)}"
                )
            out[name.removesuffix("_scale_inv")] = Float8(values, entry, tuple(block))
        else:
            out.setdefault(name, entry)
    bare = [n for n, e in out.items() if isinstance(e, Entry) and e.dtype.itemsize == 1 and e.dtype.kind not in "biu"]
    if bare:
        raise DataError(f"tensor {bare[0]} is float8 and has no {bare[0]}_scale_inv")
    return out


def _mxfp4(tensors: Tensors, settings: dict) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, entry in tensors.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            scales = tensors[base + "_scales"]
            if len(entry.shape) != 4 or entry.shape[3] != 16 or scales.shape != entry.shape[:3]:
                raise DataError(
                    f"tensors {name} {list(entry.shape)} and {base}_scales {list(scales.shape)} are not MXFP4 "
                    "(experts, rows, blocks, 16) and (experts, rows, blocks)"
                )
            out[base] = Mxfp4(entry, scales)
        elif not name.endswith("_scales"):
            out[name] = entry
    return out


METHODS = {
    "fp8": _float8,
    "mxfp4": _mxfp4,
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "bitsandbytes": read_bitsandbytes,
}
