"""What a compiled program does on one device: FLOPs, collectives by mesh axis, cycles, memory.

XLA's own cost_analysis counts the body of a loop once, so that a scanned model comes out 10 to 60 times too small; here
the instructions of the compiled text are counted as often as they run.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from jaxllm.chips import Chip
from jaxllm.plan import hlo
from jaxllm.plan.collectives import Layout
from jaxllm.plan.walk import Speed, walk


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes, in bytes and cycles of one device and one run."""

    kind: str
    axes: tuple[str, ...]
    network: str
    """"ici" within a slice, "dcn" between slices."""
    group: int
    """Devices that exchange with each other; 2 for a permutation."""
    count: float
    """How often they run."""
    payload_bytes: float
    """The whole arrays, the larger side of a gather or scatter."""
    wire_bytes: float
    """What a device sends."""
    overlapped_bytes: float
    """Of the bytes on the wire, those that travel while the device computes."""
    exposed_bytes: float
    """The others: of synchronous collectives all, of the rest what takes longer than the compute beside it."""
    between_cycles: float
    """Compute that the compiler scheduled between the starts and the ends, 0 for synchronous ones."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: how often it runs, and FLOPs and bytes of all runs as it declares them (None: it does not)."""

    name: str
    count: float
    flops: float | None
    bytes: float | None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler laid them out. `aliased`: outputs in the place of donated arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    """Of TPU programs the sum over all buffers, although many take turns in the same place."""
    peak: int | None = None
    """The most that is in use at once, arguments included; None where the compiler does not say."""

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Program:
    """One device's share of a compiled program, run once."""

    devices: int
    matmul_flops: dict[str, float]
    """FLOPs of dots and convolutions by the dtype of their operands (HLO's names: bf16, f32, s8, f8e4m3fn)."""
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    cycles: float
    """Sum of the TPU compiler's estimated cycles: neither kernels nor the wait for collectives is in it."""
    seconds: float | None
    """The same at the chip's clock. Good as the ratio of two programs, and for little else."""
    hbm_bytes: float
    """Traffic with main memory, an upper bound: every operand and result of every scheduled instruction."""
    loops: tuple[tuple[str, int | None, float], ...]
    """`(body, trips, runs of the loop)`; trips are None, and were counted as 1, where they are not a constant."""
    memory: Memory | None

    @property
    def flops(self) -> float:
        """Matrix products and kernels."""
        return sum(self.matmul_flops.values()) + sum(kernel.flops or 0 for kernel in self.kernels)

    def wire_bytes(self, *, kind: str | None = None, axis: str | None = None, network: str | None = None) -> float:
        """Bytes that a device sends, of collectives of that kind, along that axis (and others), over that network."""
        return sum(
            row.wire_bytes
            for row in self.collectives
            if kind in (None, row.kind) and network in (None, row.network) and (axis is None or axis in row.axes)
        )

    def to_dict(self) -> dict[str, typing.Any]:
        """Plain values for JSON, with the totals."""
        out = dataclasses.asdict(self) | {"flops": self.flops, "wire_bytes": self.wire_bytes()}
        if self.memory is not None:
            out["memory"]["total"] = self.memory.total
        return out


def facts(compiled, mesh, chip: Chip | None = None, speed: Speed | None = None) -> Program:
    """Facts of a `jax.stages.Compiled`, for the jax `Mesh` it was compiled for.

    `chip`: gives seconds, and tells how much of an asynchronous collective the compute beside it hides; without one all
    of it counts as hidden. `speed`: of the links of an exchange (`bounds.speed_of`), default all of the chip's.
    Raises UserError where the program is not one of this mesh.
    """
    slices = tuple(getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat)
    analysis = compiled.memory_analysis()
    memory = analysis and Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        getattr(analysis, "peak_memory_in_bytes", 0) or None,
    )
    return from_text(compiled.as_text(), dict(mesh.shape), chip, slice_of=slices, memory=memory, speed=speed)


def from_text(
    text: str,
    mesh_shape: Mapping[str, int],
    chip: Chip | None = None,
    *,
    slice_of: Sequence[int] | None = None,
    memory: Memory | None = None,
    speed: Speed | None = None,
) -> Program:
    """Facts from saved text (`compiled.as_text()`); `mesh_shape`: size of each mesh axis, in the mesh's order.

    `slice_of`: the slice of each device in the mesh's order, default one slice.
    """
    devices = 1
    for size in mesh_shape.values():
        devices *= size
    module = hlo.parse(text)
    layout = Layout(mesh_shape, tuple(slice_of or (0,) * devices), module.partitions)
    tally = walk(module, layout, chip and chip.device, speed)
    return Program(
        devices=devices,
        matmul_flops=dict(sorted(tally.flops.items())),
        kernels=tuple(Kernel(name, *values) for name, values in sorted(tally.kernels.items())),
        collectives=tuple(_row(*item) for item in sorted(tally.exchanges.items(), key=lambda item: -item[1]["wire"])),
        cycles=tally.cycles,
        seconds=tally.cycles / chip.clock if chip and chip.clock else None,
        hbm_bytes=tally.hbm,
        loops=tuple((body, trips, runs) for (body, trips), runs in tally.loops.items()),
        memory=memory,
    )


def _row(key, sums) -> Collective:
    kind, axes, network, group = key
    exposed = min(sums["exposed"], sums["wire"])
    return Collective(
        kind, axes, network, group, sums["count"], sums["payload"], sums["wire"], sums["wire"] - exposed, exposed,
        sums["between"],
    )  # fmt: skip
