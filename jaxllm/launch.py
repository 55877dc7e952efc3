"""Starts the process again, once, with a better allocator for XLA on CPU; a process cannot change its own.

XLA allocates the temporaries of every step anew. With 4 KiB pages a step of a small model spends a sixth of its time
in page faults; `glibc.malloc.hugetlb=1` lets malloc ask for huge pages (transparent huge pages by madvise), at no
cost in memory. Two arenas for all threads, where glibc would make eight a core, keep what a long run holds where it is:
arenas grow apart, by 1 to 3 % in 2,000 steps of a small run. A step takes as long; with one arena it takes 3 % longer.
Nothing is changed without glibc or where a run is not on CPU, and no pages are asked for where the kernel gives them to
all or to none.
"""

import importlib.metadata
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
FEW_ARENAS = {"glibc.malloc.arena_max": "2"}
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")


#: What `--cpu-fast` adds: no memory goes back to the kernel between steps, so that none has to be cleared anew, which
#: can double the peak; and products with what surrounds them as single primitives of oneDNN.
FAST_TUNABLES = {
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": "9000000000",
    "glibc.malloc.top_pad": "268435456",
    "glibc.malloc.arena_max": "1",
}
FAST_XLA = {"--xla_cpu_use_onednn": "true", "--xla_cpu_experimental_onednn_fusion_type": "dot,eltwise"}
#: The first jaxlib whose oneDNN fusions compile on every processor tried; 0.10 fails on AMD ones.
FAST_JAXLIB = (0, 12)


def wanted(environ: Mapping[str, str], fast: bool = False) -> bool:
    """Whether starting again would change anything; a user's own choices stand."""
    return environment(environ, fast) != dict(environ)


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


def environment(environ: Mapping[str, str], fast: bool = False) -> dict[str, str]:
    """The variables for a process that trains on CPU: `environ`, with what helps there added.

    fast: what `--cpu-fast` asks for, beside huge pages.
    """
    if SWITCH in environ or not _on_cpu(environ):
        return dict(environ)
    out, glibc = dict(environ), _glibc() >= (2, 35)
    pages = {HUGE_PAGES: "1"} if glibc and _pages_on_request() else {}
    _add(out, TUNABLES, ":", pages | (FEW_ARENAS if glibc else {}) | (FAST_TUNABLES if fast and glibc else {}))
    if fast and jaxlib() >= FAST_JAXLIB:
        _add(out, "XLA_FLAGS", " ", FAST_XLA)
    return out if out == dict(environ) else out | {SWITCH: "1"}


def _slow(environ: Mapping[str, str]) -> str | None:
    """What of `--cpu-fast` cannot be had, and why."""
    if SWITCH in environ:
        return f"turned off by {SWITCH}={environ[SWITCH]}"
    if not _on_cpu(environ):
        return "for training on CPU, which this is not"
    if jaxlib() < FAST_JAXLIB:
        return "no oneDNN fusions, which jaxlib before 0.12 cannot compile on every processor (0.12 needs Python 3.12)"
    return None


def _add(environ: dict[str, str], name: str, between: str, settings: Mapping[str, str]) -> None:
    """Settings that a variable does not name yet, after those that it does."""
    own = environ.get(name, "")
    new = [f"{key}={value}" for key, value in settings.items() if key not in own]
    if new:
        environ[name] = between.join([own, *new] if own else new)


def jaxlib() -> tuple[int, ...]:
    """Its version without loading it."""
    return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def relaunch(argv: list[str], level: int = logging.INFO, fast: bool = False) -> None:
    """Replaces this process by the same command with a better allocator, or returns when there is no need.

    Says so in one line of the log, at `level`. Returns also when `argv` is not this process's own: a program that calls
    the command line is not ours to replace.
    """
    if argv != sys.argv[1:]:
        return
    new = environment(os.environ, fast)
    changed = [f"{name}={new[name]}" for name in (TUNABLES, "XLA_FLAGS") if new.get(name) != os.environ.get(name)]
    if fast and os.environ.get(SWITCH) != "1":
        level = logging.INFO
        if why := _slow(os.environ):
            log.info("jaxllm: --cpu-fast: %s", why)
    if not changed:
        return
    what = "fast allocator" if fast else "allocator for CPU"
    log.log(level, "jaxllm: %s (%s; %s=0 turns this off)", what, ", ".join(changed), SWITCH)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], new)
