"""The text of a compiled program (HLO) as instructions: types, operands, called computations, trip counts of loops.

What the instructions mean: https://openxla.org/xla/operation_semantics. Those of a scheduled module stand in the order
in which they start.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

#: Bytes of an element.
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "bf16": 2, "f4e2m1fn": 0.5, "c64": 8, "c128": 16}
BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)}
BYTES |= dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0fnu"), 1)

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """An array: dtype, sizes, and whether it lives in a memory other than the device's main one (VMEM, host)."""

    dtype: str
    dims: tuple[int, ...]
    elsewhere: bool = False

    @property
    def bytes(self) -> float:
        return BYTES[self.dtype] * math.prod(self.dims)


@dataclasses.dataclass
class Instruction:
    """One line. `attributes` is what stands behind the operands, unparsed."""

    name: str
    op: str
    type: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, tuples flattened."""
        return tuple(
            Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" in layout)
            for dtype, dims, layout in _SHAPE.findall(self.type)
            if dtype in BYTES
        )

    @functools.cached_property
    def operands(self) -> list[str]:
        return [] if self.op in ("parameter", "constant") else _OPERAND.findall(self.arguments)

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def cycles(self) -> int:
        """Cycles that the TPU compiler estimates; 0 where it says nothing, or 2^63 - 1, which is the same."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) % (2**63 - 1) if found else 0

    def called(self) -> list[str]:
        """Names of the computations that it runs, those of a loop excepted."""
        found = _CALLED.search(self.attributes)
        if not found:
            return []
        text = self.attributes[found.end() :]
        if text[0] == "{":
            return _OPERAND.findall(text[: text.index("}")])
        names = [self.attribute(key) for key in ("calls", "to_apply", "true_computation", "false_computation")]
        return [name for name in names if name]

    def attribute(self, key: str) -> str | None:
        """The word behind `key=`, without %."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations by name, the entry's name, and how many partitions run the program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, last = "", None, None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and (head := _HEAD.match(line)):
                current, last = computations.setdefault(head[2], {}), None
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread="):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = last = instruction
        elif last is not None:
            last.attributes += line  # the metadata of a kernel goes over several lines
    head = text.partition("\n")[0]  # of tens of thousands of characters where there are many arguments
    found = re.search(r"\bnum_partitions=(\d+)", head) or re.search(r"\breplica_count=(\d+)", head)
    return Module(computations, entry, int(found[1]) if found else 1)


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    opcode = name and _OPCODE.search(line, name.end() - 1)
    if not opcode:
        return None
    end = _close(line, opcode.end())
    kind = line[name.end() : opcode.start()]
    return Instruction(name[2], opcode[1], kind, line[opcode.end() : end], line[end + 1 :], bool(name[1]))


def _close(line: str, start: int) -> int:
    """Where the parenthesis that opened before `start` closes."""
    end, depth = line.find(")", start), line.count("(", start, line.find(")", start))
    while depth and end >= 0:
        before, end = end, line.find(")", end + 1)
        depth += line.count("(", before, end) - 1
    return end if end >= 0 else len(line)


def root(computation: Computation) -> Instruction:
    return next(i for i in reversed(computation.values()) if i.root)


# Trip counts. A scalar is an expression over the loop's state: ("constant", 4), ("state", 2) for element 2 of the
# tuple that the loop carries, ("add", a, b), ("compare", "LT", a, b), ("most", 4) for the smaller of 4 and something
# that is not known, or None for anything else.

_THROUGH = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "optimization-barrier")


def trip_count(module: Module, within: Computation, loop: Instruction, known: Mapping[int, int]) -> int | None:
    """How often the body of `loop` runs, None where it is not a constant; at most, where data may end it earlier.

    `within` is the computation where the loop stands; `known`: elements of that computation's own state that are
    constant in every round.
    """
    if found := _TRIPS.search(loop.attributes):
        return int(found[1])
    test = expression(module, condition := _of(module, loop, "condition"), root(condition).name)
    if not test or test[0] != "compare":
        return None
    first, _, step = _variable(module, within, loop, test[2], known)
    limit = _variable(module, within, loop, test[3], known, most=True)
    if first is None or limit[0] is None or limit[2] not in (0, None) or not step:
        return None
    return _rounds(test[1], first, limit[0], step)


def _rounds(direction: str, first: int, limit: int, step: int) -> int | None:
    if direction in ("GT", "GE"):
        first, limit, step = -first, -limit, -step
    if step <= 0 or direction == "EQ":
        return None
    rounds = (limit - first) / step
    return max(0, math.floor(rounds) + 1 if direction in ("LE", "GE") else math.ceil(rounds))


def _variable(module, within, loop, symbol, known, most=False) -> tuple[int | None, int | None, int | None]:
    """`(value before the loop, element of the state, what a round adds)` of a symbol in the condition.

    most: the value may be an upper bound.
    """
    if symbol and symbol[0] == "constant":
        return symbol[1], None, 0
    if not symbol or symbol[0] != "state":
        return None, None, None
    body, index = _of(module, loop, "body"), symbol[1]
    after = _element(module, body, root(body).name, index)
    step = 0 if after == symbol else None
    if after and after[0] == "add" and symbol in after[1:]:
        other = after[2] if after[1] == symbol else after[1]
        step = other[1] if other[0] == "constant" else None
    before = _element(module, within, loop.operands[0], index)
    value = None
    if before and before[0] == "most" and most:
        value = before[1]
    if before and before[0] in ("constant", "state"):
        value = before[1] if before[0] == "constant" else known.get(before[1])
    return value, index, step


def invariants(module: Module, within: Computation, loop: Instruction, known: Mapping[int, int]) -> dict[int, int]:
    """Elements of the state of `loop` that hold the same known integer in every round."""
    body = _of(module, loop, "body")
    out = {}
    for index in range(len(root(body).operands)):
        value, _, step = _variable(module, within, loop, ("state", index), known)
        if step == 0 and value is not None:
            out[index] = value
    return out


def _of(module: Module, loop: Instruction, key: str) -> Computation:
    return module.computations[loop.attribute(key)]


def _element(module: Module, within: Computation, name: str, index: int):
    """Element `index` of a tuple, as an expression."""
    made = within.get(name)
    if made is None or made.op == "parameter":
        return made and ("state", index)
    if made.op == "tuple":
        return expression(module, within, made.operands[index])
    return _element(module, within, made.operands[0], index) if made.op in _THROUGH else None


def _counts(made: Instruction) -> bool:
    """Whether it can be a loop's counter or limit, or what compares the two: a sum of arrays branches without end."""
    return all(not shape.dims and shape.dtype[0] in "sup" for shape in made.shapes[:1])


def expression(module: Module, within: Computation, name: str, inputs: tuple | None = None):
    """A scalar as an expression over the state; `inputs` stand for the parameters of a fusion."""
    made = within.get(name)
    if made is None or not _counts(made):
        return None
    if made.op == "constant":
        return ("constant", int(made.arguments)) if re.fullmatch(r"-?\d+", made.arguments) else None
    if made.op == "parameter":
        return inputs[int(made.arguments)] if inputs else None
    if made.op == "get-tuple-element":
        return _element(module, within, made.operands[0], int(made.attribute("index")))
    if made.op in _THROUGH:
        return expression(module, within, made.operands[0], inputs)
    if made.op in ("fusion", "call") and (called := made.called()):
        inside = module.computations[called[0]]
        given = tuple(expression(module, within, operand, inputs) for operand in made.operands)
        return expression(module, inside, root(inside).name, given)
    if made.op == "minimum":
        sides = [expression(module, within, operand, inputs) for operand in made.operands]
        bounds = [side[1] for side in sides if side and side[0] in ("constant", "most")]
        return ("most", min(bounds)) if bounds else None
    if made.op in ("add", "subtract", "compare"):
        left, right = (expression(module, within, operand, inputs) for operand in made.operands)
        if left is None or right is None:
            return None
        if made.op == "compare":
            return ("compare", made.attribute("direction"), left, right)
        if made.op == "add":
            return ("add", left, right)
        return ("add", left, ("constant", -right[1])) if right[0] == "constant" else None
    return None
