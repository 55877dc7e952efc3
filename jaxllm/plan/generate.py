"""Plans of generation: the real programs that read prompts and make tokens, and how fast memory and compute allow it.

Shapes: B rows, S slots of the cache, T positions of a part of a prompt, V vocab.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.adapt.changes import Change, Changes, after
from jaxllm.adapt.quantize import QuantizeConfig, QuantizeRule
from jaxllm.errors import SettingsError, UserError
from jaxllm.generate import decode
from jaxllm.generate.params import make_sampling
from jaxllm.kernels.backend import tracing_for
from jaxllm.model.build import Model, active_parameters, build
from jaxllm.model.cache import Cache, make_cache
from jaxllm.plan.bounds import ASSUMED, Bound, network_bounds, seconds_of
from jaxllm.plan.compiled import Compiled, compile_for, memory_of, needed, share_of
from jaxllm.plan.fits import smallest_slice
from jaxllm.plan.sends import flows
from jaxllm.plan.target import Target
from jaxllm.sharding import Sharding, make_sharding
from jaxllm.train.config import RunConfig
from jaxllm.train.estimate.advice import NAMED, Saving, listed
from jaxllm.train.estimate.step import abstract_sharding, changes_of
from jaxllm.train.memory import device_bytes, size

#: What a phase says where it was not compiled and no formula knows what devices send.
UNKNOWN = (
    "no bound of networks: what is sent for experts, for split contexts, and for rows that do not divide over devices "
    "is known of compiled programs alone"
)
#: What is said where no setting that is tried would do.
NO_WAY = "nothing of this would do by itself: fewer bits (--weights, --cache), or a lower --batch or --context"
#: Formats of weights in fewer bits than each.
FEWER = {None: ("int8", "int4"), "int8": ("int4",)}
#: What the kinds of memory are called.
CALLED = {"parameters": "parameters", "cache": "key-value cache", "temporaries": "temporaries"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is generated: rows at a time, and how many tokens each has in the end, prompt included."""

    batch: int
    context: int
    cache: str = "float"
    weights: str | None = None
    """A number format to store the matrices of the layers in, or None for the run's own."""

    def __post_init__(self):
        if self.batch < 1 or self.context < 2:
            raise SettingsError(f"--batch {self.batch}, --context {self.context}: at least 1 row, of at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class Generation:
    """Weights and cache as shapes."""

    model: Model
    params: Any
    cache: Cache
    request: Request

    def rows(self, shape, dtype, *axes):
        """The shape of an array, laid out as generation does it."""
        sharding = self.model.sharding
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(sharding.mesh, sharding.activation(axes, shape))
        )

    def lower_decode(self):
        """The loop that makes tokens; facts count one round of it."""
        B, vocab, column = self.request.batch, self.model.config.padded_vocab, np.int32
        ints = [self.rows((B,), column, "batch") for _ in range(5)]
        state = decode.State(self.cache, *ints, None)
        sampling = jax.tree.map(lambda x: self.rows(x.shape, x.dtype, None), make_sampling(B, temperature=0.0))
        rules = decode.Rules(sampling, self.rows((B, 1), column, None, None), self.rows((vocab,), bool, None))
        return self._run().decode.lower(self.params, state, rules=rules, chunk=8, top=0)

    def lower_prefill(self):
        """A part of the prompts of all rows."""
        B, width = self.request.batch, min(decode.PREFILL, self.request.context)
        tokens = [self.rows((B, width), np.int32, "batch", None) for _ in range(2)]
        lengths = self.rows((B,), np.int32, "batch")
        return self._run().prefill.lower(self.params, self.cache, *tokens, lengths, None)

    def _run(self):
        return decode.compiled(self.model.config, self.model.sharding, self.model.kernels)


def make_generation(config: RunConfig, sharding: Sharding, request: Request) -> Generation:
    """Shapes of weights and cache on a mesh. Raises SettingsError for rows that are longer than the model's context."""
    if request.context > config.model.context:
        raise SettingsError(
            f"--context {request.context} is more than model.context={config.model.context}; set --context lower"
        )
    kernels = dataclasses.replace(config.kernels, cache=request.cache)
    model = after(build(config.model, sharding, kernels), changes(config, request))
    cast = jax.tree.map(lambda x: _in(x, config.model.dtype), model.abstract)
    params = {**cast, "layers": jax.tree.map(_apart, cast["layers"])}
    made = jax.eval_shape(
        lambda: make_cache(config.model, request.batch, request.context, decode.PREFILL, stored=request.cache)
    )
    shapes = Generation(model, params, (), request)
    names = ("batch", "kv_heads", None, None)
    cache = jax.tree.map(
        lambda x: shapes.rows(x.shape, x.dtype, *(names if x.ndim == 4 else (names[0], *[None] * (x.ndim - 1)))), made
    )
    # What has been written once is no longer empty, and attends to what is there.
    cache = tuple(dataclasses.replace(layer, empty=False) for layer in cache)
    return dataclasses.replace(shapes, cache=cache)


def changes(config: RunConfig, request: Request) -> Changes:
    if request.weights is None:
        return changes_of(config)
    return (*changes_of(config), Change(quantize=QuantizeConfig(rules=(QuantizeRule(format=request.weights),))))


def _in(leaf, dtype: str):
    """A float32 array of the abstract weights in the compute dtype, as weights are loaded for generation."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.dtype == jnp.float32 else leaf.dtype, sharding=leaf.sharding)


def _apart(leaf):
    """The layers of a stacked array one by one (`decode.unstack`)."""
    sharding = NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec(*leaf.sharding.spec[1:]))
    return tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding) for _ in range(leaf.shape[0]))


def plan_generation(
    config: RunConfig, target: Target, request: Request, *, compiles: bool = True, assumed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The plan of generating with a run's model as plain values. Raises SettingsError, UserError as `plan` does."""
    shapes = make_generation(config, abstract_sharding(config.parallel, target.devices, target.slices), request)
    weights, cache = device_bytes(shapes.params), device_bytes(shapes.cache)
    capacity = memory_of(target)
    programs: dict[str, Compiled] = {}
    if compiles and target.compiles and weights + cache <= capacity:
        programs = compile_generation(config, target, request)
    memory = _memory(weights, cache, programs, capacity, target)
    found = {
        "topology": {"name": target.name, "chips": target.chips, "devices": target.devices, "slices": target.slices},
        "mesh": {axis: n for axis, n in shapes.model.sharding.mesh.shape.items() if n > 1} or {"data": 1},
        "run": _run(config, request, assumed),
        "parameters": dict(zip(("total", "active"), _counted(shapes.model), strict=True)),
        "memory": memory,
        "compiled": {name: one.to_dict() for name, one in programs.items()} or None,
    }
    for phase in ("decode", "prefill"):
        found[phase] = _phase(phase, shapes, weights, cache, programs.get(phase), target)
    if not memory["fits"]:
        found["advice"] = _advice(config, request, memory, target)
    return found


def _advice(config: RunConfig, request: Request, memory: dict[str, Any], target: Target) -> str:
    """Both sizes, the smallest slice that would do, and what would make it fit where it is."""
    ways = ways_to_fit(config, request, memory, target)
    return "\n".join([_place(config, request, memory, target), *(listed(ways) if ways else [NO_WAY])])


def ways_to_fit(
    config: RunConfig, request: Request, memory: dict[str, Any], target: Target
) -> list[tuple[Saving, ...]]:
    """Fewer bits, rows or tokens that fit, by formulas and with the temporaries as they are; or fewer bits together."""
    sharding = abstract_sharding(config.parallel, target.devices, target.slices)
    beside = memory["kinds"]["temporaries"]

    def tried(now: float, options: tuple[str, ...], **changes) -> Saving | None:
        try:
            shapes = make_generation(config, sharding, dataclasses.replace(request, **changes))
        except UserError:
            return None
        total = device_bytes(shapes.params) + device_bytes(shapes.cache) + beside
        return Saving(options, now - total, total) if total < 0.99 * now else None

    def halves(name: str, least: int) -> list[Saving | None]:
        sizes = [getattr(request, name) // 2**n for n in range(1, 12)]
        return [tried(memory["total"], (f"--{name}", str(n)), **{name: n}) for n in sizes if n >= least]

    caches = [tried(memory["total"], ("--cache", "int8"), cache="int8")] * (request.cache == "float")
    bits = [tried(memory["total"], ("--weights", x), weights=x) for x in FEWER.get(request.weights, ())]
    ways = []
    for found in (caches, bits, halves("batch", 1), halves("context", 2)):
        ways += [(one,) for one in found if one and one.total <= memory["capacity"]][:1]
    if ways or not (caches and bits):
        return ways[:NAMED]
    first = tried(memory["total"], ("--weights", "int4"), weights="int4")
    both = first and tried(first.total, ("--cache", "int8"), weights="int4", cache="int8")
    return [(first, both)] if both and both.total <= memory["capacity"] else []


def _place(config: RunConfig, request: Request, memory: dict[str, Any], target: Target) -> str:
    """What does not fit where, and the smallest slice that would do."""

    def fits(config: RunConfig, there: Target) -> bool:
        try:
            sharding = abstract_sharding(config.parallel, there.devices, there.slices)
            shapes = make_generation(config, sharding, request)
        except UserError:
            return False
        return device_bytes(shapes.params) + device_bytes(shapes.cache) <= memory_of(there)

    text = (
        f"{target.name}: a device needs {size(memory['total'])} ({', '.join(_listed(memory))}) and has "
        f"{size(memory['capacity'])}"
    )
    if target.topology is None:
        return f"{text}; split the weights over more devices (parallel.tensor)"
    smallest = smallest_slice(config, target, ((_as_it_is, _by_heads), (_by_heads_and_layers,)), fits)
    if smallest is None:
        return f"{text}; no slice of this chip would do as it is"
    return f"{text}; the smallest slice that would do, by formulas without temporaries: {smallest[0]}{smallest[1]}"


def _as_it_is(config: RunConfig, target: Target) -> RunConfig:
    return config


def _by_heads(config: RunConfig, target: Target, **axes: int) -> RunConfig:
    """Heads split over as many devices as they divide over, and replicas of that."""
    heads = [spec.attn.kv_heads or spec.attn.heads for spec in config.model.layer_specs]
    sizes = {"data": -1, "fsdp": 1, "expert": 1, "context": 1, "tensor": math.gcd(target.per_slice, *heads)}
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **sizes | axes))


def _by_heads_and_layers(config: RunConfig, target: Target) -> RunConfig:
    """Also the weights split over the other devices of a slice, which gather them for each token: slow."""
    return _by_heads(config, target, data=target.slices, fsdp=-1)


def compile_generation(config: RunConfig, target: Target, request: Request) -> dict[str, Compiled]:
    """The programs that make tokens and read prompts."""
    shapes = make_generation(config, make_sharding(config.parallel, target.jax_devices()), request)
    mesh = shapes.model.sharding.mesh
    with tracing_for(target.platform):
        return {
            "decode": compile_for(shapes.lower_decode, mesh, target),
            "prefill": compile_for(shapes.lower_prefill, mesh, target),
        }


def _counted(model: Model) -> tuple[int, int]:
    plain = {path: jax.ShapeDtypeStruct(shape, "float32") for path, (_, shape) in model.weights.items()}
    return active_parameters(model.config, plain)


def _run(config: RunConfig, request: Request, assumed) -> dict[str, Any]:
    named = [str(change) for change in changes(config, request)]
    what = {"batch": request.batch, "context": request.context, "cache": request.cache, "dtype": config.model.dtype}
    return what | {"changes": named, "assumed": list(assumed)}


def _listed(memory) -> list[str]:
    return [f"{name} {size(value)}" for name, value in memory["kinds"].items() if value]


def _memory(weights: float, cache: float, programs, capacity, target: Target) -> dict[str, Any]:
    totals = [needed(one.program.memory, target.platform) for one in programs.values() if one.program]
    refused = [one.needs or 0.0 for one in programs.values() if one.program is None]
    total = max([weights + cache, *totals, *refused])
    return {
        "kinds": {"parameters": weights, "cache": cache, "temporaries": total - weights - cache},
        "total": total,
        "capacity": capacity,
        "capacity_how": share_of(target),
        "fits": not refused and total <= capacity,
        "source": "the compiled programs" if programs else "formulas, without temporaries",
    }


def _phase(
    phase: str, shapes: Generation, weights: float, cache: float, compiled, target: Target
) -> dict[str, Any] | None:
    """Bounds and tokens a second of one phase; None where no speed of the devices is known."""
    if target.chip is None:
        return None
    program = compiled and compiled.program
    B = shapes.request.batch
    width = 1 if phase == "decode" else min(decode.PREFILL, shapes.request.context)
    tokens = B * width
    flops = tokens * _flops_per_token(shapes, phase) / target.devices
    peak, speed = target.chip.device.bf16 * ASSUMED["products"], target.chip.device.hbm_bandwidth * ASSUMED["memory"]
    read = weights * _touched(shapes, tokens) + cache
    how = f"weights and the whole cache read once, at {ASSUMED['memory']:.0%} of the peak (assumed)"
    bounds = {
        "compute": Bound(flops / peak, f"at {ASSUMED['products']:.0%} of the peak (assumed)"),
        "memory": Bound(read / speed, how),
    }
    sizes = dict(shapes.model.sharding.mesh.shape)
    rows = program.collectives if program else flows(shapes.model, B, width, phase, target.platform)
    bounds |= network_bounds(rows or (), sizes, target)
    longest = max(bounds, key=lambda name: bounds[name].seconds)
    network = [
        {"kind": row.kind, "axes": list(row.axes), "network": row.network, "wire_bytes": row.wire_bytes}
        | {"seconds": seconds_of(row, sizes, target)}
        for row in rows or ()
    ]
    seconds = bounds[longest].seconds
    return {
        "bounds": {name: dataclasses.asdict(bound) for name, bound in bounds.items()},
        "seconds": seconds,
        "bound": longest,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_row": tokens / B / seconds,
        "network": network,
        "network_source": None if rows is None else "the compiled program" if program else "formulas",
        "missing": UNKNOWN if rows is None else None,
    }


def _touched(shapes: Generation, tokens: int) -> float:
    """The share of the weights that so many tokens want: of experts those that any of them chooses, chosen evenly."""
    found = wanted = 0.0
    for path, (_, shape) in shapes.model.weights.items():
        size_, keys = float(np.prod(shape)), path.split("/")
        share = 1.0
        if "moe" in keys and keys[-1] in ("gate", "up", "down") and "shared" not in keys:
            moe = getattr(shapes.model.config, "pattern" if keys[0] == "layers" else keys[0])[int(keys[1])].moe
            share = 1 - (1 - moe.experts_per_token / moe.experts) ** tokens
        found, wanted = found + size_, wanted + share * size_
    return wanted / found


def _flops_per_token(shapes: Generation, phase: str) -> float:
    """Products of a token with the weights, and with the keys and values of a full cache (half of one in prefill)."""
    config, context = shapes.model.config, shapes.request.context
    total = 2.0 * _counted(shapes.model)[1]
    for attn in (spec.attn for spec in config.layer_specs):
        keys = min(context, attn.window or context) / (1 if phase == "decode" else 2)
        total += 4 * attn.heads * config.attention_dim(attn) * keys
    return total


def show(found: dict[str, Any]) -> str:
    """The dict of `plan_generation` as lines."""
    where, run, memory = found["topology"], found["run"], found["memory"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items())
    changed = f", {', '.join(run['changes'])}" if run["changes"] else ""
    lines = [
        f"{where['name']}: {where['chips']:,} chips, {mesh}",
        f"{found['parameters']['total']:,} parameters, {found['parameters']['active']:,} in matrix products of a token",
        f"{run['batch']} rows of {run['context']:,} tokens, {run['dtype']}, cache {run['cache']}{changed}",
    ]
    if run["assumed"]:
        lines.append(f"a model by itself; assumed: {', '.join(run['assumed'])}")
    of = f" of {size(memory['capacity'])}, {memory['total'] / memory['capacity']:.0%}"
    lines += ["", f"memory of a device, by {memory['source']}: {size(memory['total'])}{of}"]
    lines += [f"  ({memory['capacity_how']})"] * bool(memory["capacity_how"])
    lines += [f"  {CALLED[kind]:<18}{size(value):>12}" for kind, value in memory["kinds"].items() if value]
    for phase, what in (("decode", "a token of each row"), ("prefill", "a part of each prompt")):
        if (one := found[phase]) is None:
            continue
        lines += ["", f"{phase}: {what} in {one['seconds'] * 1e3:.2f} ms at least, by {one['bound']}"]
        lines += [
            f"  {name:<18}{bound['seconds'] * 1e3:>9.2f} ms  {bound['how']}" for name, bound in one["bounds"].items()
        ]
        lines += [f"  {one['missing']}"] * bool(one["missing"])
        if one["network"]:
            sent = sum(row["wire_bytes"] for row in one["network"])
            lines.append(f"  a device sends {size(sent)}, by {one['network_source']}")
        lines.append(
            f"  at most {one['tokens_per_second']:,.0f} tokens/s, {one['tokens_per_second_per_row']:,.1f} for each row"
        )
    return "\n".join(lines)
