"""Row 18: a long run with many saves neither grows nor collects threads and files."""

import dataclasses
import statistics
import time
from pathlib import Path

from jaxllm import launch
from jaxllm.verify.lab import PATIENCE, Found, Lab, last_step, leftovers

#: Steps in which a process takes what it needs: arenas of the allocator, pools of threads, what it compiles.
WARMUP = 200
#: Growth of the resident memory after them, as a share.
GROWTH = 0.02
#: Pools of threads reach their full size by and by; what leaks one a save has a hundred more.
POOLS = 5


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a process held after a step."""

    step: int
    resident: int
    threads: int
    files: int


def soak(lab: Lab) -> Found:
    """2,000 steps with a save each 20: memory after the first 200 steps, threads and open files stay as they are."""
    steps, out = lab.count(2000, 20000), lab.folder / "run"
    settings = lab.settings(
        out, train__steps=steps, checkpoint__every=20, log__every=10, data__heldout=0.1, train__eval_every=WARMUP // 2
    )
    samples = _watch(lab, settings, out)
    failures = [f"left behind: {name}" for name in leftovers(out)]
    if last_step(out) != steps:
        failures.append(f"the run ended at step {last_step(out)} of {steps}")
    figure, more = judge(samples, steps)
    return Found(len(samples), tuple(failures + more), figure)


def _watch(lab: Lab, settings: Path, out: Path) -> list[Sample]:
    import psutil

    samples, tunables = [], ":".join(f"{key}={value}" for key, value in launch.FEW_ARENAS.items())
    with lab.started(settings, env=lab.environ(GLIBC_TUNABLES=tunables)) as process:
        watched, deadline = psutil.Process(process.pid), time.monotonic() + 10 * PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with watched.oneshot():
                    held = watched.memory_info().rss, watched.num_threads(), watched.num_fds()
            except psutil.Error:  # it has just ended
                break
            samples.append(Sample(last_step(out), *held))
            time.sleep(0.05)
    return samples


def judge(samples: list[Sample], steps: int) -> tuple[str, list[str]]:
    """`(figure, failures)`: the tenth of the run after the warmup beside its last tenth.

    Of threads and files the least of a window: a save that is being written has some of its own.
    """
    part = max(WARMUP // 2, steps // 10)
    first = [one for one in samples if WARMUP <= one.step < WARMUP + part]
    last = [one for one in samples if steps - part <= one.step < steps]
    if not first or not last:
        return "no figure", [f"{len(first)} and {len(last)} looks at the first and the last {part} steps"]
    before, after = (statistics.median(one.resident for one in window) for window in (first, last))
    growth, failures = after / before - 1, []
    if growth >= GROWTH:
        failures.append(f"resident memory grew by {growth:.1%}: {before / 2**20:.1f} to {after / 2**20:.1f} MiB")
    for name in ("threads", "files"):
        few, more = (min(getattr(one, name) for one in window) for window in (first, last))
        if more > few + POOLS:
            failures.append(f"{few} {name} after {WARMUP} steps, {more} at the end")
    figure = f"{steps} steps, {steps // 20} saves: {before / 2**20:.0f} MiB, {growth:+.1%}"
    if not failures:
        figure += ", no more threads and files"
    return figure, failures
