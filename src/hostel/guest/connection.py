"""The host's end of the byte stream: frames in, frames out, and who gets which.

::

    socket ──reader thread──▶ Sink.frame(header, payload)      never blocks: windows bound what comes
    socket ◀──send()────────  any thread, whole messages, one at a time

The guest is hostile. A frame that breaks the protocol ends the connection with an ``AgentError`` that
every waiter gets; the end of the stream ends it with ``MachineStopped``.
"""

from __future__ import annotations

import itertools
import socket
import threading
from typing import Protocol

from ..errors import AgentError, HostelError, MachineStopped
from .protocol import HEADER, MAX_PAYLOAD, Type, frames


class Sink(Protocol):
    """The owner of a stream. Called by the reader thread; ``AgentError`` from it ends the connection."""

    def frame(self, type: Type, channel: int, payload: bytearray) -> None: ...
    def failed(self, error: HostelError) -> None: ...


class Connection:
    """One socket, one reader thread, many streams."""

    def __init__(self, sock: socket.socket, control: Sink) -> None:
        self._socket = sock
        self._control = control
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._error: HostelError | None = None
        sock.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="hostel-agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self, sink: Sink) -> int:
        """A new stream; its frames go to ``sink``."""
        with self._lock:
            if self._error:
                raise self._error
            stream = next(self._ids) & 0xFFFF_FFFF
            self._sinks[stream] = sink
            return stream

    def forget(self, stream: int) -> None:
        with self._lock:
            self._sinks.pop(stream, None)

    def send(
        self, type: Type, stream: int = 0, payload: bytes | bytearray = b"", channel: int = 0
    ) -> None:
        """One message, whole. Blocks while the guest does not read."""
        if self._error:
            raise self._error
        try:
            with self._send_lock:
                for frame in frames(type, stream, payload, channel):
                    self._socket.sendall(frame)
        except OSError as error:
            raise self._error or self._ended(error) from None

    def close(self) -> None:
        """Ends everything; waiters get ``MachineStopped``."""
        self._fail(MachineStopped("the connection to the guest's agent is closed"))
        if threading.current_thread() is not self._thread and self._thread.ident:
            self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        try:
            while self._read_frame():
                pass
        except HostelError as error:
            self._fail(error)
        except OSError as error:
            self._fail(self._ended(error))

    def _ended(self, error: OSError) -> MachineStopped:
        return MachineStopped(f"the connection to the guest's agent ended: {error.strerror}")

    def _read_frame(self) -> bool:
        length, stream, number, channel, flags = HEADER.unpack(self._receive(HEADER.size))
        if length > MAX_PAYLOAD or flags or number not in _KNOWN:
            raise AgentError("the agent broke its protocol: a malformed frame")
        payload = self._receive(length)
        with self._lock:
            sink = self._sinks.get(stream) if stream else self._control
        if sink is not None:
            sink.frame(Type(number), channel, payload)
        return True

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise MachineStopped("the machine has ended: its agent's stream is closed")
            view = view[count:]
        return data

    def _fail(self, error: HostelError) -> None:
        with self._lock:
            if self._error:
                return
            self._error = error
            sinks = [self._control, *self._sinks.values()]
            self._sinks.clear()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster
        for sink in sinks:
            sink.failed(error)


_KNOWN = frozenset({Type.HELLO, Type.DATA, Type.EOF, Type.CREDIT, Type.EXIT, Type.PONG})
