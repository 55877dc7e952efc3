"""Starts the process again, once, with a better allocator for XLA on CPU; a process cannot change its own.

XLA allocates the temporaries of every step anew. With 4 KiB pages a step of a small model spends a sixth of its time
in page faults; `glibc.malloc.hugetlb=1` lets malloc ask for huge pages (transparent huge pages by madvise), at no
cost in memory. It does nothing where glibc, madvise or the CPU backend is not what the run uses.
"""

import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("jaxllm")
#: Set to 0 to start as you are; set to 1 by the launcher in the process that it starts.
SWITCH = "JAXLLM_LAUNCH"
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
TUNABLE = f"{HUGE_PAGES}=1"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether starting again would change anything; a user's own choice of huge pages stands."""
    if SWITCH in environ or HUGE_PAGES in environ.get(TUNABLES, ""):
        return False
    return _on_cpu(environ) and _glibc() >= (2, 35) and _pages_on_request()


def _on_cpu(environ) -> bool:
    """By the user's word, else by device files of TPU and NVIDIA: a guess without loading jax."""
    platforms = environ.get("JAX_PLATFORMS")
    return platforms.startswith("cpu") if platforms else not any(Path(path).exists() for path in ACCELERATORS)


def _glibc() -> tuple[int, ...]:
    """`(2, 39)`, or `()` where the C library is another one."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".") if part.isdigit()) if name == "glibc" else ()


def _pages_on_request() -> bool:
    """Whether the kernel gives huge pages to who asks: with `always` nobody has to, with `never` nobody gets them."""
    try:
        return "[madvise]" in THP.read_text()
    except OSError:
        return False


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that trains on CPU: `environ`, with huge pages added where that helps."""
    if not wanted(environ):
        return dict(environ)
    own = environ.get(TUNABLES)
    return {**environ, SWITCH: "1", TUNABLES: f"{own}:{TUNABLE}" if own else TUNABLE}


def relaunch(argv: list[str], level: int = logging.INFO) -> None:
    """Replaces this process by the same command with huge pages, or returns when there is no need.

    Says so in one line of the log, at `level`. Returns also when `argv` is not this process's own: a program that calls
    the command line is not ours to replace.
    """
    if argv != sys.argv[1:] or not wanted(os.environ):
        return
    log.log(level, "jaxllm: huge pages for the allocator (%s=%s; %s=0 turns this off)", TUNABLES, TUNABLE, SWITCH)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(os.environ))
