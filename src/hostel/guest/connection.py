"""The host's end of the byte stream: frames in, frames out, and who gets which.

::

    socket ──reader thread──▶ Sink.frame(type, channel, payload)   never blocks: windows bound what comes
    socket ◀──send()────────  any thread; what the guest does not take at once waits in a queue,
                              which a second thread empties

A guest that stops reading holds up nobody but those who send it data (``wait=True``): a signal or a new
window size is never behind a lock that a stuck write holds.

The guest is hostile. A frame that breaks the protocol ends the connection with an ``AgentError`` that
every waiter gets; the end of the stream ends it with ``MachineStopped``.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from hostel.errors import AgentError, HostelError, MachineStopped

from .protocol import HEADER, MAX_PAYLOAD, Buffer, Type, frames

_QUEUE_LIMIT = 1 << 20
_KNOWN = frozenset({Type.HELLO, Type.DATA, Type.EOF, Type.CREDIT, Type.EXIT, Type.PONG})


Explain = Callable[[HostelError], HostelError]


class Sink(Protocol):
    """The owner of a stream. Called by the reader thread; ``AgentError`` from it ends the connection."""

    def frame(self, type: Type, channel: int, payload: bytearray) -> None: ...
    def failed(self, error: HostelError) -> None: ...


class Connection:
    """One socket, one reader thread, many streams."""

    def __init__(self, sock: socket.socket, control: Sink, explain: Explain | None = None) -> None:
        """``explain``, called by the reader thread, turns what broke the stream into what is to be told:
        the machine may know why it ended."""
        sock.settimeout(None)
        self._socket = sock
        self._explain = explain
        self._control = control
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._error: HostelError | None = None
        self._explaining = False
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._sending = threading.Condition()
        self._writer: threading.Thread | None = None
        self._reader = threading.Thread(target=self._read, name="hostel-agent", daemon=True)

    def start(self) -> None:
        self._reader.start()

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

    def close(self) -> None:
        """Ends everything; waiters get ``MachineStopped``."""
        if not self._explaining:
            self._fail(MachineStopped("the connection to the guest's agent is closed"))
        for thread in (self._reader, self._writer):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        self._socket.close()

    def _fail(self, error: HostelError) -> None:
        with self._lock:
            if self._error:
                return
            self._error = error
            sinks = [self._control, *self._sinks.values()]
            self._sinks.clear()
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._sending:
            self._sending.notify_all()
        for sink in sinks:
            sink.failed(error)

    # Sending

    def send(
        self,
        type: Type,
        stream: int = 0,
        payload: Buffer = b"",
        channel: int = 0,
        *,
        wait: bool = False,
    ) -> None:
        """One message, whole. ``wait`` until the guest has taken most of what was sent before."""
        with self._sending:
            while wait and self._queued > _QUEUE_LIMIT and not self._error:
                self._sending.wait()
            if self._error:
                raise self._error
            for header, part in frames(type, stream, payload, channel):
                self._send_frame(header, part)

    def _send_frame(self, header: bytes, part: memoryview) -> None:
        """With the lock held: what the socket takes at once, the rest into the queue."""
        done = 0
        if not self._queue:
            try:
                done = self._socket.sendmsg([header, part], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._error or _ended(error) from None
        if done < len(header) + len(part):
            rest = (
                (header + part)[done:] if done < len(header) else bytes(part[done - len(header) :])
            )
            self._enqueue(rest)

    def _enqueue(self, rest: bytes) -> None:
        self._queue.append(rest)
        self._queued += len(rest)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="hostel-send", daemon=True)
            self._writer.start()
        self._sending.notify_all()

    def _write(self) -> None:
        """A piece stays at the queue's head until it is sent, so that nobody overtakes it."""
        try:
            while piece := self._head():
                self._socket.sendall(piece)
                with self._sending:
                    self._queue.popleft()
                    self._queued -= len(piece)
                    self._sending.notify_all()
        except OSError as error:
            self._fail(_ended(error))

    def _head(self) -> bytes | None:
        with self._sending:
            while not self._queue and not self._error:
                self._sending.wait()
            return None if self._error else self._queue[0]

    # Receiving

    def _read(self) -> None:
        try:
            while True:
                self._read_frame()
        except HostelError as error:
            self._broken(error)
        except OSError as error:
            self._broken(_ended(error))

    def _broken(self, error: HostelError) -> None:
        if self._explain and not self._error:
            self._explaining = True  # from now on the reason is this one, whoever closes us
            error = self._explain(error)
        self._fail(error)

    def _read_frame(self) -> None:
        length, stream, number, channel, flags = HEADER.unpack(self._receive(HEADER.size))
        if length > MAX_PAYLOAD or flags or number not in _KNOWN:
            raise AgentError("the agent broke its protocol: a malformed frame")
        payload = self._receive(length)
        with self._lock:
            sink = self._sinks.get(stream) if stream else self._control
        if sink is not None:
            sink.frame(Type(number), channel, payload)

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise MachineStopped("the machine has ended: its agent's stream is closed")
            view = view[count:]
        return data


def _ended(error: OSError) -> MachineStopped:
    return MachineStopped(f"the connection to the guest's agent ended: {error.strerror}")
