"""What devices send each other in a step, by formulas, and how fast each network carries it.

Gathers and reductions by rings (Thakur et al. 2005, section 4); bytes that one device sends.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from jaxllm import tree
from jaxllm.plan.collectives import wire
from jaxllm.plan.target import Target
from jaxllm.sharding import names_of
from jaxllm.train.estimate.parts import is_unrolled, tokens_of, ways
from jaxllm.train.estimate.step import Step
from jaxllm.weights.axes import is_linear_map

#: Where mesh axes stand: the last one changes first from device to device.
OUTER = "data"


@dataclasses.dataclass(frozen=True)
class Flow:
    """All collectives of one kind along the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    group: int
    wire_bytes: float
    network: str = "ici"


def flows_of(step: Step, platform: str, slices: int = 1) -> list[Flow]:
    """The traffic of a step, largest first."""
    found: dict[tuple, float] = {}
    for kind, axes, payload in (*_weights(step, platform), *_sums(step), *_rows(step, platform)):
        group = math.prod(step.sharding.mesh.shape[axis] for axis in axes)
        for part in _parts(kind, payload, group, slices if OUTER in axes else 1):
            key = part[0], axes, *part[2:]
            found[key] = found.get(key, 0.0) + wire(part[0], *part[1:3])
    flows = [Flow(kind, axes, group, bytes_, network) for (kind, axes, group, network), bytes_ in found.items()]
    return sorted((flow for flow in flows if flow.wire_bytes), key=lambda flow: -flow.wire_bytes)


def _parts(kind: str, payload: float, group: int, slices: int) -> list[tuple[str, float, int, str]]:
    """`(kind, payload, group, network)` of what a collective of a group that lies in so many slices is made of.

    The slow network joins slices alone: a sum is scattered within each, summed over slices by parts, and gathered.
    """
    if slices == 1:
        return [(kind, payload, group, "ici")]
    inside = group // slices
    if kind != "all-reduce" or inside == 1:
        return [(kind, payload, slices, "dcn")]
    return [
        ("reduce-scatter", payload, inside, "ici"),
        (kind, payload / inside, slices, "dcn"),
        ("all-gather", payload, inside, "ici"),
    ]


def _weights(step: Step, platform: str) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Weights gathered where they are used, and their gradients on the way back (`model/gather.py`)."""
    model, gather = step.model, step.model.local.gather
    mask, shapes = tree.flatten(tree.select(step.state.params, step.trainable)), tree.flatten(model.abstract)
    names = tree.flatten(model.axes, is_leaf=lambda x: isinstance(x, tuple))
    compute, microbatches = jnp.dtype(model.config.dtype).itemsize, step.config.train.accumulate
    sizes = step.sharding.mesh.shape
    # On CPU the compiler finds that an unrolled layer gathers twice, and does it once.
    again = model.config.remat != "none" and not (platform == "cpu" and is_unrolled(step, platform))
    for path, places in gather.places.items():
        leaf, axes = shapes[path], tuple(axis for axes in places for axis in axes if sizes[axis] > 1)
        if not axes:
            continue
        # What tensor parallelism splits is gathered whole along the other axes, as programs of today have it.
        kept = [n for n in names_of(leaf.sharding.spec) if n not in axes and n in model.local.sharding.manual]
        numbers = leaf.size / step.sharding.ways(kept)
        whole = numbers * (compute if path in gather.matrices else leaf.dtype.itemsize)
        layer = path.startswith(("prefix/", "layers/", "suffix/"))
        yield "all-gather", axes, microbatches * whole * (1 + (layer and again))
        if mask[path] and path == "embed":
            yield "reduce-scatter", axes, microbatches * (4 * numbers + whole * model.config.tied)
        elif mask[path]:
            yield "reduce-scatter", axes, microbatches * whole
        if mask[path] and step.config.optim.name == "muon" and is_linear_map(names[path]):
            yield "all-gather", axes, 3 * 4 * numbers  # each Newton-Schulz step wants whole matrices


def _sums(step: Step) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Gradients of what devices along an axis hold alike, once a step."""
    mask = tree.flatten(tree.select(step.state.params, step.trainable))
    for path, leaf in tree.flatten(step.model.abstract).items():
        alike = tuple(axis for axis in step.sharding.by_row if axis not in names_of(leaf.sharding.spec))
        if mask[path] and alike:
            yield "all-reduce", alike, math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _rows(step: Step, platform: str) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Activations: sums of the products that tensor parallelism splits, keys and values, rows for experts."""
    config, sizes, t = step.model.config, step.sharding.mesh.shape, tokens_of(step)
    u = jnp.dtype(config.dtype).itemsize
    again = config.remat != "none"
    for spec in config.layer_specs:
        attn = spec.attn
        if ways(step.sharding, ("heads",)) > 1:
            # What two products give, and what two of them read: forward, again, and the gradients of both.
            stream = t * config.embed * u
            yield "all-reduce" if platform == "cpu" else "reduce-scatter", ("tensor",), stream * (4 + again)
            yield "all-gather", ("tensor",), stream * (4 + 2 * again)
        if sizes["context"] > 1:
            heads = (attn.kv_heads or attn.heads) / ways(step.sharding, ("kv_heads",))
            keys = t * heads * (config.qk_dim(attn) + config.v_dim(attn)) * u
            if step.config.kernels.context == "ring":
                yield "collective-permute", ("context",), keys * (sizes["context"] - 1) * (1 + again + 3)
            else:
                yield "all-gather", ("context",), keys * sizes["context"] * (1 + again)
                yield "reduce-scatter", ("context",), keys * sizes["context"]
        if spec.moe is not None and sizes["expert"] > 1:
            yield "all-to-all", ("expert",), t * spec.moe.experts_per_token * config.embed * u * 2 * (2 + again)


def bandwidth(target: Target, axes: Sequence[str], sizes: dict[str, int], group: int, network: str) -> float:
    """Bytes a second that a device sends in a collective of so many devices, at full speed of the links that join them.

    On a torus a group has the links of as many sides as it takes to hold it; a side that is no ring has half of them.
    """
    chip = target.chip.device
    if network == "dcn":
        return chip.dcn
    if target.chip.gpu:
        return _of_gpus(target, axes, sizes)
    sides = sorted(target.topology.shape, reverse=True)
    needed, held = 0, 1
    while held * target.chip.devices_per_chip < group and needed < len(sides):
        held, needed = held * sides[needed], needed + 1
    rings = 1.0 if all(target.topology.wraps) else 0.5
    return chip.ici * max(needed, 1) / target.chip.torus * rings


def _of_gpus(target: Target, axes: Sequence[str], sizes: dict[str, int]) -> float:
    """NVLink within a node; between nodes the network cards of all GPUs of the group that a node holds."""
    chip, per_node = target.chip, target.topology.shape[0]
    names = list(sizes)
    inner = math.prod(sizes[name] for name in names[max(names.index(axis) for axis in axes) + 1 :])
    if inner * math.prod(sizes[axis] for axis in axes) <= per_node:
        return chip.ici
    return min(chip.ici, chip.dcn * max(1, per_node // inner))
