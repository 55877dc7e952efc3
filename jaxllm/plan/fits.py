"""What to do where a plan does not fit: what takes the room, and the smallest slice that would do."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm import config as settings_of
from jaxllm.errors import ResourceError, UserError
from jaxllm.plan.compiled import memory_of
from jaxllm.plan.target import Target
from jaxllm.plan.topology import Topology, slices_of
from jaxllm.sharding import MESH_AXES
from jaxllm.train.config import RunConfig
from jaxllm.train.estimate.advice import Place, Saving, aimed, listed, ways_to_fit
from jaxllm.train.estimate.held import Held, held_by
from jaxllm.train.estimate.step import Step, describe
from jaxllm.train.memory import size

SHORTER_ROWS = "lower train.seq_len, or split rows with parallel.context"


def advice(config: RunConfig, found: dict[str, Any], target: Target) -> str:
    """What to do where a plan does not fit: both sizes, what takes the room, what is larger, and settings that help."""
    return "\n".join([_place(config, found, target), *_named(found["ways"])])


def ways(step: Step, held: Held, memory: dict[str, Any], target: Target) -> list[list[dict[str, Any]]]:
    """What would make a plan fit on its devices: overrides, each by itself or several together, and what they save."""
    place = Place(target.devices, target.platform, memory["capacity"], target.slices, grows=False)
    found = ways_to_fit(step.config, aimed(place, held, max(memory["total"], held.total)))
    return [[{"overrides": list(x.overrides), "saves": x.saves, "total": x.total} for x in way] for way in found]


def _named(found: list[list[dict[str, Any]]]) -> list[str]:
    return listed([tuple(Saving(**one | {"overrides": tuple(one["overrides"])}) for one in way) for way in found])


def _place(config: RunConfig, found: dict[str, Any], target: Target) -> str:
    """What does not fit where, and the smallest slice that would do."""
    memory = found["memory"]
    kinds = sorted(memory["kinds"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size(value)}" for name, value in kinds if value > 0.05 * memory["total"])
    text = (
        f"{target.name}: a device needs {size(memory['total'])} by {memory['source']} and has "
        f"{size(memory['capacity'])} ({listed})"
    )
    if target.topology is None:
        return f"{text}; devices of this CPU share its memory"
    smallest = smallest_slice(config, target)
    if smallest is None:
        state = kinds[0][0] in ("parameters", "gradients", "optimizer")
        return f"{text}; no slice of this chip would do; {_less_state(config) if state else SHORTER_ROWS}"
    where, change = smallest
    return f"{text}; the smallest slice that would do, by formulas: {where}{change}"


def _less_state(config: RunConfig) -> str:
    """What takes less room than weights that all train, of what the run does not do already."""
    adapters = "train adapters of a trained model (lora.rank=16, train.init=FOLDER)"
    ways = [adapters] * (not config.lora) + ["set optim.name=adafactor"] * (config.optim.name != "adafactor")
    return ", or ".join(["choose chips with more memory", *ways])


def smallest_slice(
    config: RunConfig, target: Target, changes: Sequence[Sequence[Callable]] | None = None, fits: Callable | None = None
) -> tuple[str, str] | None:
    """`(topology, what else to set)`: the fewest chips of this kind whose memory would do, by formulas.

    `changes`: functions of settings and target that give other settings, in groups of which the first that works
    counts; default those of training. `fits`: whether settings fit a target; default whether a training step does.
    """
    if target.topology is None:
        return None
    sizes = sorted(_sizes_of(target.topology), key=lambda t: t.chips)
    for group in changes or CHANGES:
        for topology, change in itertools.product(sizes, group):
            devices = topology.devices * target.slices
            there = dataclasses.replace(target, name=topology.name, devices=devices, topology=topology)
            changed = change(config, there)
            if (fits or _would_fit)(changed, there):
                said = ", ".join(changed_settings(config, changed))
                where = there.name + f" with --slices {target.slices}" * (target.slices > 1)
                return where, f", with {said}" if said else ""
    return None


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """What to write behind the settings file to get from the one to the other."""
    named = [f"parallel.{axis}" for axis in MESH_AXES] + ["model.remat", "train.accumulate", "train.batch"]
    old, new = settings_of.to_dict(before), settings_of.to_dict(after)
    pairs = [(name, *(raw[section][key] for raw in (old, new))) for name in named for section, key in [name.split(".")]]
    return [f"{name}={value}" for name, was, value in pairs if was != value]


def _as_it_is(config: RunConfig, target: Target) -> RunConfig:
    return config


def _wider(config: RunConfig, target: Target) -> RunConfig:
    """Weights split over what a larger slice has more, the other axes as they are."""
    data = config.parallel.data if config.parallel.data > 0 else target.slices
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=data, fsdp=-1))


def _at_once(config: RunConfig, target: Target) -> RunConfig:
    """Also all rows at once: microbatches have too few of them for many devices."""
    config = _wider(config, target)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=1))


def _remat(config: RunConfig, target: Target) -> RunConfig:
    """What saves memory at the cost of speed, in the first of these that works."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))


def _wider_remat(config: RunConfig, target: Target) -> RunConfig:
    return _remat(_wider(config, target), target)


def _at_once_remat(config: RunConfig, target: Target) -> RunConfig:
    return _remat(_at_once(config, target), target)


def _shared(config: RunConfig, target: Target) -> RunConfig:
    """Also every weight split over all devices of a slice, and nothing else."""
    parallel = dataclasses.replace(config.parallel, data=target.slices, fsdp=-1, expert=1, context=1, tensor=1)
    return dataclasses.replace(_remat(config, target), parallel=parallel)


def _more_rows(config: RunConfig, target: Target) -> RunConfig:
    """Also a row for each device, where the run has fewer. Stages that have rows of their own keep them."""
    rows = -(-config.train.batch // target.devices) * target.devices
    train = dataclasses.replace(config.train, batch=rows, accumulate=1)
    return dataclasses.replace(_shared(config, target), train=train)


#: What is tried: first what costs nothing, then what costs time, then other meshes, then other rows.
CHANGES = ((_as_it_is, _wider, _at_once), (_remat, _wider_remat, _at_once_remat), (_shared,), (_more_rows,))


def _sizes_of(topology: Topology) -> list[Topology]:
    if topology.chip.gpu:
        return [Topology(topology.chip, (n, 1)) for n in (1, 2, 4)] + [
            Topology(topology.chip, (8, 2**n)) for n in range(8)
        ]
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
