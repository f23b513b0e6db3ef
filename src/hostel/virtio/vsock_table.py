"""The streams of a socket device: by their ports for the guest, by their descriptors for the host.

::

    (guest's port, host's port) ─► Stream      as long as the connection is the guest's
    descriptor ─► Stream                       as long as there is a socket: a released stream may still
                                               flush what it holds, one whose program has gone has none

The sockets are in two epoll sets, one to read and one to write; the event loop watches each set as one
descriptor, and so all the sockets in it can be silenced with one word.
"""

from __future__ import annotations

import select
import socket

from .vsock_stream import Stream

MAX_STREAMS = 4096
WINDOW = 256 << 10
"""What a stream may hold of the guest's bytes: as much as Linux has."""
SMALL_WINDOW = 16 << 10
BUDGET = 64 << 20
"""As the windows of all streams come near it new ones get smaller, down to ``SMALL_WINDOW``: together
they are never more than BUDGET + MAX_STREAMS * SMALL_WINDOW."""
TURN = 16
"""Sockets served before other devices have their turn; epoll hands them out in rotation."""
FIRST_PORT = 1 << 30
"""Of those that the host's programs get."""

HUNG_UP = select.EPOLLHUP


class Streams:
    """With the device's lock."""

    def __init__(self) -> None:
        self._streams: dict[tuple[int, int], Stream] = {}
        self._by_fd: dict[int, Stream] = {}
        self._granted = 0
        self._next_port = FIRST_PORT
        self._readers = select.epoll()
        self._writers = select.epoll()
        self.read_fd = self._readers.fileno()
        self.write_fd = self._writers.fileno()

    def close(self) -> None:
        self.clear()
        self._readers.close()
        self._writers.close()

    def clear(self) -> None:
        """The guest is gone; what is held has one more chance."""
        for stream in list(self._by_fd.values()):
            if stream.held:
                stream.flush()
            self.close_socket(stream)
        self._streams.clear()

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def held(self) -> int:
        return sum(len(stream.held) for stream in self._by_fd.values())

    @property
    def full(self) -> bool:
        return max(len(self._by_fd), len(self._streams)) >= MAX_STREAMS

    def get(self, guest_port: int, host_port: int) -> Stream | None:
        return self._streams.get((guest_port, host_port))

    def has(self, stream: Stream) -> bool:
        """Whether the connection is still the guest's."""
        return self._streams.get(stream.key) is stream

    # -- coming and going ---------------------------------------------------------------------

    def add(
        self, sock: socket.socket, guest_port: int, host_port: int, *, connecting: bool = False
    ) -> Stream:
        window = max(SMALL_WINDOW, min(WINDOW, (BUDGET - self._granted) // 64))
        stream = Stream(
            sock,
            guest_port=guest_port,
            host_port=host_port,
            window=window,
            connecting=connecting,
        )
        self._granted += window
        self._streams[stream.key] = stream
        self._by_fd[stream.fd] = stream
        return stream

    def free_port(self, guest_port: int) -> int:
        """One of the host's that has no connection to ``guest_port``; not one used just before."""
        while True:
            port = self._next_port
            self._next_port = FIRST_PORT + (port + 1 - FIRST_PORT) % FIRST_PORT
            if (guest_port, port) not in self._streams:
                return port

    def release(self, stream: Stream) -> None:
        """The connection is over for the guest. What it sent before still reaches the host."""
        del self._streams[stream.key]
        self._set_events(stream, None)
        if not stream.held and stream.open:
            self.close_socket(stream)

    def close_socket(self, stream: Stream) -> None:
        """The kernel takes it out of both sets."""
        del self._by_fd[stream.fd]
        stream.watched = None
        stream.close()
        self._granted -= stream.window

    # -- waiting ------------------------------------------------------------------------------

    def watch(self, stream: Stream) -> None:
        """Wait for what is of use now. After the last byte to be read only the hang-up is; without
        credit, once the guest was asked for some, nothing: a hang-up would be reported again and again.
        """
        if not (stream.open and self.has(stream)):
            return
        if stream.connecting or (stream.readable and stream.asked):
            self._set_events(stream, None)
        else:
            self._set_events(stream, select.EPOLLIN if stream.readable else 0)

    def _set_events(self, stream: Stream, events: int | None) -> None:
        before, stream.watched = stream.watched, events
        if before == events:
            return
        if events is None:
            self._readers.unregister(stream.fd)
        elif before is None:
            self._readers.register(stream.fd, events)
        else:
            self._readers.modify(stream.fd, events)

    def watch_writable(self, stream: Stream) -> None:
        if not stream.waits:
            stream.waits = True
            self._writers.register(stream.fd, select.EPOLLOUT)

    def ready_to_read(self) -> list[tuple[Stream, int]]:
        """Streams and their events; all that is there for one turn."""
        return [(self._by_fd[fd], events) for fd, events in self._readers.poll(0, TURN)]

    def flush(self) -> list[Stream]:
        """Write what is held where it can be written; those that did."""
        flushed = []
        for fd, _ in self._writers.poll(0, TURN):
            stream = self._by_fd[fd]
            stream.flush()
            flushed.append(stream)
            if stream.held:
                continue
            stream.waits = False
            self._writers.unregister(fd)
            if not self.has(stream):
                self.close_socket(stream)
        return flushed
