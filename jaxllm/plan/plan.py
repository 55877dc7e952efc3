"""One plan: what a training run needs and how long it takes on devices that need not be there.

Where there is a compiler for the devices, the real training step is compiled for them and looked at; formulas say how
its memory divides, and all of it for GPUs.
"""

import dataclasses
from typing import Any

import jax

from jaxllm import tree
from jaxllm.model.build import active_parameters
from jaxllm.plan.bounds import ASSUMED, Bound, compute_bound, kernels_flops, memory_bound, network_bounds, seconds_of
from jaxllm.plan.compiled import Compiled, compile_for, memory_of, needed, share_of
from jaxllm.plan.fits import advice, ways
from jaxllm.plan.prices import Prices
from jaxllm.plan.program import Program
from jaxllm.plan.target import Target
from jaxllm.plan.traffic import Flow, flows_of
from jaxllm.plan.work import Work, work_of
from jaxllm.train.config import RunConfig
from jaxllm.train.estimate.held import Held, divided, held_by, logits_bytes, most_of
from jaxllm.train.estimate.step import Step, changes_of, describe, make_step

#: A program is not compiled where the estimate is beyond the memory of a device by this factor: it would not fit.
HOPELESS = 1.4


def plan(
    config: RunConfig,
    target: Target,
    *,
    tokens: float | None = None,
    prices: tuple[Prices, str] | None = None,
    compiles: bool = True,
    assumed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The plan of a run as plain values; docs/plans.md explains each.

    Args:
      tokens: what to train on in all; None takes the steps of the settings.
      prices: what `read_prices` gives.
      compiles: False goes by formulas alone, as for GPUs.
      assumed: settings that nobody gave, to be shown.

    Raises SettingsError for settings that no run could have, UserError where libtpu lacks or refuses the topology.
    """
    step = describe(config, target.devices, target.slices)
    work, held = work_of(step, target.platform), held_by(step, target.platform)
    capacity = memory_of(target)
    hopeless = capacity is not None and held.total > HOPELESS * capacity
    compiled = None
    if compiles and target.compiles and not hopeless:
        compiled = compile_step(config, target)
    program = compiled and compiled.program
    found = {
        "topology": {"name": target.name, "chips": target.chips, "devices": target.devices, "slices": target.slices},
        "mesh": {axis: n for axis, n in step.sharding.mesh.shape.items() if n > 1} or {"data": 1},
        "run": _run(step, assumed),
        "parameters": _parameters(step),
        "memory": _memory(step, held, compiled, capacity, target),
        "flops": _flops(step, work, program),
        "network": _network(step, program, target),
        "compiled": compiled and compiled.to_dict(),
    }
    found |= _times(step, held, work, program, target)
    found["training"] = _training(step, found, target, tokens, prices)
    found["formulas"] = formulas(step, found, target)
    if not found["memory"]["fits"]:
        found["ways"] = ways(step, held, found["memory"], target)
        found["advice"] = advice(config, found, target)
    return found


def compile_step(config: RunConfig, target: Target) -> Compiled:
    """The compiled training step. Raises UserError as making it does."""
    step = make_step(config, target.jax_devices())
    return compile_for(step.lower, step.sharding.mesh, target)


def _run(step: Step, assumed) -> dict[str, Any]:
    config, stage, changes = step.config, step.stage, changes_of(step.config)
    names = {"dpo": config.dpo, "distill": config.distill}
    return {
        "stage": stage.name,
        "rows": stage.batch,
        "seq_len": stage.seq_len,
        "tokens": stage.batch * stage.seq_len,
        "accumulate": config.train.accumulate,
        "dtype": step.model.config.dtype,
        "remat": step.model.config.remat,
        "optimizer": config.optim.name,
        "method": next((name for name, value in names.items() if value is not None), "text"),
        "changes": [str(change) for change in changes],
        "assumed": list(assumed),
    }


def _parameters(step: Step) -> dict[str, int]:
    total, active = counted(step)
    chosen, _ = tree.partition(step.model.abstract, tree.select(step.model.abstract, step.trainable))
    return {"total": total, "active": active, "trained": tree.count(chosen)}


def counted(step: Step) -> tuple[int, int]:
    """`(total, active)` parameters of the model without adapters, codes counted as the weights that they stand for."""
    plain = {path: jax.ShapeDtypeStruct(shape, "float32") for path, (_, shape) in step.model.weights.items()}
    return active_parameters(step.model.config, plain)


def _memory(step: Step, held: Held, compiled: Compiled | None, capacity, target: Target) -> dict[str, Any]:
    program = compiled and compiled.program
    memory = program and program.memory
    kinds = divided(held, needed(memory, target.platform)) if memory else held.kinds
    total = sum(kinds.values())
    if compiled and compiled.needs:
        total = compiled.needs
    return {
        "kinds": kinds,
        "most": most_of(held, kinds),
        "total": total,
        "capacity": capacity,
        "capacity_how": share_of(target),
        "fits": capacity is None or not (compiled and program is None or total > capacity),
        "source": "the compiled program" if memory else "the compiler's refusal" if compiled else "formulas",
        "moment": held.moment,
        "logits_of_a_chunk": logits_bytes(step, target.platform),
        "estimate": {"total": held.total, "kinds": held.kinds, "error": held.total / total - 1 if memory else None},
        "compiled": memory and dataclasses.asdict(memory) | {"total": memory.total},
    }


def _flops(step: Step, work: Work, program: Program | None) -> dict[str, Any]:
    analytic = dataclasses.asdict(work) | {"total": work.total}
    counted = None if program is None else sum((*program.matmul_flops.values(), *kernels_flops(step, program).values()))
    return {
        "model": work.model,
        "executed": work.total if counted is None else counted,
        "source": "formulas" if counted is None else "the compiled program",
        "analytic": analytic,
        "error": None if counted is None else work.total / counted - 1,
        "by_dtype": program and program.matmul_flops,
    }


def rows_of(step: Step, program: Program | None, target: Target) -> list:
    """Collectives of the program, or what formulas say of them."""
    return list(program.collectives) if program else flows_of(step, target.platform, target.slices)


def _network(step: Step, program: Program | None, target: Target) -> list[dict[str, Any]]:
    found, sizes = [], dict(step.sharding.mesh.shape)
    for row in rows_of(step, program, target):
        one = {"kind": row.kind, "axes": list(row.axes), "network": row.network, "group": row.group}
        one |= {"wire_bytes": row.wire_bytes}
        counted = not isinstance(row, Flow)
        one |= {"overlapped_bytes": row.overlapped_bytes if counted else None}
        one |= {"exposed_bytes": row.exposed_bytes if counted else None, "count": row.count if counted else None}
        found.append(one | {"seconds": seconds_of(row, sizes, target) if target.chip else None})
    return found


def _times(step: Step, held: Held, work: Work, program: Program | None, target: Target) -> dict[str, Any]:
    """Bounds, step time and speed; None where no speed of the devices is known."""
    if target.chip is None:
        return {"bounds": None, "step": None, "speed": None, "assumptions": []}
    rows, sizes = rows_of(step, program, target), dict(step.sharding.mesh.shape)
    bounds = {
        "compute": compute_bound(step, work, program, target),
        "memory": memory_bound(step, held, program, target),
        **network_bounds(rows, sizes, target),
    }
    longest = max(bounds, key=lambda name: bounds[name].seconds)
    seconds = bounds[longest].seconds
    waits = sum(seconds_of(row, sizes, target) * exposed_share(row) for row in rows)
    return {
        "bounds": {name: dataclasses.asdict(bound) for name, bound in bounds.items()},
        "step": {
            "seconds": seconds,
            "bound": longest,
            "with_waits": max(seconds, bounds["compute"].seconds + waits) if program else None,
        },
        "speed": speed_of(step, work, seconds, target),
        "assumptions": [
            f"{name} reach {share:.0%} of the peak" for name, share in ASSUMED.items() if _used(name, bounds)
        ],
    }


def _used(name: str, bounds: dict[str, Bound]) -> bool:
    if name == "products":
        return "assumed" in bounds["compute"].how and "cycles" not in bounds["compute"].how
    return name != "attention" or "kernels" in bounds["compute"].how or "attention" in bounds["compute"].how


def exposed_share(row) -> float:
    """The share of a collective's bytes that travel while nothing is computed; of a formula nothing is known."""
    exposed = getattr(row, "exposed_bytes", 0.0)
    return exposed / row.wire_bytes if row.wire_bytes else 0.0


def speed_of(step: Step, work: Work, seconds: float, target: Target) -> dict[str, float]:
    """MFU and tokens a second, for a step that takes so long."""
    tokens = step.stage.batch * step.stage.seq_len / seconds
    mfu = work.model / seconds / target.chip.device.bf16
    return {"mfu": mfu, "tokens_per_second": tokens, "tokens_per_second_per_chip": tokens / target.chips}


def _training(step: Step, found, target: Target, tokens: float | None, prices) -> dict[str, Any]:
    """The whole run. Stages are summed: their tokens exactly, their time as if a token took as long in all of them."""
    per_step, stages = found["run"]["tokens"], step.config.train.resolved_stages
    planned = sum(stage.steps * stage.batch * stage.seq_len for stage in stages)
    steps = -(-tokens // per_step) if tokens else step.config.train.total_steps
    total = tokens or planned
    out = {"tokens": total, "steps": int(steps), "how": _how(step, tokens)}
    out |= {"days": None, "chip_hours": None, "money": None}
    if found["step"] is None:
        return out
    seconds = (steps if tokens else planned / per_step) * found["step"]["seconds"]
    out |= {"days": seconds / 86400, "chip_hours": seconds / 3600 * target.chips}
    if prices is not None:
        out["money"] = _money(out["chip_hours"], target, *prices)
    return out


def _how(step: Step, tokens: float | None) -> str | None:
    """What was assumed of the other stages of a run; None where there are none."""
    stages = step.config.train.resolved_stages
    if len({(stage.batch, stage.seq_len) for stage in stages}) == 1:
        return None
    if tokens:
        return f"all steps as in stage {step.stage.name}"
    return f"tokens summed over {len(stages)} stages, each as fast a token as stage {step.stage.name}"


def _money(chip_hours: float, target: Target, prices: Prices, file: str) -> dict[str, Any]:
    price = prices.chip_hour.get(target.chip.name)
    return {
        "file": file,
        "chip_hour": price,
        "currency": prices.currency,
        "date": prices.date,
        "total": None if price is None else price * chip_hours,
    }


def formulas(step: Step, found: dict[str, Any], target: Target) -> dict[str, Any]:
    """The rules of thumb beside the exact figures: C = 6ND, 20 tokens a parameter, parameters x bytes x 1.2."""
    total, active = found["parameters"]["total"], found["parameters"]["active"]
    tokens = found["run"]["tokens"]
    return {
        "6ND": {"rule": 6 * total * tokens, "exact": found["flops"]["model"] * target.devices},
        "6ND_active": {"rule": 6 * active * tokens, "exact": found["flops"]["model"] * target.devices},
        "chinchilla": {"rule": 20 * total, "exact": found["training"]["tokens"]},
        "memory": {"rule": 1.2 * total * 4 / target.devices, "exact": found["memory"]["total"], "bytes": 4},
    }
