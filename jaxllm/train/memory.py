"""Will it fit? Bytes a device needs for the state, before anything is made, and for the compiled step."""

import jax
import jax.numpy as jnp
import psutil

from jaxllm import tree
from jaxllm.errors import ResourceError
from jaxllm.model.spec import ModelConfig

STEP_ADVICE = "raise train.accumulate, set model.remat=full, or lower train.batch or train.seq_len"


def device_bytes(abstract) -> int:
    """Bytes of the fullest device for a tree of shapes with shardings (none means replicated)."""

    def one(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        size = leaf.dtype.itemsize
        for dim in shape:
            size *= dim
        return size

    return sum(map(one, jax.tree.leaves(abstract)))


def available() -> int | None:
    """Bytes a device can still take, or None where it does not say; CPU devices share the host's memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def check_state(state, trainable: str = "**") -> None:
    """Raises ResourceError when a training state (shapes) and the gradients of its trainable weights cannot fit."""
    chosen, _ = tree.partition(state.params, tree.select(state.params, trainable))
    parts = {
        "weights": device_bytes(state.params),
        "gradients": device_bytes(chosen),
        "optimizer": device_bytes(state.opt),
    }
    if "ema" in state.extra:
        parts["averaged weights"] = device_bytes(state.extra["ema"])
    _check(parts, "lower model.embed or model.layers, raise parallel.fsdp, or use optim.name=adafactor")


def check_rows(config: ModelConfig, tokens: int) -> None:
    """Raises ResourceError where not even each layer's input fits for the backward pass of so many tokens on a device.

    Known at once, where compiling a step that is far too large takes minutes before `check_step` can say so.
    """
    need = tokens * config.embed * config.layers * jnp.dtype(config.dtype).itemsize
    _check({f"the layers' inputs alone for {tokens:,} tokens": need}, STEP_ADVICE)


def check_step(compiled) -> None:
    """Raises ResourceError when the compiled step's temporaries cannot fit beside the state, which exists already."""
    analysis = compiled.memory_analysis()
    if analysis is not None:
        fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        parts = {"activations and other temporaries": analysis.temp_size_in_bytes, "outputs": max(0, fresh)}
        _check(parts, STEP_ADVICE)


def _check(parts: dict[str, int], advice: str) -> None:
    need, have = sum(parts.values()), available()
    if have is not None and need > have:
        listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
        raise ResourceError(f"too little memory: a device needs {size(need)} ({listed}) and has {size(have)}; {advice}")


def size(count: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
