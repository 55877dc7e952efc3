"""Will it fit? Bytes a device needs for the state, before anything is made, and for the compiled step.

What does not fit, and what runs out of memory all the same, becomes one error: a table of what a device holds, and
settings that would make it fit (`estimate/advice.py`).
"""

import contextlib
import re
import typing
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import psutil

from jaxllm import tree
from jaxllm.errors import ResourceError, UserError
from jaxllm.model.spec import ModelConfig
from jaxllm.sharding import make_sharding

if typing.TYPE_CHECKING:
    from jaxllm.train.config import RunConfig

STEP_ADVICE = "raise train.accumulate, set model.remat=full, or lower train.batch or train.seq_len"


#: What the TPU compiler writes where a program is too large: "Used 38.62G of 31.25G hbm", or "the total memory required
#: for HLO temporaries (38.62G) exceeds available HBM (31.25G)"; both count arguments, too.
USED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])")


class Shortage(ResourceError):
    """Too little memory on a device, in a line; `total` is what the compiler says that a step needs, where it does."""

    def __init__(self, text: str, advice: str, capacity: float | None, total: float | None = None):
        """`advice`: what helps in general, where nothing better is known."""
        super().__init__(f"{text}; {advice}")
        self.text, self.advice, self.capacity, self.total = text, advice, capacity, total


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
    if (total := program_bytes(compiled)) is not None:
        there = compiled.memory_analysis().argument_size_in_bytes
        _check({"activations and other temporaries": total - there}, STEP_ADVICE, there=there)


def program_bytes(compiled) -> int | None:
    """Bytes that a compiled program needs at once, arguments included; None where the compiler does not say.

    On TPU its peak: what is called temporaries there is a sum over buffers that take turns in the same place.
    """
    if (found := compiled.memory_analysis()) is None:
        return None
    if jax.default_backend() == "tpu" and (peak := getattr(found, "peak_memory_in_bytes", 0)):
        return peak
    fresh = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return found.argument_size_in_bytes + found.temp_size_in_bytes + fresh


def _check(parts: dict[str, int], advice: str, there: int | None = None) -> None:
    """`there`: bytes of what exists already, where `parts` are all that comes to it."""
    need, have = sum(parts.values()), available()
    if have is not None and need > have:
        listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
        text = f"too little memory: a device needs {size(need)} ({listed}) and has {size(have)}"
        raise Shortage(text, advice, have + (there or 0), None if there is None else need + there)


@contextlib.contextmanager
def explained(config: "RunConfig") -> Iterator[None]:
    """Too little memory within the block, found by a check or run into, is said with what is needed and what helps.

    Raises ResourceError in the place of Shortage, and of an error of XLA that says so.
    """
    room = available()
    try:
        yield
    except Shortage as error:
        capacity = room if error.capacity is None else error.capacity
        raise ResourceError(_with_advice(config, error.text, error.advice, capacity, error.total)) from error
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        total = used(str(error))
        raise ResourceError(_with_advice(config, _exhausted(error), STEP_ADVICE, room, total)) from error


@contextlib.contextmanager
def within_step() -> Iterator[None]:
    """Where a step is compiled or run. Raises Shortage for MemoryError, which on CPU is the device's as well."""
    try:
        yield
    except MemoryError as error:
        if jax.default_backend() != "cpu":
            raise
        raise Shortage(_exhausted(error), STEP_ADVICE, None) from error


def _exhausted(error: Exception) -> str:
    return f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]}"


def is_exhausted(error: Exception) -> bool:
    """Whether an error of XLA says that a device has no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error) or "bad_alloc" in str(error)


def used(text: str) -> float | None:
    """Bytes that the TPU compiler says a program would need, where it does not fit."""
    found = USED.search(text)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else None


def _with_advice(config: "RunConfig", text: str, advice: str, capacity: float | None, total: float | None) -> str:
    """The text with a table and settings that help; with `advice` where formulas do not know the run or the device."""
    from jaxllm.train.estimate.advice import Place, explain

    if capacity is None:
        return f"{text}; {advice}"
    place = Place(make_sharding(config.parallel).mesh.size, jax.default_backend(), capacity)
    try:
        return explain(config, text, place, total)
    except UserError:  # settings that the step itself refused would have been said before
        return f"{text}; {advice}"


def size(count: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
