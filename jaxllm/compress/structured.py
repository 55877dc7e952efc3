"""Structured pruning: whole heads, neurons, experts and layers are taken out; what is left is an ordinary model.

What goes is what adds least to the output of its layer on calibration text (`compress.importance`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm import tree
from jaxllm.compress.calibrate import Flow, check_single_process, joined, layer_of
from jaxllm.compress.importance import Importance, influence
from jaxllm.compress.prune import ByLayer
from jaxllm.compress.slices import StructuredConfig, check, choose, cut, sizes, smaller
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model, Params, build
from jaxllm.model.change import weights_of
from jaxllm.model.spec import LayerSpec, ModelConfig, fold


def shrink(
    model: Model,
    params: Params,
    config: StructuredConfig,
    batches: Sequence[TokenBatch],
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Model, Params, dict[str, Any]]:
    """The smaller model, its weights, and what went.

    That is `removed`, `{part: share of the part's importance, of each layer that lost some}`, and where whole layers go
    `influence` of each one, and `dropped`, their numbers from 0. Layers go first, by the whole model; then each layer
    is cut on what the smaller ones before it give out.
    Raises SettingsError for what does not fit the model, weights that are no plain arrays, and several processes.
    """
    check_single_process()
    check(model.config, config)
    if other := [path for path, w in weights_of(params).items() if not isinstance(w, jax.Array)]:
        raise SettingsError(f"{other[0]} is no plain array; make the weights plain first (jaxllm merge)")
    specs = [smaller(spec, model.config, config) for spec in model.config.layer_specs]
    kept, found = list(range(len(specs))), {}
    if config.layers is not None:
        found["influence"] = influence(model, params, batches)
        kept = choose(np.array(found["influence"]), config.layers).tolist()
        found["dropped"] = [i for i in range(len(specs)) if i not in kept]
        say(f"without layer {', '.join(map(str, found['dropped']))}")
    after = build(_config(model.config, [specs[i] for i in kept]), model.sharding, model.kernels)
    layers, found["removed"] = _layers(model, after, params, kept, batches, say)
    rest = {name: leaf for name, leaf in params.items() if name not in ("prefix", "layers", "suffix")}
    new = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), rest | joined(after, layers), after.abstract)
    return after, new, found


def _config(config: ModelConfig, specs: Sequence[LayerSpec]) -> ModelConfig:
    """The model with these layers in the place of its own; the pattern is another one only where layers are missing."""
    start = len(config.prefix)
    prefix, pattern = specs[:start], specs[start : start + len(config.pattern)]
    if len(specs) < config.layers:
        prefix, pattern = fold(specs)
    return dataclasses.replace(config, layers=len(specs), prefix=tuple(prefix), pattern=tuple(pattern))


def _layers(model: Model, after: Model, params: Params, kept, batches, say) -> tuple[list[Params], ByLayer]:
    """The weights of the layers that are left, and the share of importance that each one's parts have lost."""
    flow, importance = Flow(model, params, batches), Importance(model)
    thin, layers, removed = flow.onto(after), [], {}
    for number, (old, new) in enumerate(zip(kept, after.layers, strict=True), 1):
        where, spec, less = model.layers[old], model.config.layer_specs[old], after.config.layer_specs[number - 1]
        weights, left = layer_of(params, where), sizes(less)
        parts = {part: n for part, n in sizes(spec).items() if left[part] < n}
        kept_of, shares = _choose(importance(flow, where, weights, parts), spec, left) if parts else ({}, {})
        for part, share in shares.items():
            removed.setdefault(part, []).append(share)
        layers.append(_cut(model, where, weights, kept_of))
        thin.advance(new, layers[-1])
        say(f"layer {number} of {len(kept)}")
    return layers, removed


def _choose(scores: dict[str, np.ndarray], spec: LayerSpec, left: dict[str, int]):
    """`(numbers of what stays, share of importance that goes)` of each part."""
    kept, shares = {}, {}
    for part in sorted(scores):  # experts before neurons, of which only those of the experts that stay count
        score = scores[part]
        if part == "neurons" and "experts" in kept:
            score = score[kept["experts"]]
        kept[part] = choose(score, left[part], spec.moe.groups if part == "experts" else 1)
        stays = np.take_along_axis(score, kept[part], axis=-1)
        shares[part] = 1 - float(stays.sum() / max(score.sum(), 1e-30))
    return kept | ({"groups": np.array(sizes(spec)["heads"])} if "heads" in kept else {}), shares


def _cut(model: Model, where, weights: Params, kept: dict[str, np.ndarray]) -> Params:
    """The weights of one layer without what goes, on the host."""
    prefix, stacked = "/".join(where[:2]) + "/", where[2] is not None

    def one(path, w):
        return cut(path, w, model.weights[prefix + path][0][stacked:], kept)

    return tree.map_with_path(one, jax.device_get(weights))
