"""Starts the process again, once, with a better allocator for XLA on CPU; a process cannot change its own.

XLA allocates the temporaries of every step anew. With 4 KiB pages a step of a small model spends a sixth of its time
in page faults; `glibc.malloc.hugetlb=1` lets malloc ask for huge pages (transparent huge pages by madvise), at no
cost in memory. It does nothing where glibc, madvise or the CPU backend is not what the run uses.
"""

import os
import platform
import sys
from pathlib import Path

#: Set to 0 to start as you are; set to 1 by the launcher in the process that it starts.
SWITCH = "JAXLLM_LAUNCH"
TUNABLE = "glibc.malloc.hugetlb=1"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def wanted(environ) -> bool:
    """Whether starting again would change anything; a user's own GLIBC_TUNABLES are kept as they are."""
    if SWITCH in environ or "GLIBC_TUNABLES" in environ:
        return False
    if not environ.get("JAX_PLATFORMS", "cpu").startswith("cpu") or _has_accelerator():
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or _glibc() < (2, 35):
        return False
    try:
        return "[never]" not in THP.read_text()
    except OSError:
        return False


def _glibc() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.libc_ver()[1].split(".") if part.isdigit())


def _has_accelerator() -> bool:
    """A guess without loading jax: TPU and NVIDIA device files."""
    return any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0"))


def relaunch(argv: list[str]) -> None:
    """Replaces this process by `python -m jaxllm.cli ARGV` with the tunable set, or returns when there is no need."""
    if not wanted(os.environ):
        return
    print(
        f"jaxllm: huge pages for the allocator (GLIBC_TUNABLES={TUNABLE}; {SWITCH}=0 turns this off)", file=sys.stderr
    )
    environ = os.environ | {SWITCH: "1", "GLIBC_TUNABLES": TUNABLE}
    os.execve(sys.executable, [sys.executable, "-m", "jaxllm.cli", *argv], environ)
