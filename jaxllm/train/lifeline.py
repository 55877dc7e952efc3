"""Tells the processes of a run that one of them is gone, so that the others end with a line that says so.

A collective waits for a process that will not come: on TPUs for ever, on CPUs with an error of the network library.
Here each process holds a connection to the first one, and a connection ends with its process: killed, out of memory,
its machine lost (then the kernel's keepalive notices). Whoever notices tells the others.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import jax

from jaxllm.checkpoint.together import first_says

#: Seconds in which the others reach the first process, or go without; in which one that has says who it is.
CONNECT = 20
HELLO = 2
#: Seconds without an answer of the other machine: the first probe, those after it, and how many.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
#: Longer than all of them.
PATIENCE = 35
#: Seconds in which all processes come to an error that they share.
GRACE = 5
BYE = "bye"
#: Bytes of a line at most.
LINE = 1 << 16


class Lifeline:
    """A context: within it, the process ends with exit code 1 and a line once another one is gone."""

    def __init__(self):
        self._others: dict[int, socket.socket] = {}
        self._closing = False

    def __enter__(self):
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            listener = socket.create_server(("", 0)) if jax.process_index() == 0 else None
            host, port, token = first_says(lambda: [_host(), listener.getsockname()[1], secrets.token_hex()])
            try:
                if listener:
                    self._accept(listener, token)
                else:
                    self._others[0] = _connect(host, port, token)
            except OSError as error:
                print(f"processes cannot see whether others are alive ({error}); the run goes on", file=sys.stderr)
            for other in self._others.values():
                _keep_alive(other)
            threading.Thread(target=self._watch, daemon=True, name="lifeline").start()
        return self

    def __exit__(self, kind, error, trace):
        """Says goodbye; an error that the loss of another process brought about waits for the line that says so."""
        if self._others and isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(PATIENCE)  # the process ends here where one is gone
        self._closing = True
        last = BYE if error is None or isinstance(error, SystemExit) else str(error).partition("\n")[0] or kind.__name__
        self._tell(jax.process_index(), last)

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Answers the others, who wait for that: who is not answered goes without. Raises OSError where some stay away,
        and keeps those that came, for whom a connection that ends means a process that is gone."""
        until = time.monotonic() + CONNECT
        with listener:
            while len(self._others) < jax.process_count() - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                other, _ = listener.accept()
                other.settimeout(HELLO)
                try:
                    said, _, rank = _line(other).decode("ascii", "replace").strip().partition(" ")
                    known = said == token and rank.isdecimal()
                    if known:
                        other.sendall(b"\n")
                        self._others[int(rank)] = other
                except OSError:
                    known = False
                if not known:  # a stranger
                    other.close()

    def _tell(self, who: int, text: str, but: int | None = None) -> None:
        """Says to the others, `but` one, how a process ended."""
        for rank, other in self._others.items():
            if rank != but:
                with contextlib.suppress(OSError):
                    other.sendall(json.dumps([who, text]).encode() + b"\n")

    def _watch(self) -> None:
        """Reads what the others say last, until they are gone."""
        with selectors.DefaultSelector() as ready:
            for rank, other in self._others.items():
                other.setblocking(True)
                ready.register(other, selectors.EVENT_READ, rank)
            while ready.get_map():
                for key, _ in ready.select():
                    try:
                        who, text = json.loads(_line(key.fileobj) or json.dumps([key.data, ""]))
                    except OSError as error:
                        who, text = key.data, error.strerror
                    ready.unregister(key.fileobj)
                    if text != BYE and not self._closing:
                        self._end(who, text, key.data)

    def _end(self, who: int, text: str, told_by: int) -> None:
        if jax.process_index() == 0:
            self._tell(who, text, but=told_by)
        if text:  # an error there, which this process may be about to have too, and say itself
            time.sleep(GRACE)
        if self._closing:
            return
        print(
            f"error: process {who} of {jax.process_count()} is gone{f' ({text})' if text else ''}, and this one cannot "
            "go on without it. What was saved stays: start all processes again with the same command, and the run goes "
            "on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the exit of jax would wait for the process that is gone, and end in an abort


def _host() -> str:
    """Where the others reach this process, as they reached it to join."""
    from jax._src import distributed

    address = getattr(distributed.global_state, "coordinator_address", None)
    return address.rsplit(":", 1)[0].strip("[]") if address else socket.gethostname()


def _connect(host: str, port: int, token: str) -> socket.socket:
    other = socket.create_connection((host, port), timeout=CONNECT)
    other.sendall(f"{token} {jax.process_index()}\n".encode())
    other.settimeout(2 * CONNECT)  # longer than the first process waits for anybody
    if not _line(other):
        raise ConnectionError("the first process did not answer")
    return other


def _keep_alive(other: socket.socket) -> None:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            other.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line(other: socket.socket) -> bytes:
    """Up to the end of a line; nothing where the connection ends before it, or the line is too long."""
    read = b""
    while not read.endswith(b"\n") and len(read) < LINE and (byte := other.recv(1)):
        read += byte
    return read if read.endswith(b"\n") else b""
