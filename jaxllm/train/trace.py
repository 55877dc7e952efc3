"""A profiler trace of chosen steps."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Traces the steps `(first, last)` into `folder`, as far as they are run while the `with` block lasts.

    Every process but the first has a folder of its own in it: the profiler names files by host and second, and two
    processes of one host would write into the same ones.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, say: Callable[[str], None]):
        if jax.process_index() > 0:
            folder = folder / f"process-{jax.process_index()}"
        self.steps, self.folder, self.say, self.running = steps or (0, -1), folder, say, False
        self.late = steps is not None  # until the first step that is run

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def before(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self.late and step > self.steps[1]:
            self.say(f"profile.steps={self.steps[0]}-{self.steps[1]} lies before step {step}, where this run goes on")
        self.late = False
        if not self.running and self.steps[0] <= step <= self.steps[1]:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Call with what the step returns; the last step is waited for, or the trace would miss it."""
        if self.running and step == self.steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            self.say(f"profiler trace in {self.folder}")
