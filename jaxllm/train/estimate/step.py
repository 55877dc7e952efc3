"""The real training step of a run as shapes: what `jaxllm train` would compile, for devices that need not be there."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding

from jaxllm.adapt.changes import Changes, after, trainable
from jaxllm.data.batch import TokenBatch
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.model.build import Model, build
from jaxllm.objectives.distill import distill
from jaxllm.objectives.dpo import dpo
from jaxllm.objectives.lm import lm
from jaxllm.optim.optimizers import make_optimizer
from jaxllm.sharding import MESH_AXES, RULES, ParallelConfig, Sharding, _sizes, make_sharding
from jaxllm.train.config import RunConfig, Stage
from jaxllm.train.init import check_trainable, origin_of
from jaxllm.train.loop import check_batch, check_kernels
from jaxllm.train.step import TrainState, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step whose arrays are shapes with shardings."""

    config: RunConfig
    stage: Stage
    model: Model
    trainable: str
    """Pattern over the paths of the weights that train."""
    tx: optax.GradientTransformation
    state: TrainState
    batch: TokenBatch
    objective: Callable

    @property
    def sharding(self) -> Sharding:
        return self.model.sharding

    def lower(self) -> jax.stages.Lowered:
        """The step that the training loop jits, with the same arguments. Only of a step made by `make_step`."""
        train = self.config.train
        options = dict(trainable=self.trainable, accumulate=train.accumulate, ema=train.ema, abstract=self.state)
        options |= dict(skip_spikes=train.skip_spikes)
        return make_train_step(self.model, self.objective, self.tx, **options).lower(self.state, self.batch)


def make_step(config: RunConfig, devices: list) -> Step:
    """The step of a run on these devices. Raises SettingsError as the run would, before any text is read."""
    return _step(config, make_sharding(config.parallel, devices))


def describe(config: RunConfig, devices: int, slices: int = 1) -> Step:
    """The same on a mesh of so many devices without the devices: shapes and shardings, nothing to compile."""
    return _step(config, abstract_sharding(config.parallel, devices, slices))


def varied(step: Step, config: RunConfig) -> Step:
    """The step of settings that leave its state as it is: other rematerialisation, microbatches or dtype.

    Raises SettingsError for microbatches that do not divide over the devices.
    """
    _check_batches(config, step.sharding)
    model = dataclasses.replace(step.model.config, remat=config.model.remat, dtype=config.model.dtype)
    return dataclasses.replace(step, config=config, model=dataclasses.replace(step.model, config=model))


def abstract_sharding(parallel: ParallelConfig, devices: int, slices: int = 1) -> Sharding:
    """Mesh and rules by numbers alone. Raises SettingsError for a mesh that does not fit or that wastes devices."""
    sizes = dict(zip(MESH_AXES, _mesh_sizes(parallel, devices), strict=True))
    if sizes["data"] % slices:
        raise SettingsError(
            f"parallel.data={sizes['data']} does not divide over {slices} slices; use a multiple of {slices}"
        )
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    return Sharding(mesh, tuple((RULES | parallel.rules).items()))


def _mesh_sizes(parallel: ParallelConfig, devices: int) -> tuple[int, ...]:
    asked = [getattr(parallel, axis) for axis in MESH_AXES]
    used = 1
    for size in asked:
        used *= max(size, 1)
    if -1 not in asked and min(asked) >= 1 and used < devices:
        sizes = " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, asked, strict=True) if n > 1) or "of size 1"
        raise SettingsError(
            f"the mesh {sizes} has {used} of the {devices} devices, and {devices - used} would be wasted; "
            f"set parallel.fsdp=-1, which takes what is left, or plan for {used} devices"
        )
    return _sizes(parallel, devices)


def _step(config: RunConfig, sharding: Sharding) -> Step:
    stage = longest(config)
    _check_batches(config, sharding)
    check_kernels(config.kernels, config.model, sharding)
    changes = changes_of(config)
    model = after(build(stage.model(config.model), sharding, config.kernels), changes)
    pattern = trainable(config.train.trainable, changes)
    check_trainable(model, pattern)
    tx = make_optimizer(config.optim, config.train.total_steps, model.axes)
    kept = dict(ema=config.train.ema is not None, skip_spikes=config.train.skip_spikes is not None)
    state = abstract_state(model, tx, trainable=pattern, **kept)
    objective, names = _objective(config)
    return Step(config, stage, model, pattern, tx, state, _batch(config, stage, sharding, names), objective)


def _check_batches(config: RunConfig, sharding: Sharding) -> None:
    for stage in config.train.resolved_stages:
        check_batch(stage, config.train.accumulate, sharding)


def longest(config: RunConfig) -> Stage:
    """The stage to plan for: that of the most tokens in a step, of the longest rows among equals."""
    return max(config.train.resolved_stages, key=lambda stage: (stage.batch * stage.seq_len, stage.seq_len))


def changes_of(config: RunConfig) -> Changes:
    """What the weights have been through by the first step; of a `train.init` that is not there, what the run adds."""
    try:
        return origin_of(config.train.init, config.changes).changes
    except CheckpointError:
        return config.changes


def _objective(config: RunConfig):
    """`(objective, what its batch holds beside tokens)`; see `train/method.py`."""
    if config.dpo is not None:
        return functools.partial(dpo, config=config.dpo), ("reference",)
    if config.distill is not None:
        return functools.partial(distill, config=config.distill), ("top",)
    return functools.partial(lm, z_loss=config.train.z_loss, neftune=config.train.neftune), ()


def _batch(config: RunConfig, stage: Stage, sharding: Sharding, names) -> TokenBatch:
    def rows(dtype, *more: int):
        shape = (stage.batch, stage.seq_len, *more)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.mesh, sharding.rows_spec(len(shape))))

    more = {"reference_BT": rows(jnp.float32)} if "reference" in names else {}
    if "top" in names:
        count = min(config.distill.top_k, config.model.vocab)
        more = {"top_ids_BTN": rows(jnp.int32, count), "top_logprobs_BTN": rows(jnp.float32, count)}
    return TokenBatch(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32), rows(jnp.int32), rows(jnp.int32), **more)
