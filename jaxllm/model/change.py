"""A model with other weight types in the place of its arrays: the same forward pass over changed weights.

A plan says of each weight what becomes of it: `plan(path, form)` gives a function for one layer's weight, or None to
leave it. `changed` describes the model that comes out, `change` makes its weights, one after another, where they live.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import tree
from jaxllm.errors import SettingsError, nearest
from jaxllm.model.build import Model, Params
from jaxllm.sharding import Sharding
from jaxllm.weights.form import Form, form_of

#: `f(weight, key) -> weight`, hashable, so that weights of one form share what is compiled.
Step = Callable[[Any, jax.Array], Any]
Plan = Callable[[str, Form], Step | None]


def changed(model: Model, plan: Plan) -> Model:
    """The model whose weights `plan` has changed; nothing is computed.

    Its `init` makes new weights and changes them.
    """
    steps = _steps(model, plan)
    shapes = {path: _shape(steps[path], leaf) for path, leaf in weights_of(model.abstract).items()}
    axes = {path: _axes(weight, model.weights[path][0]) for path, weight in shapes.items()}
    abstract = {path: place(weight, axes[path], model.sharding) for path, weight in shapes.items()}
    rebuild = jax.tree.structure(model.abstract, is_leaf=is_weight).unflatten
    return dataclasses.replace(
        model,
        abstract=rebuild(abstract.values()),
        axes=rebuild(axes.values()),
        init=lambda key: change(model, plan, model.init(key), key),
    )


def change(model: Model, plan: Plan, params: Params, key: jax.Array | None = None, *, free: bool = False) -> Params:
    """The weights of `model`, changed by `plan`.

    Args:
      key: of what is drawn (new adapters); default: that of seed 0.
      free: gives the memory of each old weight back once the new one is made; `params` is of no more use then.

    Raises SettingsError for a step that only stands in for one that takes more than weights (`stand_in`).
    """
    steps, key = _steps(model, plan), jax.random.key(0) if key is None else key
    places = weights_of(changed(model, plan).abstract)
    leaves = []
    for i, (path, weight) in enumerate(weights_of(params).items()):
        step = steps[path]
        if step is None:
            leaves.append(weight)
            continue
        if why := getattr(step.step if isinstance(step, Stacked) else step, "stand_in", None):
            raise SettingsError(f"{path}: {why}")
        where = jax.tree.map(lambda leaf: leaf.sharding, places[path])
        new = jax.jit(step, out_shardings=where)(weight, jax.random.fold_in(key, i))
        leaves.append(jax.block_until_ready(new) if free else new)
        if free:
            kept = {id(leaf) for leaf in jax.tree.leaves(new)}
            [leaf.delete() for leaf in jax.tree.leaves(weight) if id(leaf) not in kept]
    return jax.tree.structure(params, is_leaf=is_weight).unflatten(leaves)


def choose(model: Model, pattern: str, what: str) -> list[str]:
    """Paths of the matrices that a pattern chooses. Raises SettingsError with the nearest ones where there is none."""
    known = [path for path, form in forms(model).items() if form is not None]
    if not (chosen := [path for path in known if tree.matches(pattern, path)]):
        raise SettingsError(f"{what}: no matrix matches {pattern!r}{nearest(pattern, known)}")
    return chosen


def forms(model: Model) -> dict[str, Form | None]:
    """The form of each weight by its path; None for what is no matrix."""
    return {path: form_of(axes, shape) for path, (axes, shape) in model.weights.items()}


def weights_of(params: Params) -> dict[str, Any]:
    """`{path: weight}`, weight types whole."""
    return tree.flatten(params, is_leaf=is_weight)


def is_weight(x) -> bool:
    """Whether x is one weight of any type, or its shape; not a dict of them."""
    return not isinstance(x, dict) and x is not None


def place(weight, axes, sharding: Sharding):
    """Shapes with the shardings of their logical axes; what does not divide is whole on every device."""

    def one(leaf, names):
        rules = dict(sharding.rules)
        split = [rules[name] if name else None for name in names]
        split = [s if s and n % sharding.ways(s) == 0 else None for n, s in zip(leaf.shape, split, strict=True)]
        where = NamedSharding(sharding.mesh, PartitionSpec(*split))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(one, weight, axes)


def _steps(model: Model, plan: Plan) -> dict[str, Step | None]:
    found = {path: plan(path, form) if form is not None else None for path, form in forms(model).items()}
    return {
        path: Stacked(step) if step and model.weights[path][0][0] == "layers" else step for path, step in found.items()
    }


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A step for the weight of one layer, done for each layer of a stack."""

    step: Step

    def __call__(self, weight, key):
        layers = jax.tree.leaves(weight)[0].shape[0]
        return jax.vmap(self.step)(weight, jax.random.split(key, layers))


def _shape(step: Step | None, leaf):
    return leaf if step is None else jax.eval_shape(step, leaf, jax.random.key(0))


def _axes(weight, axes):
    return weight.axes(axes) if hasattr(weight, "axes") else axes
