"""SIGTERM and Ctrl-C as a flag that the training loop reads between two steps."""

import contextlib
import os
import signal
import threading

import jax
from orbax.checkpoint import multihost


class Preemption:
    """Turns SIGTERM and SIGINT into `reached(step)` while the `with` block runs; a second signal exits at once.

    With `idle`, so does the first SIGTERM until `begin()` is called: before a step is taken there is nothing to save,
    and a first compilation may take minutes. A first Ctrl-C is a KeyboardInterrupt then, as it is without us: the
    program around may be a notebook. Python's handlers run in the main thread alone, between two lines of it,
    which a compiler or a step can hold up; so a thread of its own reads what the handler in C writes at once.

    With more than one process the signal may reach only one of them, and all must stop after the same step: there
    jax's preemption service (started by `jax.distributed.initialize`) owns SIGTERM and picks the step. Handlers are
    a matter of the main thread: in any other one, nothing is installed.
    """

    def __init__(self, *, idle: bool = False, exit_code: int = 0):
        self.signal: signal.Signals | None = None
        self._idle, self._exit_code = idle, exit_code
        self._previous: dict[signal.Signals, object] = {}
        self._close = contextlib.ExitStack()

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            watcher = threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True)
            watcher.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._mark)
            # In reverse: no byte more, the end of the file for the thread, and the thread itself.
            self._close.callback(os.close, read)
            self._close.callback(watcher.join)
            self._close.callback(os.close, write)
            self._close.callback(signal.set_wakeup_fd, before)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._close.close()

    def begin(self) -> None:
        """From now on there is something new to save."""
        self._idle = False

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`. Every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost.reached_preemption(step)
        return self.signal is not None

    def _mark(self, number, _frame):
        """Runs in the main thread; sets the flag there too, so that a signal sent by itself is seen at once."""
        self.signal = signal.Signals(number)
        if self._idle and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self, read: int) -> None:
        """Runs in a thread of its own: a byte for each signal."""
        told = False
        while byte := os.read(read, 1):
            if (number := byte[0]) not in (signal.SIGTERM, signal.SIGINT):
                continue
            if told:
                os._exit(128 + number)
            told, self.signal = True, signal.Signals(number)
            # os.write: a print here could interrupt a print of the main program, which Python refuses.
            if self._idle and number == signal.SIGTERM:
                os.write(2, f"\n{self.signal.name}: nothing new to save, exiting\n".encode())
                os._exit(self._exit_code)
            what = "nothing new to save" if self._idle else "saving after this step"
            os.write(2, f"\n{self.signal.name}: {what}; once more to exit at once\n".encode())
