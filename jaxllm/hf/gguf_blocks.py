"""Quantised weights as blocks of llama.cpp: 32 codes of a row and their scale in half precision.

Q8_0: the scale, 32 int8. Q4_0: the scale, 16 bytes; byte j holds number j in its low bits and number j + 16 in its high
ones, with 8 added. Groups of 64, 128 or whole rows repeat their scale, so that codes stay as they are; what changes is
the scale, by up to 2^-11 of itself.

Shapes: O outputs, I inputs, G groups, J blocks of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.hf.coded import Coded
from jaxllm.hf.packing import unsigned
from jaxllm.weights.quantized import Quantized

BLOCK = 32
#: format: (type in llama.cpp, bytes of a block).
TYPES = {"int8": ("Q8_0", 34), "int4": ("Q4_0", 18)}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix, or one for each expert, as it lies in the file."""

    kind: str
    data: np.ndarray
    """uint8 `[E?, O, bytes of a row]`"""

    @property
    def shape(self) -> tuple[int, ...]:
        size = dict(TYPES.values())[self.kind]
        return (*self.data.shape[:-1], self.data.shape[-1] // size * BLOCK)

    @classmethod
    def planned(cls, format: str, outputs: int, inputs: int) -> "Blocks":
        """Of the size that a matrix will have, with nothing in it."""
        kind, size = TYPES[format]
        return cls(kind, np.broadcast_to(np.uint8(0), (outputs, inputs // BLOCK * size)))


def check_blocks(weights: Mapping[str, Any]) -> set[str]:
    """The types that quantised weights go into. Raises SettingsError for those that have none, with the next step."""
    found = set()
    for path, weight in weights.items():
        if not isinstance(weight, Quantized):
            continue
        plainly = "make the weights plain first (jaxllm merge)"
        if weight.format not in TYPES or weight.zero is not None or weight.activations is not None:
            how = "" if weight.zero is None else ", with zeros of its own"
            how += "" if weight.activations is None else ", with 8-bit activations"
            raise SettingsError(
                f"{path} is stored as {weight.format}{how}, which has no type in GGUF here (known: symmetric int8 and "
                f"int4, weights alone); {plainly}"
            )
        grouped = weight.order is not None and weight.group != weight.form.inputs
        if weight.group % BLOCK or grouped:
            why = "its inputs reordered" if grouped else f"groups of {weight.group}"
            raise SettingsError(
                f"{path} is stored with {why}, and blocks of GGUF are {BLOCK} inputs one after another; quantise with "
                f"--group {BLOCK}, or {plainly}"
            )
        found.add(TYPES[weight.format][0])
    return found


def to_blocks(name: str, coded: Coded) -> Blocks:
    """The blocks of one matrix. Raises SettingsError for a scale beyond half precision."""
    codes = coded.read()
    scale_OJ = codes.scale.repeat(coded.inputs // BLOCK // coded.groups, axis=1)
    with np.errstate(over="ignore"):
        half = scale_OJ.astype("<f2")
    if not np.isfinite(half).all():
        raise SettingsError(f"{name} has a scale of {scale_OJ.max()}, beyond half precision; export in bf16 or f32")
    numbers = codes.codes.reshape(*scale_OJ.shape, BLOCK)
    if coded.format == "int4":
        nibbles = unsigned(numbers, 4)
        numbers = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    data = np.concatenate([half[..., None].view(np.uint8), numbers.view(np.uint8)], axis=-1)
    return Blocks(TYPES[coded.format][0], data.reshape(coded.outputs, -1))
