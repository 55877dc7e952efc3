"""Who does not come to the lifeline, or comes and is a stranger, ends no process that did."""

import socket
import threading

import jax
import pytest

from jaxllm.train import lifeline
from jaxllm.train.lifeline import Lifeline

TOKEN = "token"


@pytest.fixture
def first(monkeypatch):
    """The first process of three: its lifeline, and the address where the others reach it."""
    monkeypatch.setattr(lifeline, "CONNECT", 1)
    monkeypatch.setattr(lifeline, "HELLO", 0.1, raising=False)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    listening = threading.Event()
    there = {}

    def says(make):
        there["port"] = make()[1]
        listening.set()
        return "127.0.0.1", there["port"], TOKEN

    monkeypatch.setattr(lifeline, "first_says", says)
    monkeypatch.setattr(Lifeline, "_end", lambda *args: None)  # it ends this process
    line = Lifeline()
    entering = threading.Thread(target=line.__enter__)
    entering.start()
    assert listening.wait(10)
    yield line, ("127.0.0.1", there["port"]), entering
    entering.join(10)
    line.__exit__(None, None, None)


def joined(address, rank: int) -> socket.socket:
    other = socket.create_connection(address, timeout=5)
    other.sendall(f"{TOKEN} {rank}\n".encode())
    return other


def test_one_that_did_not_come_leaves_the_connection_of_one_that_did(first, capfd):
    line, address, entering = first
    with joined(address, 1) as other:
        assert lifeline._line(other)
        entering.join(10)
        assert set(line._others) == {1} and "the run goes on" in capfd.readouterr().err
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):  # an end would be read as the first process being gone
            other.recv(1)


@pytest.mark.parametrize("says", [b"", b"x" * 100_000, b"GET / HTTP/1.1\r\n", b"token and more\n"])
def test_strangers_keep_nobody_out(first, says):
    line, address, entering = first
    with socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(says)
        with joined(address, 1) as one, joined(address, 2) as two:
            assert lifeline._line(one) and lifeline._line(two)
            entering.join(10)
            assert set(line._others) == {1, 2}


def test_one_that_is_not_answered_goes_without(monkeypatch):
    monkeypatch.setattr(lifeline, "CONNECT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError):
        lifeline._connect(*listener.getsockname(), TOKEN)
