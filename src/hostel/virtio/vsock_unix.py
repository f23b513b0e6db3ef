"""The host's side of the user-space socket plane: Unix sockets, as Firecracker and its clients have them.

::

    host's program ── connects to PATH, says "CONNECT 5000\\n" ──► the guest's port 5000
                   ◄─ reads "OK 1073741824\\n" (the port it has on the host), then the stream
    host's program listens at PATH_5000 ◄── connects ──────────── the guest, to port 5000 of CID 2

A connection that the guest refuses, or nobody can take, is closed without a word. Whoever may enter
the directory may connect: it is the user's own.

Everything here is called with ``lock``, and runs on the event loop; nothing waits.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import RLock

from hostel.errors import HostError
from hostel.vmm.loop import EventLoop

BACKLOG = 1024
ACCEPTS = 16
"""Connections taken before other devices have their turn."""
LINE = 32
"""The longest first line."""
GREETING_SECONDS = 10.0
"""How long a program may take for its first line."""
PAUSE_SECONDS = 1.0
"""How long nobody is accepted after this process had no descriptor left for it."""
MAX_GREETINGS = 256

_CONNECT = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")


class HostSockets:
    """``on_connect`` gets a socket whose program wants the guest's port, and owns it."""

    def __init__(
        self,
        loop: EventLoop,
        path: Path,
        lock: RLock,
        on_connect: Callable[[socket.socket, int], None],
    ) -> None:
        self.path = path
        self._loop = loop
        self._lock = lock
        self._on_connect = on_connect
        self._greetings: dict[int, tuple[socket.socket, bytes]] = {}
        """Programs that have not said their first line, and what of it has come."""
        self._listener = _listen(path)
        self._closed = False
        loop.add(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Idempotent; with ``lock``."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for fd in list(self._greetings):
            self._take(fd).close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def connect(self, port: int) -> socket.socket | None:
        """To whoever listens on ``port`` of the host; ``None``: nobody, or one that is too busy."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            return None
        try:
            sock.connect(f"{self.path}_{port}")
        except OSError:
            sock.close()
            return None
        return sock

    # -- connections from the host ------------------------------------------------------------

    def _accept(self) -> None:
        with self._lock:
            for _ in range(0 if self._closed else ACCEPTS):
                try:
                    sock, _ = self._listener.accept()
                except BlockingIOError:
                    return
                except OSError:  # no descriptors left: asking again at once would be a busy loop
                    self._pause()
                    return
                self._welcome(sock)

    def _pause(self) -> None:
        self._loop.modify(self._listener.fileno(), read=False)
        self._loop.call_later(PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        with self._lock:
            if not self._closed:
                self._loop.modify(self._listener.fileno())

    def _welcome(self, sock: socket.socket) -> None:
        if len(self._greetings) >= MAX_GREETINGS:
            sock.close()
            return
        sock.setblocking(False)
        fd = sock.fileno()
        self._greetings[fd] = (sock, b"")
        self._loop.add(fd, partial(self._greet, fd))
        self._loop.call_later(GREETING_SECONDS, partial(self._expire, fd, sock))

    def _expire(self, fd: int, sock: socket.socket) -> None:
        with self._lock:
            if fd in self._greetings and self._greetings[fd][0] is sock:
                self._take(fd).close()

    def _greet(self, fd: int) -> None:
        """Read up to the end of the first line: what follows is the stream's."""
        with self._lock:
            if fd not in self._greetings:
                return
            sock, line = self._greetings[fd]
            try:
                line += _read_line(sock, LINE - len(line))
            except BlockingIOError:
                return
            except OSError:
                line = b"\n"
            if not line.endswith(b"\n") and len(line) < LINE:
                self._greetings[fd] = (sock, line)
                return
            self._take(fd)
            match = _CONNECT.fullmatch(line)
            if match and (port := int(match[1])) < 1 << 32:
                self._on_connect(sock, port)
            else:
                sock.close()

    def _take(self, fd: int) -> socket.socket:
        sock, _ = self._greetings.pop(fd)
        self._loop.remove(fd)
        return sock


def _read_line(sock: socket.socket, most: int) -> bytes:
    """Not a byte more than the line; it may be the first part of one. End-of-file is a line too."""
    ahead = sock.recv(most, socket.MSG_PEEK)
    end = ahead.find(b"\n") + 1
    return sock.recv(end or len(ahead)) if ahead else b"\n"


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen at {path}: {error.strerror or error}",
            cost="no vsock between host and guest",
        ) from None
    return listener
