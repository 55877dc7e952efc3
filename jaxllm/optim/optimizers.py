"""Optimizers as optax transformations: clip, direction, weight decay on matrices, learning rate.

To add one, write a function `(config, axes) -> optax.GradientTransformation` that gives the update's direction
(the sign of the gradient, before learning rate and decay) and put it in OPTIMIZERS, or name it from outside the tree
as `package.module:NAME`. `axes` is `{path: logical axes}`. Frozen weights are None in the trees that optax sees.
"""

import importlib
import math
from collections.abc import Callable

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxllm import tree
from jaxllm.errors import SettingsError
from jaxllm.optim.config import HYPERPARAMETERS, OptimConfig
from jaxllm.optim.schedules import make_schedule
from jaxllm.weights.axes import Axes, is_linear_map, is_matrix, sides

AxesByPath = dict[str, Axes]


def make_optimizer(config: OptimConfig, steps: int, axes) -> optax.GradientTransformation:
    """The optimizer for a tree of weights whose logical axes are `axes` (a tree of tuples of names).

    Weights, gradients and moments are in the weights' own shapes; `update` needs the weights as its third argument.
    Weight decay is decoupled and times the learning rate (Loshchilov & Hutter 2019, as in PyTorch).
    Raises SettingsError for an unknown name or a schedule that does not fit into `steps`.
    """
    by_path = tree.flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
    parts = [
        optax.clip_by_global_norm(config.clip) if config.clip is not None else None,
        _lookup(config.name)(config, by_path),
        optax.add_decayed_weights(config.weight_decay, mask=_by_path(by_path, is_matrix)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    return optax.chain(*(part for part in parts if part is not None))


def adamw(config: OptimConfig, axes: AxesByPath) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019)."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def lion(config: OptimConfig, axes: AxesByPath) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum; wants a 3 to 10 times smaller lr."""
    return optax.scale_by_lion(config.b1, config.b2)


def sgd(config: OptimConfig, axes: AxesByPath) -> optax.GradientTransformation:
    """Stochastic gradient descent with heavy-ball momentum."""
    return optax.trace(config.momentum)


def adafactor(config: OptimConfig, axes: AxesByPath) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018): second moments of matrices kept as rows and columns, updates clipped at RMS 1.

    The learning rate is absolute, not relative to the weights' scale (as in Zhai et al. 2022), so that a schedule
    means the same for all optimizers. Matrices with a side under 128 are not factored.
    """
    direction = optax.chain(optax.scale_by_factored_rms(epsilon=config.eps), optax.clip_by_block_rms(1.0))
    average = optax.ema(config.momentum, debias=False) if config.momentum else optax.identity()
    return optax.chain(_each_matrix(direction, axes), average)


def muon(config: OptimConfig, axes: AxesByPath) -> optax.GradientTransformation:
    """Muon for the hidden matrices, Adam for embeddings, head, router and vectors.

    Momentum is orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), each layer and expert by itself, then
    scaled by 0.2 * sqrt(max(inputs, outputs)), which gives it the RMS of an Adam update, so that one learning rate
    and one weight decay serve both parts (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).
    """
    numbers = _by_path(axes, lambda names: MuonDimensionNumbers(*sides(names)[1:]))
    directions = {
        "muon": optax.chain(
            scale_by_muon(beta=config.momentum, eps=config.eps, weight_dimension_numbers=numbers),
            _match_adam_rms(axes),
        ),
        "adam": optax.scale_by_adam(config.b1, config.b2, config.eps),
    }
    return optax.partition(directions, _by_path(axes, lambda names: "muon" if is_linear_map(names) else "adam"))


#: `{name: direction}`; the names and settings are those of `config.HYPERPARAMETERS`.
OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "muon": muon, "sgd": sgd}
assert OPTIMIZERS.keys() == HYPERPARAMETERS.keys()


def _lookup(name: str) -> Callable[[OptimConfig, AxesByPath], optax.GradientTransformation]:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"optim.name={name}: {error}; write it as package.module:NAME") from None


def _by_path(axes: AxesByPath, f: Callable[[Axes], object]) -> Callable:
    """A function from a tree of weights, some of them None or masked, to the tree of `f(axes of the weight)`."""
    return lambda weights: tree.map_with_path(lambda path, _: f(axes[path]), weights)


def _match_adam_rms(axes: AxesByPath) -> optax.GradientTransformation:
    def scale(path, update):
        return update * (0.2 * max(sides(axes[path]).fans(update)) ** 0.5)

    return optax.stateless(lambda updates, _: tree.map_with_path(scale, updates))


def _each_matrix(tx: optax.GradientTransformation, axes: AxesByPath) -> optax.GradientTransformation:
    """Runs `tx` on each layer's and each expert's weight by itself, matrices flattened to (inputs, outputs).

    Without it Adafactor would factor (layers, embed, heads, head) over the wrong pair of axes, or not at all, and
    clip all layers by their common RMS.
    """

    def flat(path, *weights):
        side = sides(axes[path])
        if not side.outputs:
            return weights
        return [w.reshape(math.prod(w.shape[: len(side.inputs)]), -1) for w in weights]

    def init_one(path, weight):
        return _unstacked(lambda w: tx.init(*flat(path, w)), axes[path])(weight)

    def update_one(path, update, state, weight):
        def one(update, state, weight):
            flat_update, flat_weight = flat(path, update, weight)
            out, new = tx.update(flat_update, state, flat_weight)
            return out.reshape(update.shape), new

        return _unstacked(one, axes[path])(update, state, weight)

    def update(updates, state, weights):
        pairs = tree.map_with_path(update_one, updates, state, weights)
        treedef = jax.tree.structure(updates)
        pairs = treedef.flatten_up_to(pairs)
        return treedef.unflatten(out for out, _ in pairs), treedef.unflatten(new for _, new in pairs)

    return optax.GradientTransformation(lambda weights: tree.map_with_path(init_one, weights), update)


def _unstacked(f: Callable, axes: Axes) -> Callable:
    """`f` mapped over the stacking axes of its arguments."""
    for _ in sides(axes).stack:
        f = jax.vmap(f)
    return f
