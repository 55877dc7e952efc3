"""The backend that a program is traced for: that of the mesh, which need not be the one of this process.

Programs for TPUs are compiled on machines that have none, so `jax.default_backend()` is the wrong question there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """`cpu`, `tpu` or `gpu`: where what is being traced will run."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """Within it `platform()` is this one."""
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)
