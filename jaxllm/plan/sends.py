"""What devices send each other to make a token, or to read a part of a prompt, by formulas.

Read off programs compiled for four CPU devices, whose bytes they say within 5 %: what heads and feed-forward give is
summed where devices split them, weights that are split with the rows are gathered for each step, and so are the keys
and values that all rows write to the cache. A TPU program sent the same for a token, and a tenth more in prefill.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp

from jaxllm.model.build import Model
from jaxllm.plan.collectives import wire
from jaxllm.plan.traffic import Flow
from jaxllm.sharding import names_of
from jaxllm.train.estimate.parts import ways

#: Numbers of a row that are summed where a token is drawn from a vocabulary that devices split.
DRAWN = 109


def flows(model: Model, rows: int, width: int, phase: str, platform: str) -> list[Flow] | None:
    """The traffic of one step: of `rows` rows and `width` tokens of each; None where no formula is known.

    That is so of experts, whose rows or weights travel by what is chosen, of split contexts, and of rows that do not
    divide over the devices that are to split them.
    """
    config, sizes = model.config, model.sharding.mesh.shape
    alone = all(sizes[axis] == 1 for axis in sizes if axis != "data")
    experts = not alone and any(spec.moe for spec in config.layer_specs)
    if experts or sizes["context"] > 1 or rows % _split(model):
        return None
    # CPUs compute in float32, and send what they compute with.
    u = 4 if platform == "cpu" else jnp.dtype(config.dtype).itemsize
    found: dict[tuple, float] = {}
    for kind, axes, payload in (
        *_sums(model, rows, width * u, phase, platform),
        *_weights(model, phase, u),
        *_cache(model, rows, width * u),
        *_embedded(model, rows, width * u),
    ):
        group = math.prod(sizes[axis] for axis in axes)
        found[kind, axes, group] = found.get((kind, axes, group), 0.0) + wire(kind, payload, group)
    return [Flow(*key, bytes_) for key, bytes_ in found.items() if bytes_]


def _sums(
    model: Model, rows: int, each: int, phase: str, platform: str
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Sums of the products that tensor parallelism splits. `each`: bytes of a number for all positions of a row.

    Prefill ends with the keys and values of the last layer, and splits the stream by positions between two products.
    """
    layers = model.config.layers
    stream = rows / _split(model) * each * model.config.embed
    last = phase == "prefill"
    for name, count in (("vocab", 1), ("heads", layers - last), ("ffw", layers - last)):
        axes = _axes(model, name)
        if not axes:
            continue
        if phase == "decode":
            yield "all-reduce", axes, count * stream
        else:
            yield "all-reduce" if platform == "cpu" else "reduce-scatter", axes, count * stream
            yield "all-gather", axes, count * stream
        if phase == "decode" and name == "vocab":
            yield "all-reduce", axes, DRAWN * 4 * rows / _split(model)


def _weights(model: Model, phase: str, u: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Weights gathered over the devices that split rows: of all layers, and of the head where tokens are drawn.

    Codes are unpacked before they are gathered, so that fewer bits save nothing here.
    """
    by_row = model.sharding.by_row
    for path, (axes, shape) in model.weights.items():
        split = names_of(model.sharding.weight(axes, shape, path).spec)
        if over := tuple(axis for axis in split if axis in by_row):
            others = model.sharding.ways([axis for axis in split if axis not in by_row])
            yield "all-gather", over, math.prod(shape) * _read(model, path, phase) / others * u


def _read(model: Model, path: str, phase: str) -> float:
    """The share of a weight's layers that products need: no prompt needs the head, or the end of the last layer."""
    config = model.config
    if not path.startswith(("prefix/", "layers/", "suffix/")):
        return float(phase == "decode" and path == ("embed" if config.tied else "head"))
    group, slot, *keys = path.split("/")
    last = ("suffix", len(config.suffix) - 1) if config.suffix else ("layers", len(config.pattern) - 1)
    if phase == "decode" or (group, int(slot)) != last or keys[:2] in (["attn", "k"], ["attn", "v"]):
        return 1.0
    return 1 - 1 / config.periods if group == "layers" else 0.0


def _cache(model: Model, rows: int, each: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Keys and values of all rows, gathered where each is written at a position of its own."""
    config, split = model.config, tuple(axis for axis in model.sharding.by_row)
    for attn in (spec.attn for spec in config.layer_specs) if split else ():
        heads = (attn.kv_heads or attn.heads) / ways(model.sharding, ("kv_heads",))
        yield "all-gather", split, rows * each * heads * (config.qk_dim(attn) + config.v_dim(attn))


def _embedded(model: Model, rows: int, each: int) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Rows of the table, whose columns are elsewhere: each device sends those of the others' tokens."""
    axes, shape = model.weights["embed"]
    split = names_of(model.sharding.weight(axes, shape, "embed").spec)
    if over := tuple(axis for axis in split if axis in model.sharding.by_row):
        yield "all-to-all", over, rows / _split(model) * each * model.config.embed


def _split(model: Model) -> int:
    return model.sharding.ways(model.sharding.by_row)


def _axes(model: Model, name: str) -> tuple[str, ...]:
    """The mesh axes that split a product by this logical axis, beside those that split rows."""
    split = model.sharding.activation((name,), [1 << 30])
    rows, sizes = model.sharding.by_row, model.sharding.mesh.shape
    return tuple(axis for axis in names_of(split) if axis not in rows and sizes[axis] > 1)
