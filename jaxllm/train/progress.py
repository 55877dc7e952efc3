"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Show:
    """Progress of a run on standard error, so that standard output stays the results."""

    def __init__(self, total: int, *, quiet: bool = False, seconds: float = 10.0):
        """`seconds`: between two lines where there is no terminal."""
        self.total, self.quiet, self.seconds, self.last = total, quiet, seconds, 0.0
        self.bar = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self.task = self.bar.add_task("", total=total, text="")
            self.bar.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the state after `step` steps."""
        text = self._text(metrics)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif not self.quiet and (time.monotonic() - self.last >= self.seconds or step == self.total):
            self.last = time.monotonic()
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def begin(self, step: int) -> None:
        """Where a resumed run goes on, before its first step is done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def waiting(self, text: str, seconds: float = 5.0) -> Iterator[None]:
        """Says what is being waited for where the block takes longer than this."""
        timer = threading.Timer(seconds, self.say, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _text(self, m: dict[str, float]) -> str:
        parts = [f"loss {m['loss']:.3f}"] if "loss" in m else []
        if "tokens_per_second" in m:
            parts.append(f"{m['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in m:
            parts.append(f"MFU {m['mfu']:.1%}")
        if m.get("skipped"):
            parts.append(f"{m['skipped']:.0f} skipped")
        if "eta" in m:
            parts.append(f"{_clock(m['eta'])} left")
        return "  ".join(parts)
