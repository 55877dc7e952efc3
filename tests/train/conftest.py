"""What the tests of runs share."""

import os
import signal
import threading

import pytest

from jaxllm.checkpoint import Preemption


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(k)`: the next run gets a real SIGTERM after step k."""
    reached = Preemption.reached

    def stop(k):
        def signalled(self, step):
            if step == k and threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.setattr(Preemption, "reached", reached)
            return reached(self, step)

        monkeypatch.setattr(Preemption, "reached", signalled)

    return stop
