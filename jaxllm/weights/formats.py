"""Number formats of quantised weights: codes of a few bits, and the values they stand for.

A format maps values of a group, divided by the group's scale, to codes and back. `FORMATS` is the table of them; a new
one is one entry, or `package.module:NAME` for one outside of the package (`examples/fp4.py`).

Rounding to nearest is off by at most, in units of the scale: half a step of integers (0.5; int8, int4, int2), half the
widest gap of levels (0.152 for nf4), and for fp8 1/16 of the value, or 2^-10 below 2^-6. Scales in 8 bits add the
largest value times half of their own step.

Shapes: any; P bytes of the last axis once packed.
"""

import dataclasses
import importlib
import itertools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SettingsError, nearest


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format whose codes stand for `levels`, or for themselves (integers, and floats of a jax dtype).

    Raises SettingsError where the parts do not fit together.
    """

    name: str
    bits: int
    largest: float
    """The magnitude that the largest weight of a group is scaled to."""
    levels: tuple[float, ...] | None = None
    """The value of each code, ascending; None for integers and floats."""
    group: int | None = None
    """Inputs that share a scale where none is given; None for all inputs of an output."""
    dtype: str | None = None
    """The jax dtype of codes that are floats, such as float8_e4m3fn; None for levels and integers."""

    def __post_init__(self):
        floats = self.dtype is not None
        if not 1 <= self.bits <= 8 or (floats and (self.levels or self.bits != 8 or not hasattr(jnp, self.dtype))):
            raise SettingsError(
                f"format {self.name}: bits={self.bits}, dtype={self.dtype}: codes have 1 to 8 bits, and those of a jax "
                "dtype have 8 and no levels"
            )
        levels = self.levels or (-1.0, 1.0)
        if not 2 <= len(levels) <= 2**self.bits or any(a >= b for a, b in itertools.pairwise(levels)):
            raise SettingsError(
                f"format {self.name}: {len(levels)} levels: codes of {self.bits} bits stand for 2 to {2**self.bits} "
                "levels, in ascending order"
            )
        if not 0 < self.largest <= self._limit():
            raise SettingsError(
                f"format {self.name}: largest={self.largest} must be above 0, and at most the {self._limit()} that its "
                "codes reach"
            )

    def _limit(self) -> float:
        if self.dtype is not None:
            return float(jnp.finfo(self.dtype).max)
        return 2 ** (self.bits - 1) - 1 if self.levels is None else max(map(abs, self.levels))

    @property
    def integer(self) -> bool:
        """Whether a code is the value itself, so that integer products can be taken."""
        return self.levels is None and self.dtype is None

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    def encode(self, values: jax.Array) -> jax.Array:
        """The nearest code of each value (already divided by its scale), not packed."""
        if self.dtype is not None:
            return jnp.clip(values, -self.largest, self.largest).astype(self.dtype)
        if self.levels is None:
            low = -self.largest if self.bits == 8 else -self.largest - 1
            return jnp.clip(jnp.round(values), low, self.largest).astype(jnp.int8)
        middles = (np.array(self.levels[1:]) + np.array(self.levels[:-1])) / 2
        return jnp.searchsorted(jnp.asarray(middles, values.dtype), values, side="right").astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype) -> jax.Array:
        """The values of codes that are not packed, in units of the scale."""
        if self.levels is None:
            return codes.astype(dtype)
        return jnp.asarray(self.levels, dtype)[codes]

    def pack(self, codes: jax.Array) -> jax.Array:
        """Codes of 4 or 2 bits, two or four to a byte along the last axis, the first one in the lowest bits."""
        if self.per_byte == 1:
            return codes
        shape = (*codes.shape[:-1], codes.shape[-1] // self.per_byte, self.per_byte)
        bits = codes.astype(jnp.uint8).reshape(shape) & (2**self.bits - 1)
        shifts = jnp.arange(self.per_byte, dtype=jnp.uint8) * self.bits
        return jnp.sum(bits << shifts, axis=-1, dtype=jnp.uint8)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """The codes that `pack` packed."""
        if self.per_byte == 1:
            return packed
        shifts = jnp.arange(self.per_byte, dtype=jnp.uint8) * self.bits
        codes = (packed[..., None] >> shifts) & (2**self.bits - 1)
        codes = codes.reshape(*packed.shape[:-1], -1).astype(jnp.int8)
        return codes if self.levels is not None else jnp.where(codes > self.largest, codes - 2**self.bits, codes)


def _normal_float(bits: int) -> tuple[float, ...]:
    """The levels of normal float: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.

    Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E: half of the levels below zero, and one more than
    half from zero up.
    """
    offset = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2: the outermost quantile, appendix E
    half = 2 ** (bits - 1)
    up = [NormalDist().inv_cdf(float(p)) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    down = [-NormalDist().inv_cdf(float(p)) for p in np.linspace(offset, 0.5, half)[:-1]]
    levels = sorted([*up, *down, 0.0])
    return tuple(level / max(levels) for level in levels)


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8, 127.0),
        Format("int4", 4, 7.0, group=64),
        Format("nf4", 4, 1.0, _normal_float(4), group=64),
        Format("int2", 2, 1.5, (-1.5, -0.5, 0.5, 1.5), group=32),
        Format("fp8", 8, 448.0, dtype="float8_e4m3fn"),
    )
}


def get_format(name: str) -> Format:
    """The format of this name, or at `package.module:NAME`. Raises SettingsError with the nearest one."""
    if name in FORMATS:
        return FORMATS[name]
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise SettingsError(
            f"unknown format {name!r}{nearest(name, FORMATS)}; known are {', '.join(FORMATS)} and package.module:NAME"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"format {name!r}: {error}; it is package.module:NAME of a Format, and Python must find the package: "
            "install it, or put its folder into PYTHONPATH"
        ) from None
    if not isinstance(found, Format):
        raise SettingsError(
            f"format {name!r} is a {type(found).__name__}, not a Format; write it as package.module:NAME"
        )
    return found
