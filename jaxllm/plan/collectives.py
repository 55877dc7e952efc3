"""Collectives of a compiled program: which devices exchange how many bytes, and along which axes of the mesh."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxllm.errors import UserError
from jaxllm.plan.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

#: How MegaScale, which carries collectives between slices, calls them.
_MEGASCALE = {"one-to-one": "collective-permute"}
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^)]*\))?)\))? \{([^}]*)\}")
_SUFFIX = re.compile(r"-(start|update|done)$")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective as one device runs it once.

    `payload`: bytes of the whole array on one device, the larger side of a gather or scatter. `wire`: bytes that the
    device sends. `network`: "ici" within a slice, "dcn" between slices.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    group: int
    payload: float
    wire: float


class Layout:
    """Where each partition of a program stands in the mesh.

    `slice_of`: the slice of each device in the mesh's order. TPU programs for several slices are compiled once for all
    slices, so their partitions are those of one slice.
    Raises UserError where the program has neither as many partitions as the mesh or as a slice of it.
    """

    def __init__(self, axes: Mapping[str, int], slice_of: tuple[int, ...], partitions: int):
        self.axes = tuple(axes)
        sizes = tuple(axes.values())
        places = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes)) if sizes else np.zeros((0, 1), int)
        slices = np.asarray(slice_of)
        self.slices = len(set(slice_of))
        self.across = self._varying(places, [np.flatnonzero(slices == s)[:1] for s in set(slice_of)])
        if partitions * self.slices == len(slices):
            inside = np.flatnonzero(slices == slice_of[0])
            places, slices = places[:, inside], slices[inside]
        if partitions != len(slices):
            mesh = ", ".join(f"{axis}={n}" for axis, n in axes.items())
            raise UserError(f"a program of {partitions} partitions, but the mesh ({mesh}) has {len(slice_of)} devices")
        self.places, self.slice_of = places, slices

    def _varying(self, places, groups) -> tuple[str, ...]:
        """Axes along which the first members of these groups differ."""
        first = places[:, np.concatenate(groups)]
        return tuple(a for a, row in zip(self.axes, first, strict=True) if len(set(row)) > 1)

    def along(self, groups: np.ndarray) -> tuple[tuple[str, ...], str]:
        """Mesh axes along which the members of a group differ, and the network that joins them. `groups`: [n, size]."""
        members = self.places[:, groups]  # [axes, groups, size]
        differ = (members != members[:, :, :1]).any(axis=(1, 2))
        slices = self.slice_of[groups]
        network = "dcn" if (slices != slices[:, :1]).any() else "ici"
        return tuple(a for a, d in zip(self.axes, differ, strict=True) if d), network


def read(instruction: Instruction, within: Computation, layout: Layout, scattered: bool = False) -> Exchange | None:
    """The exchange of a collective (or of the start of one), None for other instructions.

    `scattered`: an all-reduce of which every device keeps its part, which is how TPU programs spell reduce-scatter.
    """
    if instruction.op == "send":
        return _between_slices(instruction, within, layout)
    kind = _SUFFIX.sub("", instruction.op)
    if kind not in KINDS:
        return None
    groups = _groups(instruction.attributes, layout.places.shape[1])
    axes, network = layout.along(groups)
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    size = 2 if kind == "collective-permute" else groups.shape[1]
    payload = _payload(kind, instruction, within)
    return Exchange(kind, axes, network, size, payload, wire(kind, payload, size))


def role(inside: Computation) -> str | None:
    """ "start" or "done" of a collective that runs beside the fusions between the two; None for any other fusion."""
    for instruction in inside.values():
        if instruction.op == "custom-call" and '"AsyncCollective' in instruction.attributes:
            return "start" if '"AsyncCollectiveStart"' in instruction.attributes else "done"
    return None


def wire(kind: str, payload: float, size: int) -> float:
    """Bytes that each of `size` devices sends: ring algorithms (Thakur et al. 2005, section 4)."""
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    return payload * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _payload(kind: str, instruction: Instruction, within: Computation) -> float:
    given = [shape for name in instruction.operands if name in within for shape in within[name].shapes]
    made = instruction.shapes
    if instruction.op.endswith("-start") and len(made) > len(given):
        made = made[len(given) : 2 * len(given)] or made  # the tuple of a start holds operands, results, and flags
    if kind == "ragged-all-to-all":
        # The others are the buffer that it fills, and offsets. One side has room for the rows of all devices.
        return min(given[0].bytes, made[0].bytes)
    sent, received = (sum(shape.bytes for shape in shapes) for shapes in (given, made))
    return max(sent, received) if kind in ("all-gather", "reduce-scatter") else sent or received


def _between_slices(send: Instruction, within: Computation, layout: Layout) -> Exchange | None:
    """What MegaScale takes from a device to other slices; None for another transfer to the host.

    The attributes of libtpu 0.0.42 to 0.0.52: _xla_megascale_transfer_type="ALL_GATHER" (the operand is a device's own
    part), _xla_megascale_target="{1,2}x..." (the slices).
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if not found:
        return None
    kind = found[1].lower().replace("_", "-")
    kind = _MEGASCALE.get(kind, kind)
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', send.attributes)
    size = 2 if kind == "collective-permute" else len(target[1].split(",")) if target else layout.slices
    payload = within[send.operands[0]].bytes * (size if kind == "all-gather" else 1)
    return Exchange(kind, layout.across, "dcn", size, payload, wire(kind, payload, size))


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Partitions of each group, [groups, size]; of a permutation, its pairs."""
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))
    if found := _MESH.search(attributes):
        return _of_mesh(found[1], found[2], found[3])
    return np.arange(devices)[None]


def _listed(text: str) -> np.ndarray:
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7 as a 2x4 array, transposed."""
    array = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return array.transpose(_ints(order)) if order else array


def _of_mesh(mesh: str, devices: str | None, grouped: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`, of a mesh that the compiler made up. `'b':(2)2` is the part of b with stride
    4 / (2 * 2): b is cut into 2, then 2, and the second cut is meant (xla/hlo/ir/mesh_and_axis.cc)."""
    cuts, sizes = {}, {}
    for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh):
        cuts[name], sizes[name] = {1, int(size)}, int(size)
    parts = [
        (name, int(before or 1), int(before or 1) * int(size or sizes[name]))
        for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", grouped)
    ]
    for name, start, end in parts:
        cuts[name] |= {start, end}
    shape, chosen = [], []
    for name, points in cuts.items():
        points = sorted(points)
        for start, end in zip(points[:-1], points[1:], strict=True):
            shape.append(end // start)
            chosen.append(any(n == name and a <= start and end <= b for n, a, b in parts))
    if devices and (made := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", devices)):
        array = _iota(made[1], made[2])
    else:
        array = np.array(_ints(devices)) if devices else np.arange(math.prod(sizes.values()))
    order = [i for i, c in enumerate(chosen) if not c] + [i for i, c in enumerate(chosen) if c]
    size = math.prod(n for n, c in zip(shape, chosen, strict=True) if c)
    return array.reshape(shape).transpose(order).reshape(-1, size)


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
