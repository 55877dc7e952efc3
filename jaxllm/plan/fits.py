"""What to do where a plan does not fit: what takes the room, and the smallest slice that would do."""

import dataclasses
from typing import Any

from jaxllm.errors import ResourceError, UserError
from jaxllm.plan.compiled import memory_of
from jaxllm.plan.estimate import held_by
from jaxllm.plan.step import describe
from jaxllm.plan.target import Target
from jaxllm.plan.topology import Topology, slices_of
from jaxllm.train.config import RunConfig
from jaxllm.train.memory import size


def advice(config: RunConfig, found: dict[str, Any], target: Target) -> str:
    """What to do where a plan does not fit: both sizes, what takes the room, and the smallest slice that would do."""
    memory = found["memory"]
    kinds = sorted(memory["kinds"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size(value)}" for name, value in kinds if value > 0.05 * memory["total"])
    text = (
        f"{target.name}: a device needs {size(memory['total'])} by {memory['source']} and has "
        f"{size(memory['capacity'])} ({listed})"
    )
    smallest = smallest_slice(config, target)
    if smallest is None:
        return f"{text}; no slice of this chip would do; lower train.seq_len, or split rows with parallel.context"
    where, change = smallest
    return f"{text}; the smallest slice that would do, by formulas: {where}{change}"


def smallest_slice(config: RunConfig, target: Target) -> tuple[str, str] | None:
    """`(topology, what else to set)`: the fewest chips of this kind whose memory would do, by formulas."""
    if target.topology is None:
        return None
    for change in (_as_it_is, _remat, _shared, _more_rows):
        for topology in sorted(_sizes_of(target.topology), key=lambda t: t.chips):
            there = dataclasses.replace(
                target, name=topology.name, devices=topology.devices * target.slices, topology=topology
            )
            changed, said = change(config, there)
            if _would_fit(changed, there):
                return there.name + f" with --slices {target.slices}" * (target.slices > 1), said
    return None


def _as_it_is(config: RunConfig, target: Target) -> tuple[RunConfig, str]:
    return config, ""


def _remat(config: RunConfig, target: Target) -> tuple[RunConfig, str]:
    """What saves memory at the cost of speed."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full")), ", with model.remat=full"


def _shared(config: RunConfig, target: Target) -> tuple[RunConfig, str]:
    """Also every weight split over all devices of a slice."""
    parallel = dataclasses.replace(config.parallel, data=target.slices, fsdp=-1, expert=1, context=1, tensor=1)
    mesh = f"parallel.data={target.slices}, parallel.fsdp=-1"
    return dataclasses.replace(_remat(config, target)[0], parallel=parallel), f", with model.remat=full, {mesh}"


def _more_rows(config: RunConfig, target: Target) -> tuple[RunConfig, str]:
    """Also a row for each device, where the run has fewer."""
    config, said = _shared(config, target)
    train = dataclasses.replace(config.train, batch=target.devices, accumulate=1, stages=(), steps=1)
    return dataclasses.replace(config, train=train), f"{said}, train.batch={target.devices}"


def _sizes_of(topology: Topology) -> list[Topology]:
    if topology.chip.gpu:
        return [Topology(topology.chip, (8, 2**n)) for n in range(8)]
    return [Topology(topology.chip, shape) for shape in slices_of(topology.chip)]


def _would_fit(config: RunConfig, target: Target) -> bool:
    try:
        step = describe(config, target.devices, target.slices)
    except UserError:
        return False
    return held_by(step, target.platform).total <= memory_of(target)


def check_fits(found: dict[str, Any]) -> None:
    """Raises ResourceError for a plan that does not fit."""
    if "advice" in found:
        raise ResourceError(found["advice"])
