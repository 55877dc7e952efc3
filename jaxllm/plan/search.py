"""Looks for the best plan: meshes, rematerialisation, microbatches and dtypes, by formulas first, then compiled.

Formulas rank hundreds of candidates in seconds; the best few are compiled, and ranked anew by what the compiler says.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxllm.errors import ResourceError, SettingsError
from jaxllm.plan.bounds import compute_bound, memory_bound, network_bounds
from jaxllm.plan.compiled import memory_of, share_of
from jaxllm.plan.fits import smallest_slice
from jaxllm.plan.plan import plan, speed_of
from jaxllm.plan.target import Target
from jaxllm.plan.traffic import flows_of
from jaxllm.plan.work import work_of
from jaxllm.sharding import MESH_AXES, ParallelConfig
from jaxllm.train.config import RunConfig
from jaxllm.train.estimate.held import KINDS, Held, held_by
from jaxllm.train.estimate.step import Step, describe, longest, varied
from jaxllm.train.memory import size

#: What layers keep for the backward pass, from the least to the most.
REMATS = ("full", "qkv", ("q", "k", "v", "attention", "attention_out"), "minimal", "none")
DTYPES = ("bfloat16", "float32")
#: Devices that share a layer by tensor parallelism: within one host of TPUs, or one node of GPUs.
TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8, 16)
#: What is tried in other sizes, unless it is named.
VARIED = {f"parallel.{axis}" for axis in MESH_AXES} | {"model.remat", "model.dtype", "train.accumulate"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting of mesh, rematerialisation, microbatches and dtype, and what formulas say of it."""

    config: RunConfig
    step: Step | None
    held: Held | None = None
    seconds: float = math.inf
    bound: str = ""
    network: float = 0.0
    """Seconds that its traffic takes."""
    speed: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: str | None = None
    """Why it is none: settings that cannot be, or too much memory."""

    @property
    def overrides(self) -> list[str]:
        """What to write behind the settings file for it."""
        parallel, remat = self.config.parallel, self.config.model.remat
        axes = ("data", "fsdp", "expert", "context", "tensor")
        mesh = [f"parallel.{axis}={getattr(parallel, axis)}" for axis in axes if getattr(parallel, axis) != 1]
        kept = remat if isinstance(remat, str) else "[" + ",".join(remat) + "]"
        micro = [f"train.accumulate={self.config.train.accumulate}"] if self.config.train.accumulate > 1 else []
        return [*(mesh or ["parallel.fsdp=1"]), f"model.remat={kept}", f"model.dtype={self.config.model.dtype}", *micro]


def search(
    config: RunConfig,
    target: Target,
    *,
    compiles: int = 2,
    tokens: float | None = None,
    prices=None,
    overrides: Sequence[str] = (),
    assumed: Sequence[str] = (),
    say: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Ranked plans as plain values: `ranked`, fastest first, and `refused` with the reason of each.

    Args:
      compiles: how many of the best are compiled, and ranked by that.
      overrides: `section.key=value` of settings that stay as they are.
      assumed: settings that nobody gave, to be shown.

    Raises ResourceError where nothing fits, by formulas or by the compiler.
    """
    if target.chip is None:
        raise SettingsError(
            f"--search ranks by time, and no speed of {target.name} is known; name a TPU or GPU topology"
        )
    fixed = named(overrides)
    found = sorted(candidates(config, target, fixed), key=_order)
    if not found:
        asked = ", ".join(text for text in overrides if text.startswith("parallel"))
        raise SettingsError(
            f"--search: no mesh of {target.name}'s {target.devices} devices has {asked}; leave some out"
        )
    fit = [one for one in found if one.refused is None]
    say(f"{len(found):,} candidates by formulas: {len(fit):,} fit")
    if not fit:
        raise ResourceError(_nothing(config, target, found))
    ranked = _ranked(fit, target, compiles, say, tokens=tokens, prices=prices)
    return {
        "topology": {"name": target.name, "chips": target.chips, "slices": target.slices},
        "assumed": [text for text in assumed if text.partition("=")[0] not in ("model.dtype", "model.remat")],
        "fixed": sorted(fixed & VARIED),
        "capacity_how": share_of(target),
        "candidates": len(found),
        "ranked": [row for row in ranked if row["refused"] is None],
        "refused": [row for row in ranked if row["refused"]] + [_row(one) for one in found if one.refused],
    }


def _ranked(fit: Sequence[Candidate], target: Target, compiles: int, say, **options) -> list[dict[str, Any]]:
    """Rows of those that fit by formulas, the best of them compiled. Raises ResourceError where all are refused."""
    ranked = []
    for one in fit[: compiles if target.compiles else 0]:
        say(f"compiling {' '.join(one.overrides)}")
        made = plan(one.config, target, **options)
        ranked.append(_row(one) | {"compiled": made} | _of_plan(made))
    ranked += [_row(one) | {"compiled": None} for one in fit[len(ranked) :]]
    if all(row["refused"] for row in ranked):
        reasons = "; ".join(f"{' '.join(row['overrides'])}: {row['refused']}" for row in ranked)
        raise ResourceError(f"{target.name}: the compiler refuses all that fit by formulas: {reasons}")
    # What was compiled and does not fit goes last; of the others a compiled time counts for more than an estimate.
    return sorted(ranked, key=lambda row: (row["refused"] is not None, row["compiled"] is None, row["seconds"]))


def _order(one: Candidate):
    """Those that fit, the fastest first; of equals the one that sends less, then the one that holds less."""
    held = one.held.total if one.held else 0.0
    return one.refused is not None, float(f"{one.seconds:.3g}"), one.network, held


def _of_plan(made: dict[str, Any]) -> dict[str, Any]:
    """What a compiled plan says in the place of the estimate."""
    memory = made["memory"]
    out = {"memory": memory["total"], "refused": None if memory["fits"] else made["advice"]}
    if memory["fits"]:
        step, speed = made["step"], made["speed"]
        out |= {"seconds": step["seconds"], "bound": step["bound"]} | speed
    return out


def _row(one: Candidate) -> dict[str, Any]:
    out = {
        "overrides": one.overrides,
        "refused": one.refused,
        "seconds": None,
        "memory": None,
        "mfu": None,
        "bound": None,
    }
    out |= {"tokens_per_second": None, "tokens_per_second_per_chip": None}
    if one.held is not None:
        out |= {"memory": one.held.total, "kinds": {kind: getattr(one.held, kind) for kind in KINDS}}
    if one.refused is None:
        out |= {"seconds": one.seconds, "bound": one.bound} | one.speed
    return out


def named(overrides: Sequence[str]) -> frozenset[str]:
    """The settings that `section.key=value` or `section={key: value}` give."""
    found = set()
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        inside = re.findall(r"([\w.]+)\s*:", value) if key in ("parallel", "model", "train") else []
        found |= {f"{key}.{name}" for name in inside} or {key}
    return frozenset(found)


def candidates(config: RunConfig, target: Target, fixed: frozenset[str] = frozenset()) -> Iterator[Candidate]:
    """All of them, with what formulas say. `fixed`: names of settings that are not varied."""
    stage, model, train = longest(config), config.model, config.train
    micro = train.accumulate if "train.accumulate" in fixed else 1
    remats = [model.remat] if "model.remat" in fixed else _remats(config)
    dtypes = [model.dtype] if "model.dtype" in fixed else _dtypes(config)
    for parallel in meshes(config, target, fixed):
        try:
            step = describe(_with(config, parallel, model.remat, micro, model.dtype), target.devices, target.slices)
        except SettingsError as error:
            yield Candidate(dataclasses.replace(config, parallel=parallel), None, refused=str(error))
            continue
        rows = stage.batch // step.sharding.batch_size
        micros = [micro] if "train.accumulate" in fixed else _divisors(rows)
        for remat, accumulate, dtype in itertools.product(remats, micros, dtypes):
            try:
                yield judged(varied(step, _with(config, parallel, remat, accumulate, dtype)), target)
            except SettingsError as error:  # a kernel that lacks the dtype
                refused = _with(config, parallel, remat, accumulate, dtype)
                yield Candidate(refused, None, refused=str(error))


def meshes(config: RunConfig, target: Target, fixed: frozenset[str] = frozenset()) -> Iterator[ParallelConfig]:
    """Meshes of all devices: slices are replicas, experts and rows are split where there are any to split.

    An axis that is `fixed` at another size than -1 keeps it.
    """
    inner = target.per_slice
    experts = max((spec.moe.experts for spec in config.model.layer_specs if spec.moe), default=1)
    stage, kept = longest(config), {}
    for axis in MESH_AXES:
        if f"parallel.{axis}" in fixed and (asked := getattr(config.parallel, axis)) != -1:
            kept[axis] = asked
    choices = {"tensor": TENSOR, "context": CONTEXT, "expert": _divisors(experts)}
    choices |= {axis: (kept[axis],) for axis in choices if axis in kept}
    for tensor, context, expert in itertools.product(*choices.values()):
        shared = tensor * context * expert
        # Splitting a row pays where a device would otherwise have less than a row.
        wasted = context > 1 and stage.batch >= target.devices // (tensor * expert)
        if inner % shared or (wasted and "context" not in kept):
            continue
        for fsdp in _divisors(inner // shared):
            sizes = {"data": target.devices // (shared * fsdp), "fsdp": fsdp, "tensor": tensor}
            sizes |= {"context": context, "expert": expert}
            if kept.items() <= sizes.items():
                yield dataclasses.replace(config.parallel, **sizes)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _remats(config: RunConfig) -> list:
    return list(dict.fromkeys((*REMATS, config.model.remat)))


def _dtypes(config: RunConfig) -> list[str]:
    return list(dict.fromkeys((*DTYPES, config.model.dtype)))


def _with(config: RunConfig, parallel: ParallelConfig, remat, accumulate: int, dtype: str) -> RunConfig:
    model = dataclasses.replace(config.model, remat=remat, dtype=dtype)
    train = dataclasses.replace(config.train, accumulate=accumulate)
    return dataclasses.replace(config, model=model, train=train, parallel=parallel)


def judged(step: Step, target: Target) -> Candidate:
    """A candidate with its memory and, where that fits, its time."""
    held, capacity = held_by(step, target.platform), memory_of(target)
    if held.total > capacity:
        largest = sorted(KINDS, key=lambda kind: -getattr(held, kind))[:2]
        listed = ", ".join(f"{kind} {size(getattr(held, kind))}" for kind in largest)
        why = f"needs {size(held.total)} of {size(capacity)} ({listed})"
        return Candidate(step.config, step, held, refused=why)
    work, sizes = work_of(step, target.platform), dict(step.sharding.mesh.shape)
    bounds = {
        "compute": compute_bound(step, work, None, target),
        "memory": memory_bound(step, held, None, target),
        **network_bounds(flows_of(step, target.platform, target.slices), sizes, target),
    }
    longest_ = max(bounds, key=lambda name: bounds[name].seconds)
    seconds = bounds[longest_].seconds
    network = sum(bounds[name].seconds for name in bounds if name in ("ici", "dcn"))
    return Candidate(step.config, step, held, seconds, longest_, network, speed_of(step, work, seconds, target))


def _nothing(config: RunConfig, target: Target, found: list[Candidate]) -> str:
    """What is said where no candidate fits."""
    tried = [one for one in found if one.held is not None]
    if not tried:
        return f"{target.name}: no mesh of {target.devices} devices is possible: {found[0].refused}"
    least = min(tried, key=lambda one: one.held.total)
    first = " ".join(least.overrides)
    text = (
        f"{target.name}: none of {len(found):,} candidates fits; the one that needs the least, {first}, {least.refused}"
    )
    smallest = smallest_slice(least.config, target)
    if smallest is None:
        return f"{text}; lower train.batch or train.seq_len, or name a larger topology"
    return f"{text}; the smallest slice that would do, by formulas: {smallest[0]}{smallest[1]}"


def show(found: dict[str, Any], most: int = 10) -> str:
    """The dict of `search` as a table, and why the others do not fit."""
    where = found["topology"]
    lines = [f"{where['name']}: {where['chips']:,} chips; {len(found['ranked']):,} of {found['candidates']:,} fit"]
    if found["capacity_how"]:
        lines.append(found["capacity_how"])
    if found["assumed"]:
        lines.append(f"a model by itself; assumed: {', '.join(found['assumed'])}")
    if found["fixed"]:
        lines.append(f"kept as they were named: {', '.join(found['fixed'])}")
    lines.append("")
    lines.append(f"{'s a step':>10} {'tokens/s/chip':>14} {'MFU':>6} {'memory':>10}  by        settings")
    for row in found["ranked"][:most]:
        source = "compiled" if row["compiled"] else "formulas"
        lines.append(
            f"{row['seconds']:>10.3f} {row['tokens_per_second_per_chip']:>14,.0f} {row['mfu']:>6.1%} "
            f"{size(row['memory']):>10}  {source}  {' '.join(row['overrides'])}"
        )
    if len({bool(row["compiled"]) for row in found["ranked"][:most]}) > 1:
        lines.append("formulas do not see what waits or is copied: compare compiled plans with each other")
    if len(found["ranked"]) > most:
        lines.append(f"and {len(found['ranked']) - most:,} more (--json has all)")
    if refused := found["refused"]:
        lines += ["", "the others do not fit, such as"]
        for row in _examples(refused):
            lines.append(f"  {' '.join(row['overrides'])}: {row['refused']}")
    return "\n".join(lines)


def _examples(refused: list[dict[str, Any]], most: int = 5) -> list[dict[str, Any]]:
    """Those nearest to fitting, and one of each other reason."""
    near = sorted((row for row in refused if row["memory"]), key=lambda row: row["memory"])[:most]
    others = {row["refused"].partition(":")[0]: row for row in refused if not row["memory"]}
    return near + list(others.values())[:most]
