"""The training step: gradient of an objective, guard against non-finite values and spikes, update. One jitted function.

Shapes: A microbatches, B rows of a microbatch, T positions.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm import tree
from jaxllm.kernels.backend import tracing_for
from jaxllm.model.build import Model, Params
from jaxllm.optim.placement import like, owner_of
from jaxllm.sharding import Sharding
from jaxllm.train import spikes
from jaxllm.train.rows import Objective, gradients, sums

__all__ = ["Objective", "TrainState", "abstract_state", "make_eval_step", "make_state", "make_train_step"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; saved whole. The data position lives outside of jit."""

    step: jax.Array
    """Steps done, int32."""
    params: Params
    """Weights, float32 unless a weight type says otherwise."""
    opt: Any
    """Optimizer state of the trainable weights."""
    key: jax.Array
    """Root of all randomness; step n uses fold_in(key, n)."""
    extra: dict[str, Any]
    """`skipped`: steps skipped in all; `skipped_in_row`; when asked for `ema`: averaged weights, and `spikes`: see
    `spikes.fresh`."""


def make_state(
    model: Model,
    tx: optax.GradientTransformation,
    key,
    *,
    params=None,
    trainable="**",
    ema=False,
    skip_spikes=False,
) -> TrainState:
    """A fresh state, every array made where it will live.

    `params` defaults to new weights; the step donates its state, so weights given here are gone after the first one.
    """
    init_key, key = jax.random.split(key)
    params = model.init(init_key) if params is None else params
    shapes = abstract_state(model, tx, trainable=trainable, ema=ema, skip_spikes=skip_spikes)
    chosen, _ = tree.partition(params, tree.select(params, trainable))
    opt = jax.jit(tx.init, out_shardings=jax.tree.map(lambda s: s.sharding, shapes.opt))(chosen)
    everywhere = shapes.step.sharding  # a jit, since device_put reaches no devices of other processes
    counters, key = jax.jit(lambda key: ([jnp.int32(0)] * 3, key), out_shardings=everywhere)(key)
    extra = {"skipped": counters[0], "skipped_in_row": counters[1]}
    if ema:
        extra["ema"] = jax.tree.map(jnp.copy, chosen)
    if skip_spikes:
        extra["spikes"] = jax.jit(spikes.fresh, out_shardings=everywhere)()
    return TrainState(counters[2], params, opt, key, extra)


def abstract_state(
    model: Model, tx: optax.GradientTransformation, *, trainable="**", ema=False, skip_spikes=False
) -> TrainState:
    """Shapes, dtypes and shardings of `make_state`'s result; nothing is allocated.

    Optimizer state is split as the weight it belongs to; what belongs to none (counters) is replicated.
    """
    everywhere = model.sharding.replicated()
    chosen, _ = tree.partition(model.abstract, tree.select(model.abstract, trainable))
    weights = tree.flatten(chosen)

    def at(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def place(path, leaf):
        owner = owner_of(path, weights)
        return at(leaf, everywhere if owner is None else like(owner, leaf.shape))

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=everywhere)
    opt = tree.map_with_path(place, jax.eval_shape(tx.init, chosen))
    extra = {"skipped": count, "skipped_in_row": count} | ({"ema": chosen} if ema else {})
    if skip_spikes:
        extra["spikes"] = jax.tree.map(lambda leaf: at(leaf, everywhere), jax.eval_shape(spikes.fresh))
    return TrainState(count, model.abstract, opt, key, extra)


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    trainable: str = "**",
    accumulate: int = 1,
    ema: float | None = None,
    skip_spikes: float | None = None,
    abstract: TrainState | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, jitted, with the state donated.

    Args:
      trainable: pattern over weight paths; the others get no gradient and no optimizer state.
      accumulate: batch leaves are `[A * B, ...]`; rows are split into A microbatches whose sums are added.
      ema: decay of an average of the trainable weights, or None.
      skip_spikes: standard deviations above recent steps at which a gradient is skipped too (`spikes.limit`), or None.
      abstract: where the new state is to live (see `abstract_state`); None leaves it to the compiler, whose choice a
        step that was compiled for the old places would refuse.

    A step whose gradient is not finite, or a spike, changes neither weights, optimizer, average nor what is known of
    recent steps; it is counted in `extra`.
    """

    def step(state: TrainState, batch):
        mask = tree.select(state.params, trainable)
        chosen, frozen = tree.partition(state.params, mask)
        key = jax.random.fold_in(state.key, state.step)

        (loss, (count, metrics)), grads = gradients(model, objective, chosen, frozen, batch, key, accumulate)
        scale = 1 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        taken = jnp.isfinite(norm) & jnp.isfinite(loss)
        found = {}
        if skip_spikes is not None:
            found["grad_norm_limit"] = spikes.limit(state.extra["spikes"], skip_spikes)
            spike = taken & (norm > found["grad_norm_limit"])
            taken = taken & ~spike

        load = metrics.pop("load", {})

        def update(params, opt):
            updates, opt = tx.update(grads, opt, chosen)
            balanced = model.balance(tree.combine(optax.apply_updates(chosen, updates), frozen), load)
            return tree.combine(tree.partition(balanced, mask)[0], frozen), opt  # a frozen router bias stays, too

        # A branch, not a select: selecting makes XLA copy the whole optimizer state first.
        params, opt = jax.lax.cond(taken, update, lambda params, opt: (params, opt), state.params, state.opt)
        extra = _extra(state.extra, taken, ema, tree.partition(params, mask)[0])
        if skip_spikes is not None:
            extra["spikes"] = spikes.after(state.extra["spikes"], norm, taken, spike)
            found["skipped_spikes"] = extra["spikes"]["skipped"]
        out = {"loss": loss * scale, "grad_norm": norm, "targets": count}
        out |= {name: extra[name] for name in ("skipped", "skipped_in_row")} | found
        out |= {name: value * scale for name, value in metrics.items()}
        if load:
            out["expert_load_max"] = _worst_load(load)
        return TrainState(state.step + 1, params, opt, state.key, extra), out

    step = traced_on(model, step)
    where = None if abstract is None else (jax.tree.map(lambda leaf: leaf.sharding, abstract), None)
    return jax.jit(step, donate_argnums=0, out_shardings=where, compiler_options=compiler_options(model.sharding))


def _extra(extra, taken, decay, chosen):
    extra = dict(extra)
    extra["skipped"] = extra["skipped"] + ~taken
    extra["skipped_in_row"] = jnp.where(taken, 0, extra["skipped_in_row"] + 1)
    if decay is not None:
        rate = jnp.where(taken, 1 - decay, 0)  # a skipped step moves the average no more than the weights
        extra["ema"] = jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), extra["ema"], chosen)
    return extra


def _worst_load(load: dict[str, jax.Array]):
    """Largest share of an expert over its fair share, over all layers: 1 is balanced."""
    return jnp.max(jnp.stack([jnp.max(x / jnp.mean(x, axis=-1, keepdims=True)) for x in load.values()]))


def make_eval_step(model: Model, objective: Objective) -> Callable[[Params, Any], dict[str, jax.Array]]:
    """`evaluate(params, batch) -> {"loss": sum, "targets": count, ...}`: sums of one batch, without dropout."""

    def evaluate(params, batch):
        loss, count, metrics = sums(model, objective, params, batch, None)
        metrics.pop("load", None)
        return {"loss": loss, "targets": count} | metrics

    return jax.jit(traced_on(model, evaluate))


#: TPUs whose SparseCores can move data while the rest computes. Elsewhere gathers run beside products by themselves, as
#: on v5e, or not at all, as on v4.
SPARSE_CORES = r"TPU (v5p?|v6 lite|v6e)$|TPU ?7x$"


def compiler_options(sharding: Sharding) -> dict[str, bool] | None:
    """What libtpu is told so that the gathers and sums of fully sharded weights overlap compute."""
    if not re.search(SPARSE_CORES, sharding.mesh.devices.flat[0].device_kind) or sharding.mesh.size == 1:
        return None
    return {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in ("all_gather", "reduce_scatter")}


def traced_on(model: Model, f: Callable) -> Callable:
    """`f`, which knows while it is traced what the mesh of the model is made of, in its backward pass too."""

    @functools.wraps(f)
    def traced(*args):
        with tracing_for(model.sharding.platform):
            return f(*args)

    return traced
