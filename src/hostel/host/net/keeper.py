"""The keeper of one network: makes it, hands out leases, answers names, and ends with the last machine.

One loop on one thread: each request is answered before the next is looked at, so that there is nothing
to lock. A connection is a lease; that it breaks is how a machine's end is seen, also after SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from hostel.errors import HelperError, HostelError
from hostel.vmm.loop import EventLoop

from . import kernel
from .state import State

LIMIT = 1 << 17
LOG_LIMIT = 1 << 18
MAKING = "/run/hostel-making"
"""Held while free names and subnets are looked for and taken: by one keeper of this host at a time, whoever
started it."""


class Fabric(Protocol):
    """What a keeper keeps: a network of ours, or devices on one of the host's."""

    state: State

    def make(self, loop: EventLoop) -> None: ...
    def attach(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]: ...
    def limit(self, number: int, limits: dict[str, Any]) -> None: ...
    def detach(self, number: int) -> None: ...


class Keeper:
    def __init__(self, listener: socket.socket, folder: str, fabric: Callable[[], Fabric]) -> None:
        self._listener, self._folder, self._new = listener, folder, fabric
        self._fabric: Fabric | None = None
        self._leases: dict[int, tuple[socket.socket, int]] = {}
        """Connections by file descriptor, with the number of what they lease (0: nothing)."""
        self.ended = threading.Event()
        self._problem: HostelError | None = None
        self.loop = EventLoop(on_error=_show)

    def start(self) -> None:
        self.loop.start()
        self.loop.call_soon(self._begin)

    def _begin(self) -> None:
        try:
            with kernel.locked(MAKING):
                try:
                    self._fabric = self._new()
                    self._fabric.make(self.loop)
                finally:
                    os.unlink(MAKING)  # who waits for it makes it anew
        except HostelError as error:
            self._problem = error
        except Exception as error:
            _show(error)
            self._problem = HelperError(f"the network could not be made: {error!r}")
        self.loop.add(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        fd = sock.fileno()
        self._leases[fd] = (sock, 0)
        self.loop.add(fd, lambda: self._serve(fd))

    def _serve(self, fd: int) -> None:
        sock, number = self._leases[fd]
        try:
            data = sock.recv(LIMIT)
        except OSError:
            data = b""
        if not data:
            self._release(fd)
            return
        try:
            number, answer = self._answer(number, json.loads(data))
        except HostelError as error:
            answer = {"error": _packed(error)}
        self._leases[fd] = (sock, number)
        try:
            sock.send(json.dumps(answer).encode())
        except OSError:
            self._release(fd)

    def _answer(self, number: int, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The first request on a connection is for a lease, further ones for that NIC's rates."""
        if self._problem or self._fabric is None:
            raise self._problem or HelperError("there is no network")
        try:
            if not number:
                return self._fabric.attach(request)
            self._fabric.limit(number, request)
            return number, {}
        except HostelError:
            raise
        except Exception as error:
            _show(error)
            raise HelperError(f"the network's keeper failed: {error!r}") from None

    def _release(self, fd: int) -> None:
        sock, number = self._leases.pop(fd)
        self.loop.remove(fd)
        sock.close()
        try:
            if number and self._fabric:
                self._fabric.detach(number)
        except Exception as error:
            _show(error)
        if not self._leases:
            self._end_if_unused()

    def _end_if_unused(self) -> None:
        """Nobody can come between: who looks for a keeper holds the lock (``client``)."""
        parent = os.path.dirname(self._folder)
        if not os.path.isdir(parent):
            self.end()
            return
        with open(f"{parent}/.net.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._accept()
            if not self._leases:
                self.end()

    def end(self) -> None:
        """Take everything down."""
        self.loop.remove(self._listener.fileno())
        try:
            if self._fabric:
                self._fabric.state.undo()
            with contextlib.suppress(OSError):
                for name in os.listdir(self._folder):
                    os.unlink(f"{self._folder}/{name}")
                os.rmdir(self._folder)
        finally:
            self.ended.set()
            self.loop.stop()


def main(arguments: list[str]) -> None:
    """Until the last machine has gone, or SIGTERM."""
    listener_fd, _ = fds = [int(text) for text in arguments[:2]]
    for fd in fds:  # ours; not for the programs that we run
        os.set_inheritable(fd, False)
    folder, kind, target = arguments[2:]
    listener = socket.socket(fileno=listener_fd)
    listener.setblocking(False)
    keeper = Keeper(listener, folder, lambda: _fabric(folder, kind, target))
    signal.signal(signal.SIGTERM, lambda *_: keeper.loop.call_soon(keeper.end))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _raise_file_limit()
    keeper.start()
    while not keeper.ended.wait(3600):
        pass


def _raise_file_limit() -> None:
    """Each lease, published port and question is a descriptor; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fabric(folder: str, kind: str, target: str) -> Fabric:
    if kind in ("nat", "isolated"):
        from .fabric import Network

        return Network(folder, kind, target)
    from .foreign import Bridge, Macvtap

    return Bridge(folder, target) if kind == "bridge" else Macvtap(folder, target)


def _packed(error: HostelError) -> list[str]:
    return [type(error).__name__, error.message, error.cost, error.cure]


def _show(error: Exception) -> None:
    """Into the log; not without end, for it is in memory (tmpfs)."""
    import traceback

    if os.fstat(2).st_size > LOG_LIMIT:
        return
    traceback.print_exception(error, file=sys.stderr)
