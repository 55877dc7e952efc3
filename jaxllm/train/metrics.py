"""What a training step costs and how fast it runs: FLOPs, MFU, tokens/s, peak memory; metrics read one step late."""

import collections
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from jaxllm.chips import PEAKS


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, or None where it is not known (a CPU, a chip not in PEAKS)."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)


def flops_per_token(active: int, layers: Iterable[tuple[int, float, int | None]], length: int) -> float:
    """FLOPs of forward and backward pass for one token, in the mean over a row of `length` tokens.

    6 * active + the sum over layers of 12 * heads * head_dim * keys (PaLM, Chowdhery et al. 2022, appendix B).
    `active`: weights in the matrix products of one token, head included (also when tied), the looked-up embedding
    not, of a mixture of experts only the experts chosen. `layers`: (heads, head_dim, window or None) of each.
    `keys`: mean number of keys that causal attention sees, w * (1 - w / (2 * length)) with w = min(window, length),
    which is length / 2 without a window. Document boundaries inside a row and rematerialisation are not counted.
    """
    attention = 0.0
    for heads, head_dim, window in layers:
        w = min(window or length, length)
        attention += 12 * heads * head_dim * w * (1 - w / (2 * length))
    return 6 * active + attention


class Meter:
    """Speed from the times at which steps finish. `peak`: FLOP/s of all devices together, None if unknown.

    The first interval after construction and after `skip` is not counted: it holds compilation, or an evaluation.
    """

    def __init__(self, steps: int, peak: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self.steps, self.peak, self.clock = steps, peak, clock
        self.recent: collections.deque = collections.deque(maxlen=20)
        self.total = (0.0, 0, 0.0)
        self.last: float | None = None

    def skip(self) -> None:
        """Leaves out the time until the next finished step."""
        self.last = None

    def update(self, step: int, tokens: int, flops: float) -> dict[str, float]:
        """Counts step `step` (from 0) of `tokens` tokens and `flops` FLOPs on all devices, finished now.

        Returns the speed over the last 20 steps: tokens_per_second, mfu (with a known peak) and eta in seconds; an
        empty dict until an interval has been counted.
        """
        now, last = self.clock(), self.last
        self.last = now
        if last is not None:
            self.recent.append((now - last, tokens, flops))
            self.total = tuple(a + b for a, b in zip(self.total, self.recent[-1], strict=True))
        if not self.recent:
            return {}
        speed = self._speed(*(sum(column) for column in zip(*self.recent, strict=True)))
        mean = sum(row[0] for row in self.recent) / len(self.recent)
        return speed | {"eta": mean * (self.steps - 1 - step)}

    def mean(self) -> dict[str, float]:
        """tokens_per_second and mfu over all steps counted; empty if none was."""
        return self._speed(*self.total) if self.total[0] else {}

    def _speed(self, seconds: float, tokens: int, flops: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        speed = {"tokens_per_second": tokens / seconds}
        return speed | {"mfu": flops / (seconds * self.peak)} if self.peak else speed


class Lagged:
    """Holds one step's metrics on the device and gives the step before as floats.

    Reading a step that is still running would stall the host and leave the device idle before the next one.
    """

    def __init__(self):
        self.held: tuple[int, dict[str, jax.Array]] | None = None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> tuple[int, dict[str, float]] | None:
        """Takes the scalars of the step just dispatched; returns (step, metrics) of the one before, if any."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        before = self.flush()
        self.held = (step, metrics)
        return before

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the held step and returns it: after the last step, or before a pause."""
        if self.held is None:
            return None
        (step, metrics), self.held = self.held, None
        return step, {name: float(value) for name, value in jax.device_get(metrics).items()}


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process (`host_bytes`) and of its fullest device (`device_bytes`, where it is reported)."""
    out = {"host_bytes": _peak_rss()}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return out | ({"device_bytes": max(peaks)} if peaks else {})


def _peak_rss() -> int:
    """VmHWM where there is one: ru_maxrss also holds what the process was before it re-executed itself."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
