"""Numbers of 4 or 8 bits in words of 32, the first one in the lowest bits, as GPTQ, AWQ and others pack them."""

import numpy as np

from jaxllm.errors import DataError
from jaxllm.hf.safetensors import Entry

BITS = (4, 8)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[..., 32 / bits * W]` of int32 `[..., W]`."""
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int32 `[..., W]` of unsigned numbers `[..., n]`, filled up with zeros to whole words."""
    short = -numbers.shape[-1] % (32 // bits)
    raw = np.pad(numbers.astype(np.uint8), [(0, 0)] * (numbers.ndim - 1) + [(0, short)])
    if bits == 4:
        raw = raw[..., ::2] | raw[..., 1::2] << 4
    return np.ascontiguousarray(raw).view("<i4")


def signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """int8: unsigned codes with the middle of their range at 0."""
    return (numbers.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `signed`."""
    return (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def expect(name: str, entry: Entry, shape: tuple[int, ...], dtypes: str) -> None:
    """Raises DataError for a tensor of another shape or kind; `dtypes`: names, with spaces between."""
    if entry.shape != shape or entry.dtype.name not in dtypes.split():
        raise DataError(
            f"tensor {name} is {entry.dtype.name}{list(entry.shape)}, and the other tensors of its matrix make it "
            f"{dtypes.replace(' ', ' or ')}{list(shape)}; the file is damaged"
        )
