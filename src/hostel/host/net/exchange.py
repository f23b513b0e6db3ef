"""DNS messages in flight: one to a resolver of the host and back, and a guest's TCP connection.

Every question goes out from a socket of its own, with an id of our own: an answer can only be guessed,
not seen coming, by who is not on the way.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from hostel.vmm.loop import EventLoop

from . import dns

if TYPE_CHECKING:
    from .resolver import Resolver

RESOLV_CONF = "/etc/resolv.conf"
TRY = 2.5
"""Seconds for each server; a guest's own resolver waits for five."""
MAX_SERVERS = 3
IDLE = 10.0
"""Seconds that a guest may hold a TCP connection."""


class Exchange:
    """Ask the host's resolvers, one after the other; ``done`` gets the first answer, or None."""

    def __init__(
        self, loop: EventLoop, message: bytes, done: Callable[[bytes | None], None], *, tcp: bool
    ) -> None:
        self._loop, self._done, self._tcp = loop, done, tcp
        self._asked = dns.Question(message)
        self._id = os.urandom(2)
        self._query = self._id + message[2:]
        self._servers = servers()
        self._socket: socket.socket | None = None
        self._received = b""

    def start(self) -> None:
        self._next()

    def _next(self) -> None:
        """Ask the next server, if there is one."""
        self._drop()
        if not self._servers:
            self._done(None)
            return
        address = self._servers.pop(0)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_STREAM if self._tcp else socket.SOCK_DGRAM
        try:
            self._socket = sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        except OSError:  # no descriptor left, or no IPv6
            self._next()
            return
        with contextlib.suppress(OSError):  # in progress; or refused, which the loop reports
            sock.connect((address, 53))
        self._loop.add(sock.fileno(), self._write, read=False, write=True)
        self._loop.call_later(TRY, lambda: self._next() if self._socket is sock else None)

    def _write(self) -> None:
        assert self._socket is not None
        data = len(self._query).to_bytes(2, "big") + self._query if self._tcp else self._query
        try:
            self._socket.send(data)
        except OSError:
            self._next()
            return
        self._loop.remove(self._socket.fileno())
        self._loop.add(self._socket.fileno(), self._read)

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._next()
            return
        self._received = self._received + data if self._tcp else data
        answer = unframed(self._received) if self._tcp else data
        if answer is not None and self._is_ours(answer):
            self._drop()
            self._done(self._asked.id.to_bytes(2, "big") + answer[2:])

    def _is_ours(self, answer: bytes) -> bool:
        try:
            question = dns.Question(answer)
        except ValueError:
            return False
        asked = self._asked
        same = (question.name, question.type, question.kind) == (asked.name, asked.type, asked.kind)
        return answer[:2] == self._id and not question.is_query and same

    def _drop(self) -> None:
        if self._socket is not None:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._received = b""


class TcpClient:
    """One connection of a guest: one question (RFC 7766 lets a client send more; it can connect anew)."""

    def __init__(self, resolver: Resolver, sock: socket.socket, sender: str) -> None:
        self._resolver, self._socket, self._sender = resolver, sock, sender
        self._received = b""
        self._open = self._counted = True
        sock.setblocking(False)
        resolver.loop.add(sock.fileno(), self._read)
        resolver.loop.call_later(IDLE, self._close)

    def _read(self) -> None:
        try:
            data = self._socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        message = unframed(self._received)
        if message is not None:
            self._resolver.loop.remove(self._socket.fileno())
            self._counted = False
            self._resolver.ask(self._sender, message, self._reply, tcp=True)
        elif not data or len(self._received) > 4096:
            self._close()

    def _reply(self, answer: bytes) -> None:
        if self._open:
            with contextlib.suppress(OSError):  # it does not read: its loss
                self._socket.send(len(answer).to_bytes(2, "big") + answer)
        self._close()

    def _close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._resolver.loop.remove(self._socket.fileno())
        self._socket.close()
        if self._counted:
            self._resolver.leave(self._sender)


def unframed(data: bytes) -> bytes | None:
    """A message from a stream, where its length comes before it (RFC 1035 §4.2.2); None: not whole yet."""
    end = 2 + int.from_bytes(data[:2], "big")
    return data[2:end] if len(data) >= max(end, 3) else None


def servers() -> list[str]:
    """The host's resolvers, read anew each time: a host moves between networks."""
    try:
        with open(RESOLV_CONF) as file:
            words = [line.split() for line in file]
    except OSError:
        words = []
    found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
    return found[:MAX_SERVERS] or ["127.0.0.1"]
