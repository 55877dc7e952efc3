"""The backend that a program is traced for: that of the mesh, which need not be the one of this process.

Programs for TPUs are compiled on machines that have none, so `jax.default_backend()` is the wrong question there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[tuple[str, int | None] | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """`cpu`, `tpu` or `gpu`: where what is being traced will run."""
    target = _target.get()
    return target[0] if target else jax.default_backend()


def alone() -> bool:
    """Whether a device computes what is being traced by itself, so that it may be a kernel, which XLA cannot split.

    False where that is not known: a program for other devices than those of this process, out of `jax.shard_map`.
    """
    mesh, target = jax.sharding.get_abstract_mesh(), _target.get()
    if not mesh.empty:
        return len(mesh.manual_axes) == len(mesh.axis_names)
    if target and (target[1] or target[0] != jax.default_backend()):
        return target[1] == 1
    return jax.device_count() == 1


@contextlib.contextmanager
def tracing_for(name: str, devices: int | None = None) -> Iterator[None]:
    """Within it `platform()` is this one; `devices`: over how many arrays are spread, if known."""
    token = _target.set((name, devices))
    try:
        yield
    finally:
        _target.reset(token)
