"""A character device of QEMU's, joined to a ``Console`` by one end of a socket pair.

Runs on the event loop. QEMU stops the guest's port while nobody reads, so a guest that floods its
console waits for us and costs no memory.
"""

from __future__ import annotations

import contextlib
import socket

from hostel.console import Console
from hostel.vmm.loop import EventLoop

_CHUNK = 1 << 16


class ConsoleStream:
    """Feeds ``console`` from ``sock``, which it owns; sends it what is typed if ``accepts_input``."""

    def __init__(
        self, loop: EventLoop, console: Console, sock: socket.socket, *, accepts_input: bool
    ) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._console = console
        self._sock = sock
        self._pending = b""
        if accepts_input:
            console.on_input = lambda: loop.call_soon(self._send)
        loop.add(sock.fileno(), self._ready)

    def drain(self) -> None:
        """Take all that is there now. On the loop's thread, or when it has stopped."""
        with contextlib.suppress(BlockingIOError):
            while self._receive():
                pass

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove(self._sock.fileno())
            self._sock.close()

    def _ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._receive():
                self._loop.remove(self._sock.fileno())
                return
        if self._pending:
            self._send()

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(_CHUNK)
        except ConnectionError:  # QEMU died with input unread
            return False
        if data:
            self._console.feed(data)
        return bool(data)

    def _send(self) -> None:
        try:
            while self._pending or (data := self._console.take(_CHUNK)):
                self._pending = self._pending or data
                self._pending = self._pending[self._sock.send(self._pending) :]
            self._wait_for_room(False)
        except BlockingIOError:
            self._wait_for_room(True)
        except OSError:  # QEMU has ended
            self._pending = b""

    def _wait_for_room(self, wanted: bool) -> None:
        with contextlib.suppress(OSError):
            self._loop.modify(self._sock.fileno(), write=wanted)
