"""A lowered step compiled for devices that need not be there, and what the compiler says where it does not fit."""

import dataclasses
import importlib.metadata
import time
from typing import Any

import jax

from jaxllm.plan.bounds import speed_of
from jaxllm.plan.program import Memory, Program, facts
from jaxllm.plan.target import Target
from jaxllm.train.memory import is_exhausted, used


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The program of a step; or none, where it would not fit."""

    program: Program | None
    seconds: float
    """Lowering and compiling."""
    needs: float | None = None
    """Bytes that the compiler says the program would need, where it does not fit."""

    def to_dict(self) -> dict[str, Any]:
        """How it was made, as plain values."""
        out = {"seconds": self.seconds, "fits": self.program is not None, "jax": jax.__version__}
        try:
            return out | {"libtpu": importlib.metadata.version("libtpu")}
        except importlib.metadata.PackageNotFoundError:
            return out


def compile_for(lower, mesh, target: Target) -> Compiled:
    """Facts of what `lower()` gives, compiled; too much memory is a result, anything else raises."""
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        return Compiled(None, time.perf_counter() - start, used(str(error)))
    seconds = time.perf_counter() - start
    return Compiled(facts(compiled, mesh, target.chip, speed_of(target, dict(mesh.shape))), seconds)


def needed(memory: Memory, platform: str) -> float:
    """Bytes that a program needs at once. On TPU temporaries are a sum of what takes turns; on CPU there is no peak."""
    return memory.peak if platform == "tpu" and memory.peak else memory.total


#: The share of a GPU's memory that jax takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise (docs/gpu.md).
GPU_SHARE = 0.75


def share_of(target: Target) -> str | None:
    """What is to be said of `memory_of`; None where devices have all of it."""
    if target.platform != "gpu":
        return None
    return f"jax takes {GPU_SHARE:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set"


def memory_of(target: Target) -> float | None:
    """Bytes of one device for programs; of a GPU jax's share; CPU devices share those of this machine."""
    if target.chip is not None:
        return target.chip.device.hbm * (GPU_SHARE if target.chip.gpu else 1)
    import psutil

    return psutil.virtual_memory().total / target.devices
