"""What one instruction of a compiled program costs: FLOPs of matrix products, bytes to and from memory."""

import functools
import math
import re

import numpy as np

from jaxllm.plan.collectives import KINDS, role
from jaxllm.plan.hlo import Computation, Instruction, Module, Shape, root

#: Instructions that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "send-done", "recv",
}  # fmt: skip


def matmul(instruction: Instruction, within: Computation) -> tuple[str, float] | None:
    """`(dtype, FLOPs)` of a dot or a convolution, the dtype being the wider of its operands'; None for the others."""
    if instruction.op not in ("dot", "convolution"):
        return None
    left, right = (within[name].shapes[0] for name in instruction.operands[:2])
    count = _dot if instruction.op == "dot" else _convolution
    wider = max(left, right, key=lambda shape: shape.bytes / max(math.prod(shape.dims), 1))
    return wider.dtype, count(instruction, left, right)


def _dot(dot: Instruction, left: Shape, right: Shape) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [left.dims[int(axis)] for axis in found[1].split(",") if axis] if found else []
    return 2 * math.prod(dot.shapes[0].dims) * math.prod(contracted)


def _convolution(conv: Instruction, left: Shape, right: Shape) -> float:
    """2 x pairs of input and output position x batch x features out x features in. TPU programs write matmuls so."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", conv.attributes)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    made = conv.shapes[0].dims
    spatial = sorted(label for label in lhs if label.isdigit())
    per_axis = {key: value.split("x") for key, value in window.items()}
    pairs = 1
    for n, label in enumerate(spatial):
        size, stride, spread, gap = (
            int(per_axis[key][n]) if key in per_axis else 1 for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(per_axis["pad"][n].split("_")[0]) if "pad" in per_axis else 0
        pairs *= _pairs(left.dims[lhs.index(label)], made[out.index(label)], size, stride, spread, gap, low)
    groups = re.search(r"batch_group_count=(\d+)", conv.attributes)
    features = made[out.index("b")] * made[out.index("f")] * right.dims[rhs.index("i")]
    return 2 * pairs * features / (int(groups[1]) if groups else 1)


@functools.cache
def _pairs(base: int, out: int, size: int, stride: int, spread: int, gap: int, low: int) -> int:
    """Pairs of output and window position along one axis that meet an input, and not padding or dilation."""
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * gap - low
    return int(((at >= 0) & (at <= (base - 1) * spread) & (at % spread == 0)).sum())


def declared(instruction: Instruction) -> dict[str, float]:
    """The cost estimate that a Pallas kernel declares (flops, transcendentals, bytes_accessed), empty without one."""
    found = re.search(r'cost_estimate\\?":\{([^}]*)\}', instruction.attributes)
    return {key: float(n) for key, n in re.findall(r'(\w+)\\?":\\?"?(\d+)', found[1])} if found else {}


def traffic(module: Module, instruction: Instruction, within: Computation) -> float:
    """Bytes that a scheduled instruction reads from and writes to main memory, each operand once: an upper bound.

    What lives in VMEM or on the host does not count, of a slice only the slice, of an update in place only the update.
    """
    op = instruction.op
    if op in _FREE or op == "custom-call" and "Bitcast" in instruction.attributes:
        return 0
    if op == "custom-call" and "bytes_accessed" in (cost := declared(instruction)):
        return cost["bytes_accessed"]
    given = [within.get(name) for name in instruction.operands]
    if op.endswith("-done"):
        return _main(instruction.shapes)
    if op.endswith(("-start", "-update")) or op == "send":
        return sum(_main(o.shapes) for o in given if o is not None and o.op not in ("constant", "tuple"))
    if op == "fusion":
        inside = module.computations[instruction.called()[0]]
        if asynchronous := role(inside):
            gathered = sum(_main(i.shapes) for i in inside.values() if i.op in KINDS)
            return gathered if asynchronous == "start" else 0
        uses = _uses(inside)
        read = sum(
            _read(inside, parameter, uses)
            for parameter in inside.values()
            if parameter.op == "parameter" and not _constant(given, parameter)
        )
        return read + _written(inside)
    return _plain(instruction, given)


def _main(shapes) -> float:
    return sum(shape.bytes for shape in shapes if not shape.elsewhere)


def _constant(given: list, parameter: Instruction) -> bool:
    operand = given[int(parameter.arguments)] if int(parameter.arguments) < len(given) else None
    return operand is not None and operand.op == "constant"


def _uses(inside: Computation) -> dict[str, list[Instruction]]:
    uses: dict[str, list[Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            uses.setdefault(name, []).append(instruction)
    return uses


def _read(inside: Computation, value: Instruction, uses) -> float:
    """Bytes read of a fusion's parameter: of one that is only sliced, or updated in place, no more than the slices."""
    whole, read = _main(value.shapes), 0.0
    for user in uses.get(value.name, []):
        if user.op in ("bitcast", "copy") and not user.root:
            read += _read(inside, user, uses)
        elif user.op == "dynamic-slice" and user.operands[0] == value.name:
            read += user.bytes if whole else 0
        elif user.op == "tuple" or (user.op == "dynamic-update-slice" and user.operands[0] == value.name):
            continue  # passed through, or written in place
        else:
            return whole
    return min(whole, read)


def _written(inside: Computation) -> float:
    last = root(inside)
    results = [inside[name] for name in last.operands if name in inside] if last.op == "tuple" else [last]
    return sum(_result(inside, result) for result in results)


def _result(inside: Computation, made: Instruction) -> float:
    if made.op == "parameter" or made.op in KINDS:  # of a collective that runs beside, counted at its start
        return 0
    if made.op == "bitcast" and made.operands[0] in inside and inside[made.operands[0]].op == "dynamic-update-slice":
        made = inside[made.operands[0]]
    if made.op == "dynamic-update-slice":
        return inside[made.operands[1]].bytes if _main(made.shapes) else 0
    return _main(made.shapes)


def _plain(instruction: Instruction, given: list) -> float:
    """An instruction outside of fusions."""
    if instruction.op == "dynamic-slice":
        return 2 * _main(instruction.shapes)
    if instruction.op == "dynamic-update-slice":
        return 2 * _main(given[1].shapes) if given[1] is not None else 0
    read = sum(_main(o.shapes) for o in given if o is not None and o.op not in ("constant", "tuple"))
    return read + _main(instruction.shapes)
