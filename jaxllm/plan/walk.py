"""Counts what a compiled program does: each computation once, times how often it runs, collectives against compute."""

import collections
import dataclasses
import typing
from collections.abc import Callable, Mapping

from jaxllm.chips import Chip
from jaxllm.plan import cost, hlo
from jaxllm.plan.collectives import Exchange, Layout, read, role

#: Bytes a second that a device sends in a collective.
Speed = Callable[[Exchange], float]


def walk(module: hlo.Module, layout: Layout, chip: Chip | None, speed: Speed | None = None) -> "Tally":
    """Sums over one run of the program on one device. `chip`: a device's share of one (`Chip.device`).

    speed: default all links of the chip.
    """
    return _Walk(module, layout, chip, speed).run(module.entry, {})


class Tally:
    """Sums over one run of a computation.

    `exchanges`: count, payload, wire, exposed, between of each (kind, axes, network, group); `seconds`: compute at its
    estimated cycles, and the wait for collectives.
    """

    def __init__(self):
        self.flops: collections.Counter = collections.Counter()
        self.kernels: dict[str, tuple[float, float | None, float | None]] = {}
        self.exchanges: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
        self.loops: collections.Counter = collections.Counter()
        self.cycles = self.hbm = self.seconds = 0.0

    def add(self, other: "Tally", times: float = 1) -> None:
        for mine, theirs in ((self.flops, other.flops), (self.loops, other.loops)):
            for key, value in theirs.items():
                mine[key] += times * value
        for name, (count, *sums) in other.kernels.items():
            self.kernel(name, times * count, *(None if s is None else times * s for s in sums))
        for key, sums in other.exchanges.items():
            for field, value in sums.items():
                self.exchanges[key][field] += times * value
        self.cycles += times * other.cycles
        self.hbm += times * other.hbm
        self.seconds += times * other.seconds

    def kernel(self, name: str, count: float, *sums: float | None) -> None:
        """`sums`: FLOPs and bytes; what one run does not declare is not known of all."""
        before = self.kernels.get(name, (0, 0, 0))
        added = (None if None in pair else sum(pair) for pair in zip(before[1:], sums, strict=True))
        self.kernels[name] = (before[0] + count, *added)

    def exchange(self, exchange: Exchange) -> collections.Counter:
        sums = self.exchanges[exchange.kind, exchange.axes, exchange.network, exchange.group]
        for field, value in (("count", 1), ("payload", exchange.payload), ("wire", exchange.wire)):
            sums[field] += value
        return sums


@dataclasses.dataclass
class _Flight:
    """A collective on its way: when it arrives, and the cycles that had been scheduled when it started."""

    exchange: Exchange
    sums: collections.Counter
    arrives: float
    takes: float
    cycles: float


class _Timeline:
    """The schedule of one computation, with each network as a queue.

    Compute takes its estimated cycles; a transfer starts when those before it on its network are through, and takes its
    bytes over the speed of its links. Where the program waits for it longer than compute lasts, bytes are exposed.
    `carriers`: keys of flights by (fusion, channel), for the fusion that starts one and those that compute beside it.
    """

    def __init__(self, chip: Chip | None, tally: Tally, speed: Speed | None):
        self.chip, self.tally = chip, tally
        self.speed = speed or (lambda exchange: chip.ici if exchange.network == "ici" else chip.dcn)
        self.free: dict[str, float] = collections.defaultdict(float)
        self.flights: dict[typing.Any, _Flight] = {}
        self.carriers: dict[tuple[str, str | None], typing.Any] = {}

    def compute(self, cycles: int) -> None:
        self.tally.cycles += cycles
        self.tally.seconds += cycles / self.chip.clock if self.chip and self.chip.clock else 0

    def start(self, key, exchange: Exchange) -> None:
        network = exchange.network
        takes = exchange.wire / self.speed(exchange) if self.chip else 0.0
        self.free[network] = max(self.tally.seconds, self.free[network]) + takes
        sums = self.tally.exchange(exchange)
        self.flights[key] = _Flight(exchange, sums, self.free[network], takes, self.tally.cycles)

    def end(self, key, synchronous: bool = False) -> None:
        if (flight := self.flights.pop(key, None)) is None:
            return
        wait = max(0.0, flight.arrives - self.tally.seconds)
        self.tally.seconds += wait
        if synchronous:
            flight.sums["exposed"] += flight.exchange.wire
            return
        flight.sums["between"] += self.tally.cycles - flight.cycles
        if flight.takes:
            flight.sums["exposed"] += flight.exchange.wire * min(1.0, wait / flight.takes)


class _Walk:
    def __init__(self, module: hlo.Module, layout: Layout, chip: Chip | None, speed: Speed | None):
        self.module, self.layout, self.chip, self.speed = module, layout, chip, speed
        self.fused: dict[str, tuple[Tally, list]] = {}

    def run(self, name: str, known: Mapping[int, int]) -> Tally:
        """One run of a computation. `known`: constants among the state that a loop carries (see hlo.trip_count)."""
        computation, tally = self.module.computations[name], Tally()
        line = _Timeline(self.chip, tally, self.speed)
        for instruction in computation.values():
            if instruction.op == "while":
                self._loop(computation, instruction, known, tally)
            elif instruction.op == "conditional":
                # The branch with the most work: a training step skips its update only when it must.
                tally.add(max((self.run(branch, {}) for branch in instruction.called()), key=_effort))
            elif instruction.op == "call":
                tally.add(self.run(instruction.called()[0], {}))
            else:
                self._one(instruction, computation, tally, line)
        return tally

    def _loop(self, computation, loop, known, tally: Tally) -> None:
        trips = hlo.trip_count(self.module, computation, loop, known)
        body = loop.attribute("body")
        tally.loops[body, trips] += 1
        tally.add(self.run(body, hlo.invariants(self.module, computation, loop, known)), 1 if trips is None else trips)

    def _one(self, instruction, computation, tally: Tally, line: _Timeline) -> None:
        _work(instruction, computation, tally)
        asynchronous, synchronous = self._collectives(instruction, computation, tally, line)
        for key in asynchronous:
            line.end(key)
        line.compute(instruction.cycles)
        tally.hbm += cost.traffic(self.module, instruction, computation)
        for key in synchronous:
            line.end(key, synchronous=True)

    def _collectives(self, instruction, computation, tally: Tally, line: _Timeline) -> tuple[list, list]:
        """Starts the collectives that start here; `(asynchronous, synchronous)`: keys of those that end here."""
        if instruction.op == "fusion":
            return self._fusion(instruction, computation, tally, line)
        if instruction.op == "recv-done":
            return [_rendezvous(computation[instruction.operands[0]])], []
        if instruction.op.endswith("-done"):
            return [_origin(instruction, computation)], []
        key, exchange = self._offloaded(instruction, computation, tally)
        exchange = exchange or read(instruction, computation, self.layout)
        if exchange is None:
            return [], []
        key = _rendezvous(instruction) if instruction.op == "send" else key
        line.start(key, exchange)
        asynchronous = instruction.op == "send" or instruction.op.endswith(("-start", "-update"))
        return [], [] if asynchronous else [key]

    def _offloaded(self, instruction, computation, tally: Tally) -> tuple[str, Exchange | None]:
        """`(key, exchange)` of a collective that runs elsewhere (a SparseCore), once it has its operand."""
        origin = _origin(instruction, computation)
        operands = [name for name in instruction.operands if name != origin]
        begins = operands and instruction.op.endswith(("-start", "-update"))
        for name in computation[origin].called() if begins else ():
            inside, exchanges = self._inside(name)
            tally.add(inside)
            if exchanges:
                return origin, exchanges[0][0]
        return origin, None

    def _fusion(self, fusion, computation, tally: Tally, line: _Timeline) -> tuple[list, list]:
        called = fusion.called()[0]
        inside, exchanges = self._inside(called)
        tally.add(inside)
        if not exchanges:
            return [], []
        asynchronous = role(self.module.computations[called])
        made_by = _sources(fusion, computation)
        ends, new = [], []
        for n, (exchange, channel) in enumerate(exchanges):
            carried = [line.carriers[source, channel] for source in made_by if (source, channel) in line.carriers]
            key = carried[0] if carried else (fusion.name, n)
            line.carriers[fusion.name, channel] = key
            if not carried:
                line.start(key, exchange)
                new.append(key)
            elif asynchronous == "done":
                ends.append(key)
        return ends, [] if asynchronous else new

    def _inside(self, name: str) -> tuple[Tally, list[tuple[Exchange, str | None]]]:
        """Work of a fused computation, and `(exchange, channel)` of the collectives in it."""
        if name not in self.fused:
            tally, exchanges = Tally(), []
            computation = self.module.computations[name]
            for instruction in computation.values():
                _work(instruction, computation, tally)
                if exchange := read(instruction, computation, self.layout, "all-reduce-scatter" in name):
                    exchanges.append((exchange, instruction.attribute("channel_id")))
                if instruction.op == "fusion":
                    inner, more = self._inside(instruction.called()[0])
                    tally.add(inner)
                    exchanges += more
            self.fused[name] = tally, exchanges
        return self.fused[name]


def _work(instruction: hlo.Instruction, computation: hlo.Computation, tally: Tally) -> None:
    """Counts a matrix product or a kernel."""
    if found := cost.matmul(instruction, computation):
        tally.flops[found[0]] += found[1]
    if instruction.op == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
        declared = cost.declared(instruction)
        name = instruction.name.rstrip("0123456789.")
        tally.kernel(name, 1, declared.get("flops"), declared.get("bytes_accessed"))


def _effort(tally: Tally) -> tuple[float, float, float]:
    return tally.cycles, sum(tally.flops.values()), tally.hbm


def _sources(instruction: hlo.Instruction, computation: hlo.Computation) -> list[str]:
    """What made the tuples whose elements are its operands."""
    operands = (computation[name] for name in instruction.operands if name in computation)
    return list(dict.fromkeys(o.operands[0] for o in operands if o.op == "get-tuple-element"))


def _origin(instruction: hlo.Instruction, computation: hlo.Computation) -> str:
    """The start that an update or a done belongs to."""
    while instruction.op.endswith(("-done", "-update")) and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction.name


def _rendezvous(instruction: hlo.Instruction) -> str:
    """What a send and the recv that answers it have in common."""
    found = instruction.attributes.partition('_xla_host_transfer_rendezvous="')[2]
    return "rendezvous " + (found.partition('"')[0] or instruction.name)
