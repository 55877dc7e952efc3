"""SIGTERM and Ctrl-C as a flag that the training loop reads between two steps."""

import os
import signal
import threading

import jax
from orbax.checkpoint import multihost


class Preemption:
    """Turns SIGTERM and SIGINT into `reached(step)` while the `with` block runs; a second signal exits at once.

    With more than one process the signal may reach only one of them, and all must stop after the same step: there
    jax's preemption service (started by `jax.distributed.initialize`) owns SIGTERM and picks the step. Handlers are
    a matter of the main thread: in any other one, nothing is installed.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`. Every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost.reached_preemption(step)
        return self.signal is not None

    def _handle(self, number, _frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # os.write: a print here could interrupt a print of the main program, which Python refuses.
        os.write(2, f"\n{self.signal.name}: saving after this step; once more to exit at once\n".encode())
