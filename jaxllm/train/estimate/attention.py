"""FLOPs of attention by its kernel: which one computes it, the pairs it multiplies, and what is computed again."""

import dataclasses
import types
from collections.abc import Iterator

import jax
import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.kernels import attention as rules
from jaxllm.kernels.backend import tracing_for
from jaxllm.kernels.reference import Form, PerHead, Where
from jaxllm.kernels.splash import BLOCK, LANES, fits
from jaxllm.model.layer import AttnSpec
from jaxllm.train.estimate.parts import is_unrolled, kept_names, tokens_of, ways
from jaxllm.train.estimate.step import Step

#: Kernels of attention that only one backend has.
BACKEND = {"splash": "tpu", "cudnn": "gpu"}


@dataclasses.dataclass(frozen=True)
class Attention:
    """FLOPs of attention in all layers of one kind, and how often the forward pass is computed again."""

    forward: float
    backward: float
    again: float


def attentions(step: Step, platform: str) -> Iterator[Attention]:
    """The attention of each layer."""
    config, sharding, length = step.model.config, step.sharding, step.stage.seq_len
    kept, unrolled, parts = kept_names(config), is_unrolled(step, platform), sharding.mesh.shape["context"]
    for attn in (spec.attn for spec in config.layer_specs):
        kind, qk, v = kernel_of(step, attn, platform), config.qk_dim(attn), config.v_dim(attn)
        heads = tokens_of(step) * parts / length * attn.heads / ways(sharding, ("heads",))  # of all rows of a device
        pairs = 2 * heads * pairs_of(kind, length, attn.window, parts)
        backward = {"reference": 2 * qk + 2 * v, "splash": 4 * qk + 3 * v}.get(kind, 3 * qk + 2 * v)
        if kind == "blockwise" and kept is None and unrolled:
            backward -= qk  # the logits of both passes are one
        yield Attention(pairs * (qk + v), pairs * backward, _forward_again(kind, kept, unrolled, qk, v))


def _forward_again(kind: str, kept: set[str] | None, unrolled: bool, qk: int, v: int) -> float:
    """How much of the forward pass is computed again, beside what the backward pass does by itself."""
    if kept is None or (unrolled and {"q", "k", "v"} <= kept):
        return 0.0
    if "attention" in kept:
        return qk / (qk + v) if kind == "reference" else 0.0  # its probabilities are not kept
    return v / (qk + v) if kind in ("blockwise", "ring") else 1.0  # their backward pass computes the logits anyway


def kernel_of(step: Step, attn: AttnSpec, platform: str) -> str:
    """The kernel that computes attention, by the rules of `kernels/attention.py`. Raises SettingsError as those do.

    A GPU that is not there is taken as one of compute capability 9.0 or later.
    """
    kernels, parts = step.config.kernels, step.sharding.mesh.shape["context"]
    kind, length = kernels.attention, step.stage.seq_len
    if BACKEND.get(kind, platform) != platform:
        raise SettingsError(
            f"kernels.attention={kind} is for {BACKEND[kind].upper()}, and this plan is for {platform.upper()}; "
            "set kernels.attention=auto"
        )
    called = _called(step, attn)
    if parts > 1:
        return _across(kind, kernels.context == "ring", called[-2], length, parts, platform)
    with tracing_for(platform):
        if kind == "auto":
            return rules._best(*called)[0]
        rules._check(kind, *called)
    return kind


def _called(step: Step, attn: AttnSpec) -> tuple:
    """What `kernels.attention.attention` is called with, as shapes, on a device that need not be there."""
    config, T, B = step.model.config, step.stage.seq_len, step.stage.batch
    q_BTNH = jax.ShapeDtypeStruct((B, T, attn.heads, config.qk_dim(attn)), config.dtype)
    v_BKSH = jax.ShapeDtypeStruct((B, attn.kv_heads or attn.heads, T, config.v_dim(attn)), config.dtype)
    tokens_BT, number_N = jax.ShapeDtypeStruct((B, T), "int32"), jax.ShapeDtypeStruct((attn.heads,), "float32")
    heads = PerHead(number_N if attn.alibi else None, number_N if attn.sinks else None)
    absent = types.SimpleNamespace(shape={"context": 1}, devices=np.array([None]))
    form, where = Form(1.0, attn.window, attn.softcap), Where(*[tokens_BT] * 4)
    return q_BTNH, v_BKSH, form, where, heads, types.SimpleNamespace(mesh=absent)


def _across(kind: str, in_ring: bool, heads: PerHead, length: int, parts: int, platform: str) -> str:
    """The same where devices hold parts of a row each."""
    if in_ring:
        if kind not in ("auto", "blockwise"):
            raise SettingsError(f"kernels.attention={kind}: ring attention is blockwise; set it to auto")
        return "ring"
    if kind == "cudnn":
        raise SettingsError(f"kernels.attention=cudnn needs whole rows, and parallel.context={parts} splits them")
    missing = rules._splash_lacks(heads)
    if not missing and not fits(length, parts):
        missing = f"rows of {length} tokens in {2 * parts} pieces"
    if kind == "splash" and missing:
        raise SettingsError(f"kernels.attention=splash: {missing}; set it to auto")
    if kind == "reference":
        return kind
    return "splash" if platform == "tpu" and kind != "blockwise" and not missing else "blockwise"


def pairs_of(kind: str, length: int, window: int | None, parts: int = 1) -> float:
    """Pairs of query and key that a kernel multiplies for a head of a row, on each of `parts` devices that share it."""
    if kind == "splash":
        run = -(-length // LANES) * LANES if parts == 1 else length // (2 * parts)
        size = next(n for n in range(min(BLOCK, run), 0, -LANES) if run % n == 0)
        n, reach = -(-length // size), length if window is None else window
        # Block (i, j) is read where its nearest pair, (i - j) * size - (size - 1) apart, is within the window.
        return size**2 * sum(1 for i in range(n) for j in range(i + 1) if (i - j) * size - size + 1 < reach) / parts
    if kind == "ring":
        own, half = length // parts, length % (2 * parts) == 0
        return _chunked(own, window) + (parts - 1) * own**2 / (2 if half else 1)
    if kind == "blockwise" and parts == 1:
        return _chunked(length, window)
    if kind == "cudnn":
        w = min(window or length, length)
        return w * (length - w / 2)
    return length**2 / parts


def _chunked(length: int, window: int | None) -> float:
    """`kernels/blockwise.py`: 128 queries at a time, or a sixteenth of them, against the keys that they can see."""
    size, pairs = max(128, -(-length // 16)), 0
    for start in range(0, length, size):
        end = min(start + size, length)
        pairs += (end - start) * (end - (0 if window is None else max(0, start - window + 1)))
    return pairs


def kernel_flops(step: Step, name: str) -> float | None:
    """FLOPs of one run of a Pallas kernel of attention, in the mean over the layers; None for another kernel.

    The kernels of splash attention declare none.
    """
    if "splash" not in name:
        return None
    config, length, parts = step.model.config, step.stage.seq_len, step.sharding.mesh.shape["context"]
    rows, found = tokens_of(step) * parts / step.config.train.accumulate / length, []
    for attn in (spec.attn for spec in config.layer_specs):
        qk, v = config.qk_dim(attn), config.v_dim(attn)
        products = 2 * qk + 2 * v if "_dkv" in name else 2 * qk + v if "_dq" in name else qk + v
        heads = attn.heads / ways(step.sharding, ("heads",))
        found.append(2 * rows * heads * products * pairs_of("splash", length, attn.window, parts))
    return sum(found) / len(found)
