"""Unstructured pruning of a model: by magnitude at once, by Wanda layer after layer on what pruned ones give out."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxllm import tree
from jaxllm.adapt.prune import Prune, PruneConfig, prune_plan
from jaxllm.compress.calibrate import Flow, check_single_process, joined, layer_of
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import SettingsError
from jaxllm.model.build import Model, Params
from jaxllm.model.change import change, changed, forms, weights_of
from jaxllm.weights.pruned import Pruned

#: `{path: one number for each layer of a stack}`.
ByLayer = dict[str, list[float]]


def prune(
    model: Model,
    params: Params,
    config: PruneConfig,
    batches: Sequence[TokenBatch] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Model, Params, ByLayer]:
    """The model that `prune_plan` describes, its weights, and their errors: norm of what was taken over the weight's.

    `batches`: of calibration text, for method=wanda. Raises SettingsError where the settings do not fit the model, and
    for a model that several processes hold.
    """
    plan = prune_plan(model, config)
    after = changed(model, plan)
    new = change(model, plan, params) if batches is None else _by_text(model, params, config, batches, say)
    new = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), new, after.abstract)
    old = weights_of(params)
    mine = forms(model)
    chosen = {path: w for path, w in weights_of(new).items() if mine[path] is not None and plan(path, mine[path])}
    return after, new, {path: _errors(old[path], w, model.weights[path][0][0]) for path, w in chosen.items()}


def widest(model: Model) -> int:
    """Inputs of the widest matrix: with fewer tokens of text some of them would be judged by next to nothing."""
    return max(form.inputs for form in forms(model).values() if form is not None)


def counts(params: Params) -> tuple[int, int]:
    """`(parameters, those that are not zero)`, whatever types the weights are of."""
    found = weights_of(params).values()
    return sum(math.prod(w.shape) for w in found), sum(int(_nonzeros(w)) for w in found)


@jax.jit
def _nonzeros(weight):
    if not hasattr(weight, "dense"):
        return jnp.count_nonzero(weight)
    stacked = hasattr(weight, "form") and len(weight.shape) > len(weight.form.shape)
    values = lambda w: w.dense(jnp.float32)  # noqa: E731
    return jnp.count_nonzero((jax.vmap(values) if stacked else values)(weight))


def _by_text(model: Model, params: Params, config: PruneConfig, batches, say) -> Params:
    """All weights, those of the plan pruned by Wanda."""
    check_single_process()
    plan, of = prune_plan(model, config), forms(model)
    steps = {path: step for path, form in of.items() if form is not None and (step := plan(path, form))}
    if tables := [path for path in steps if "/" not in path]:
        raise SettingsError(
            f"{tables[0]}: rows of a table are looked up, so that method={config.method} has no inputs to go by; prune "
            f"it by itself with method=magnitude (pattern {tables[0]})"
        )
    flow, layers = Flow(model, params, batches), []
    for index, where in enumerate(model.layers):
        prefix, weights = "/".join(where[:2]) + "/", layer_of(params, where)
        mine = {path.removeprefix(prefix): step for path, step in steps.items() if path.startswith(prefix)}
        stats = flow.observe(where, weights, {path: step.form for path, step in mine.items()}) if mine else {}

        def new(path, w, mine=mine, stats=stats):
            return _pruned(w, jnp.diagonal(stats[path].gram_II, axis1=-2, axis2=-1), mine[path]) if path in mine else w

        layers.append(tree.map_with_path(new, weights, is_leaf=lambda x: not isinstance(x, dict)))
        flow.advance(where, layers[-1])
        say(f"layer {index + 1} of {len(model.layers)}")
    return params | joined(model, layers)


@functools.partial(jax.jit, static_argnums=2)
def _pruned(w, squares_I, step: Prune) -> Pruned:
    return step.by(w, squares_I)


def _errors(old: jax.Array, new: Pruned, first_axis: str | None) -> list[float]:
    stacked = first_axis == "layers"
    return [float(x) for x in jnp.atleast_1d(_relative_error(old, new, stacked))]


@functools.partial(jax.jit, static_argnums=2)
def _relative_error(old, new, stacked: bool):
    """|P - W| / |W|, of each layer of a stack."""
    old = old.astype(jnp.float32)
    axes = tuple(range(int(stacked), old.ndim))
    taken, whole = (jnp.sum(jnp.square(x), axis=axes) for x in (old - new.dense(jnp.float32), old))
    return jnp.sqrt(taken / jnp.maximum(whole, 1e-30))
