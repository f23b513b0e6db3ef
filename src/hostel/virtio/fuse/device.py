"""The FUSE server as a vhost-user backend: the whole work of a process, until the machine hangs up."""

from __future__ import annotations

import contextlib
import socket

from hostel.errors import HostelError
from hostel.virtio.plane import QueueDevice, ServedQueue
from hostel.virtio.vhost_user_backend import Backend
from hostel.vmm.loop import EventLoop

from .session import Session

QUEUES = 2
"""The high-priority queue and one for requests (virtio 1.2 §5.11.2)."""


class Served(QueueDevice):
    """The queues of a session. The machine has the rest of the device, its config space too."""

    name = "fs"

    def __init__(self, loop: EventLoop, session: Session) -> None:
        super().__init__(loop)
        self._session = session

    def serve(self, queue: ServedQueue) -> None:
        for chain in queue.chains():
            queue.push(chain, self._session.serve(chain))
            queue.interrupt()

    def fail(self, error: HostelError) -> None:
        """It ends the process: the machine sees the connection end, and its device fails."""
        raise error


def serve(sock: socket.socket, session: Session) -> None:
    """Until the other end of ``sock`` hangs up; what it did wrong is raised. ``sock`` is closed then."""
    loop = EventLoop()
    backend = Backend(loop, sock, Served(loop, session), queues=QUEUES, on_end=loop.stop)
    with contextlib.closing(backend):
        loop.run()
    if backend.error is not None:
        raise backend.error
