"""What formulas share: what a device has of tokens and weights, and what its program does with layers."""

import math

from jaxllm.kernels import lending
from jaxllm.kernels.backend import tracing_for
from jaxllm.kernels.experts import block_size, rows_needed
from jaxllm.model.layer import LayerSpec, MoeSpec
from jaxllm.model.spec import ModelConfig, remat_policy_names
from jaxllm.sharding import Sharding, names_of
from jaxllm.train.estimate.step import Step


def tokens_of(step: Step) -> float:
    """Tokens of a device in a step, over all microbatches."""
    sharding = step.sharding
    return step.stage.batch * step.stage.seq_len / sharding.ways(sharding.by_row)


def microbatch_tokens(step: Step) -> float:
    """Tokens of a device in a microbatch."""
    return tokens_of(step) / step.config.train.accumulate


def expert_rows(step: Step, moe: MoeSpec, platform: str) -> tuple[float, float]:
    """`(rows that there is room for, rows that are computed)` on a device in a microbatch, laid out by expert.

    Where experts are split, there is room for the rows of all devices. On CPU all of it is computed (kernels/experts).
    """
    own, parts = int(microbatch_tokens(step) * moe.experts_per_token), step.sharding.mesh.shape["expert"]
    if moe.capacity_factor is not None:
        own = math.ceil(own * moe.capacity_factor)
        return own, own
    with tracing_for(platform):
        block = block_size(own * parts, moe.experts)
        room = rows_needed(own * parts, moe.experts // parts + borrowed(step, moe), block)
    return room, room if block > 1 else own


def borrowed(step: Step, moe: MoeSpec) -> int:
    """Experts that a device has room for beside its own (`kernels.experts=lend`)."""
    lends = step.config.kernels.experts == "lend" and moe.capacity_factor is None
    return lending.slots(moe.experts, moe.experts // step.sharding.mesh.shape["expert"]) if lends else 0


def ways(sharding: Sharding, axes) -> int:
    """Into how many parts devices split a product beside its tokens: those that split rows gather its matrix."""
    split = sharding.activation(axes, [1 << 30] * len(axes))
    return sharding.ways([axis for axis in names_of(split) if axis not in sharding.by_row])


def slot_of(config: ModelConfig, group: str, slot: str) -> LayerSpec:
    """The layers whose weights are at `group/slot`."""
    return getattr(config, "pattern" if group == "layers" else group)[int(slot)]


def is_unrolled(step: Step, platform: str) -> bool:
    """Whether layers run one after another instead of in a scan; the compiler then finds what is computed twice."""
    unroll = step.config.kernels.unroll
    return step.model.config.layers <= (unroll if unroll is not None else 8 if platform == "cpu" else 0)


def kept_names(config: ModelConfig) -> set[str] | None:
    """The names of values that layers keep for the backward pass, or None where they keep all."""
    policy = remat_policy_names(config.remat)
    return None if policy is None else {name for names in policy for name in names}
