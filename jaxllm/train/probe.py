"""The one program of the self-check: an objective and its gradient on short rows, beside the loss reckoned by itself.

Shapes: B row, T position of a short row, D embed, V vocab, K targets that are reckoned with.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.data.batch import TokenBatch
from jaxllm.model.build import Model, Params
from jaxllm.train.rows import Objective, gradients
from jaxllm.train.step import compiler_options, traced_on

#: Targets of a row that are reckoned with at most.
KEPT = 32
#: Weights of a model of which a CPU computes short rows at once, so that the compiler need not optimise: half its time.
SMALL = 1 << 20

#: `plain(sharding, logits_BKV, picked)`: the loss of the targets in `picked`, a batch of K positions; see `plain.py`.
Plain = Callable[[Any, jax.Array, TokenBatch], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A question: rows, and what is differentiated."""

    batch: TokenBatch
    router_B: Any
    """float32: weight of the experts' own losses; 1 as in training."""
    plain_B: Any
    """float32: so much of the loss reckoned by itself is taken off before the gradient."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Sums over the rows, and of the gradient by each trainable array what can be compared."""

    sums: dict[str, float]
    """`count`, the objective's `loss` and its metrics; of the loss reckoned by itself `plain`, `z`, `router`."""
    prints: dict[str, np.ndarray]
    """The squared norm, and the sum under fixed signs: `[2]`, or `[2, periods]` where layers are stacked."""

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(found[0].sum()) for found in self.prints.values()))

    def apart(self, other: "Answer") -> float:
        """How far two gradients are apart, as a share of this one's norm."""
        squares = sum(float(np.sum((a[1] - other.prints[path][1]) ** 2)) for path, a in self.prints.items())
        return math.sqrt(squares) / max(self.norm, 1e-30)


@dataclasses.dataclass(frozen=True)
class Watched(Model):
    """The model, which keeps what it gave and weighs the experts' losses."""

    router_B: Any = None
    seen: list = dataclasses.field(default_factory=list)

    def apply(self, *args, **kwargs):
        hidden_BTD, cache, aux = super().apply(*args, **kwargs)
        self.seen.append((hidden_BTD, aux))
        return hidden_BTD, cache, (aux | {"loss_B": self.router_B * aux["loss_B"]} if aux else aux)


def make_ask(model: Model, objective: Objective, plain: Plain, trainable: str) -> Callable[[Params, Probe], Answer]:
    """`ask(params, probe)`, by way of `rows.gradients` as a step is; the same answer in every process."""

    def ask(params, probe):
        chosen, frozen = tree.partition(params, tree.select(params, trainable))
        question = _question(objective, plain)
        (_, (count, sums)), grads = gradients(model, question, chosen, frozen, probe, None, 1)
        prints = {path: _print(path, g, model.config.periods) for path, g in tree.flatten(grads).items()}
        return sums | {"count": count}, prints

    options = compiler_options(model.sharding)
    if model.sharding.platform == "cpu" and tree.count(model.abstract) < SMALL:
        options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(traced_on(model, ask), out_shardings=model.sharding.replicated(), compiler_options=options)

    def answer(params: Params, probe: Probe) -> Answer:
        sums, prints = jax.device_get(compiled(params, probe))
        return Answer({name: float(value) for name, value in sums.items()}, prints)

    return answer


def _question(objective: Objective, plain: Plain) -> Objective:
    kinds = [field.name for field in dataclasses.fields(Model)]

    def question(model: Model, params, probe: Probe, key):
        watched = Watched(**{name: getattr(model, name) for name in kinds}, router_B=probe.router_B)
        loss, count, metrics = objective(watched, params, probe.batch, key)
        ((hidden_BTD, aux),) = watched.seen
        learnt_BT = (probe.batch.mask_BT > 0).astype(jnp.float32)
        places_BK = jax.lax.top_k(learnt_BT, min(KEPT, learnt_BT.shape[1]))[1]
        logits_BKV = model.unembed(model.whole_head(model.head(params)), _at(hidden_BTD, places_BK))
        main, z = plain(model.sharding, logits_BKV, jax.tree.map(lambda x: _at(x, places_BK), probe.batch))
        router = jnp.zeros(())
        if "balance" in metrics:
            router = jnp.sum(jnp.sum(probe.batch.mask_BT, axis=1) * probe.router_B * _router_loss(model, aux))
        sums = {name: value for name, value in metrics.items() if name != "load"}
        sums |= {"loss": loss, "plain": main, "z": z, "router": router}
        return loss - probe.plain_B[0] * (main + z + router), count, sums

    return question


def _at(x, places_BK):
    return jnp.take_along_axis(x, places_BK.reshape(*places_BK.shape, *[1] * (x.ndim - 2)), axis=1)


def _router_loss(model: Model, aux):
    """`[B]`: the experts' losses by their settings, where these are the same in all layers."""
    specs = [spec.moe for spec in model.config.layer_specs if spec.moe is not None]
    if len({(spec.balance, spec.balance_coef, spec.z_coef) for spec in specs}) > 1:
        return aux["loss_B"]
    return len(specs) * (balance_coef(specs[0]) * aux["balance_B"] + specs[0].z_coef * aux["router_z_B"])


def balance_coef(spec) -> float:
    """Weight of the loss that balances the experts of a layer, 0 where there is none."""
    if spec.balance not in ("sequence", "batch"):
        return 0.0
    return 0.01 if spec.balance_coef is None else spec.balance_coef


def _print(path: str, g, periods: int):
    stacked = path.startswith("layers/") and g.ndim > 1 and g.shape[0] == periods
    g, axes, place = g.astype(jnp.float32), tuple(range(int(stacked), g.ndim)), jnp.zeros(g.shape, jnp.uint32)
    for axis in range(g.ndim):  # a hash of the place of each number (multipliers of xxHash and Knuth)
        place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, g.shape, axis)) * jnp.uint32(2654435761)
        place = (place ^ (place >> 15)) * jnp.uint32(2246822519)
    sign = jnp.where(place >> 31, 1.0, -1.0)
    return jnp.stack([jnp.sum(g * g, axis=axes), jnp.sum(g * sign, axis=axes)])
