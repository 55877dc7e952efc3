"""How long a step takes at least: compute, main memory and networks, each by itself, with what is assumed of them."""

import dataclasses
from collections.abc import Callable, Iterable

from jaxllm import tree
from jaxllm.plan.program import Program
from jaxllm.plan.target import Target
from jaxllm.plan.traffic import bandwidth
from jaxllm.plan.work import Work
from jaxllm.train.estimate.attention import kernel_flops
from jaxllm.train.estimate.held import Held, gathered_bytes, layer_bytes
from jaxllm.train.estimate.step import Step
from jaxllm.train.memory import device_bytes

#: Shares of the peak that are assumed, none of them measured here. Products: what the TPU compiler's own cycles come to
#: in the programs of docs/plans.md (0.72 to 0.80); used where there is no program. Attention kernels: the schedule does
#: not hold them. Memory and links: what large transfers reach of the data sheet.
ASSUMED = {"products": 0.75, "attention": 0.5, "memory": 0.8, "links": 0.8}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound of the time of a step, and where it comes from."""

    seconds: float
    how: str


def compute_bound(step: Step, work: Work, program: Program | None, target: Target) -> Bound:
    """By the scheduler's cycles where there is a program; its kernels, and all without one, at assumed efficiencies."""
    peak = target.chip.device.bf16
    if program is None or program.seconds is None:
        products = work.total - work.attention_total
        seconds = products / peak / ASSUMED["products"] + work.attention_total / peak / ASSUMED["attention"]
        how = f"products at {ASSUMED['products']:.0%} of the peak, attention at {ASSUMED['attention']:.0%} (assumed)"
        return Bound(seconds, how)
    kernels = kernels_flops(step, program)
    share = sum(program.matmul_flops.values()) / peak / program.seconds if program.seconds else 0.0
    seconds = program.seconds + sum(flops / peak / ASSUMED[kind] for kind, flops in kernels.items())
    said = [f"kernels of {kind} at {ASSUMED[kind]:.0%} (assumed)" for kind, flops in kernels.items() if flops]
    return Bound(seconds, "; ".join([f"the compiler's cycles, in which products reach {share:.0%} of the peak", *said]))


def kernels_flops(step: Step, program: Program) -> dict[str, float]:
    """FLOPs of the kernels of attention, by formula, and of products, as they declare; the schedule holds neither."""
    total = {"attention": 0.0, "products": 0.0}
    for kernel in program.kernels:
        one = kernel_flops(step, kernel.name)
        if one is not None:
            total["attention"] += one * kernel.count
        elif kernel.name in ("gmm", "tgmm"):
            # They declare all rows that there is room for, and skip those that did not come.
            total["products"] += (kernel.flops or 0.0) / step.sharding.mesh.shape["expert"]
        else:
            total["products"] += kernel.flops or 0.0
    return total


def memory_bound(step: Step, held: Held, program: Program | None, target: Target) -> Bound:
    """State read and written, weights of the layers and activations passed to and fro."""
    speed = target.chip.device.hbm_bandwidth * ASSUMED["memory"]
    how = f"at {ASSUMED['memory']:.0%} of the peak (assumed)"
    if program is not None:
        return Bound(program.hbm_bytes / speed, f"operands and results of all instructions, {how}")
    return Bound(hbm_bytes(step, held, target.platform) / speed, f"state, weights and activations, {how}")


def hbm_bytes(step: Step, held: Held, platform: str) -> float:
    """Traffic with main memory by formulas, roughly."""
    chosen, _ = tree.partition(step.state.params, tree.select(step.state.params, step.trainable))
    state = 2 * (held.parameters + held.optimizer + device_bytes(chosen))
    periods, microbatches = step.model.config.periods, step.config.train.accumulate
    weights = 4 * gathered_bytes(step, platform) * periods  # written once, read forward, again, and backward
    inside = 2 * layer_bytes(step, platform) * step.model.config.layers
    return state + microbatches * (weights + inside + 2 * held.activations)


def network_bounds(rows: Iterable, sizes: dict[str, int], target: Target) -> dict[str, Bound]:
    """`{network: bound}` of collectives (`program.Collective` or `traffic.Flow`), one after another on each network."""
    total: dict[str, float] = {}
    for row in rows:
        total[row.network] = total.get(row.network, 0.0) + seconds_of(row, sizes, target)
    names = {
        "ici": "links of GPUs and nodes" if target.chip.gpu else "links of the slice",
        "dcn": "network between slices",
    }
    how = f"at {ASSUMED['links']:.0%} of the peak (assumed)"
    return {network: Bound(seconds, f"{names[network]}, {how}") for network, seconds in sorted(total.items())}


def seconds_of(row, sizes: dict[str, int], target: Target) -> float:
    """Seconds of one collective at what is assumed of its links."""
    return row.wire_bytes / speed_of(target, sizes)(row)


def speed_of(target: Target, sizes: dict[str, int]) -> Callable:
    """`speed(row)`: bytes a second of an exchange or flow on a mesh of these sizes, at what is assumed of its links."""

    def speed(row) -> float:
        return ASSUMED["links"] * bandwidth(target, row.axes or tuple(sizes), sizes, row.group, row.network)

    return speed
