"""Quantisation by calibration text: layer after layer, each on what the quantised layers before it give out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.adapt.quantize import QuantizeConfig, RoundToNearest, quantize_plan, rules_by_path
from jaxllm.compress.awq import rescale
from jaxllm.compress.calibrate import Flow, Where, check_single_process, joined, layer_of
from jaxllm.compress.gptq import gptq
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model, Params
from jaxllm.model.change import changed, forms, weights_of
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.rounded import Rounded

#: `{path: relative error of each layer of a stack}`: the Frobenius norm of what rounding changed over the weight's own.
Errors = dict[str, list[float]]


def quantize_calibrated(
    model: Model,
    params: Params,
    config: QuantizeConfig,
    batches: Sequence[TokenBatch],
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Params, Errors]:
    """The weights that `quantize_plan` describes, made by each rule's own method.

    Raises SettingsError for tables by another method than nearest, weights that are not plain arrays, and a model
    that several processes hold.
    """
    check_single_process()
    steps = _steps(model, config)
    layers, errors = [], {}
    flow = Flow(model, params, batches)
    for index, where in enumerate(model.layers):
        prefix = "/".join(where[:2]) + "/"
        mine = {path.removeprefix(prefix): step for path, step in steps.items() if path.startswith(prefix)}
        new, found = _layer(flow, where, layer_of(params, where), mine)
        layers.append(new)
        for path, error in found.items():
            errors.setdefault(prefix + path, []).append(error)
        say(f"layer {index + 1} of {len(model.layers)}")
        flow.advance(where, new)
    tables = {path: steps[path] for path in ("embed", "head") if path in steps}
    rounded = {path: jax.jit(step)(params[path], None) for path, step in tables.items()}
    errors |= {path: [relative_error(params[path], weight)] for path, weight in rounded.items()}
    new = params | rounded | joined(model, layers)
    places = jax.tree.map(lambda leaf: leaf.sharding, changed(model, quantize_plan(model, config)).abstract)
    return jax.tree.map(jax.device_put, new, places), errors


def needed_tokens(model: Model, config: QuantizeConfig) -> int:
    """Inputs of the widest matrix that is calibrated: with fewer tokens X^T X says nothing of some of them."""
    rules, of = rules_by_path(model, config), forms(model)
    return max((of[path].inputs for path, rule in rules.items() if rule.method != "nearest"), default=0)


def errors_of(before: Params, after: Params) -> Errors:
    """The errors of all quantised weights, where nothing else was done to them than rounding."""
    old, found = weights_of(before), {}
    for path, weight in weights_of(after).items():
        if isinstance(weight, Quantized) and not isinstance(old[path], Quantized):
            layers = range(weight.shape[0]) if len(weight.shape) > len(weight.form.shape) else [None]
            first = old[path].float if isinstance(old[path], Rounded) else old[path]
            pairs = (jax.tree.map(lambda x, i=i: x if i is None else x[i], (first, weight)) for i in layers)
            found[path] = [relative_error(*pair) for pair in pairs]
    return found


def relative_error(w: jax.Array, quantized: Quantized) -> float:
    """|Q - W| / |W| of one weight without a stack."""
    return float(_relative_error(w, quantized))


@jax.jit
def _relative_error(w, quantized):
    w = w.astype(jnp.float32)
    return jnp.linalg.norm(quantized.dense(jnp.float32) - w) / jnp.maximum(jnp.linalg.norm(w), 1e-30)


def _steps(model: Model, config: QuantizeConfig) -> dict[str, RoundToNearest]:
    plan, of, plain = quantize_plan(model, config), forms(model), weights_of(model.abstract)
    rules = rules_by_path(model, config)
    for path, rule in rules.items():
        if rule.method != "nearest" and "/" not in path:
            raise SettingsError(
                f"{path}: rows of a table are looked up, so that method={rule.method} has no inputs to go by; "
                "give it a rule with method=nearest"
            )
    if other := [path for path, weight in plain.items() if not isinstance(weight, jax.ShapeDtypeStruct)]:
        raise SettingsError(f"{other[0]} is no plain array; calibration starts from plain weights (jaxllm merge)")
    return {path: plan(path, of[path]) for path in rules}


def _layer(flow: Flow, where: Where, weights: Params, steps: dict[str, RoundToNearest]) -> tuple[Params, Errors]:
    """The weights of one layer as they are to be, and the error of each.

    They are made on one device: column by column, a mesh would do little but talk.
    """
    model, prefix = flow.model, "/".join(where[:2]) + "/"
    of = {path.removeprefix(prefix): form for path, form in forms(model).items() if path.startswith(prefix)}
    by = {name: {p: s for p, s in steps.items() if s.method == name} for name in ("nearest", "gptq", "awq")}
    flat, stats = jax.device_get(tree.flatten(weights)), {}
    if by["awq"]:
        stats = jax.device_get(flow.observe(where, weights, {path: of[path] for path in by["awq"]}))
        spec = model.config.layer_specs[model.layers.index(where)]
        flat = rescale(flat, stats, by["awq"], of, model.config, spec)
        weights = _nested(weights, flat)
    if by["gptq"]:
        stats = flow.observe(where, weights, {path: of[path] for path in by["gptq"]})
    new = {path: _rounded(flat[path], stats, path, step) for path, step in steps.items()}
    errors = {path: relative_error(flat[path], weight) for path, weight in new.items()}
    return _nested(weights, flat | new), errors


def _rounded(w, stats, path: str, step: RoundToNearest) -> Quantized:
    if step.method != "gptq":
        return _round(w, step)
    how = dict(group=step.group, double=step.double, symmetric=step.symmetric, activations=step.activations)
    return gptq(w, step.form, stats[path].gram_II, step.format, ordered=step.ordered, **how)


_round = jax.jit(lambda w, step: step(w, None), static_argnums=1)


def _nested(like: Params, flat: dict) -> Params:
    return tree.map_with_path(lambda path, _: flat[path], like)
