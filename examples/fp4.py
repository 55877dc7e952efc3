"""A number format in one file: floats of four bits, e2m1 (a sign, two bits of exponent and one of mantissa).

    PYTHONPATH=examples jaxllm quantize runs/demo --format fp4:FP4 --out runs/demo-fp4
    PYTHONPATH=examples jaxllm generate runs/demo-fp4 --prompt "def"

Open Compute Project, Microscaling Formats (MX) 1.0, 5.3.3: the magnitudes below. There 32 numbers share a power of two;
here they share a float32, which the largest of them just fills.

Rounded to nearest, a number is off by at most half the gap between its neighbours: a quarter of the scale below 2, half
of it up to 4, and the whole scale up to 6. That is a sixth of the largest number of its group.
"""

from jaxllm.weights.formats import Format

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = tuple(sorted({sign * magnitude for sign in (1.0, -1.0) for magnitude in MAGNITUDES}))

FP4 = Format("fp4", bits=4, largest=6.0, levels=LEVELS, group=32)


def bound(value: float) -> float:
    """The largest error of a number, both in units of its group's scale."""
    return 0.25 if abs(value) < 2 else 0.5 if abs(value) < 4 else 1.0
