"""A machine's sockets on engine ``qemu``.

::

    plane vhost     /dev/vhost-vsock, with the guest's address claimed ──► QEMU: vhost-vsock
    plane python    virtio/vsock.py ◄── vhost-user, a socket pair ──────► QEMU: vhost-user-vsock

QEMU has no socket device of its own making; where the kernel has none it is ours, the same as on engine
``kvm``.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import msgspec

from hostel.host.vsock import main_path, publish_cid, raise_file_limit
from hostel.plan import Plan
from hostel.virtio.vhost_user_backend import Backend
from hostel.virtio.vsock import Vsock
from hostel.virtio.vsock_vhost import claim
from hostel.vmm.loop import EventLoop

SERVED_QUEUES = 2
"""The event queue is QEMU's."""


class QemuVsock:
    """``fd`` is for QEMU; ``plan`` says the address that the guest got."""

    def __init__(self, plan: Plan) -> None:
        assert plan.vsock is not None
        self._vsock = plan.vsock
        self._ours: socket.socket | None = None
        self._backend: Backend | None = None
        self.plan = plan
        if plan.vsock.plane == "python":
            self._ours, theirs = socket.socketpair()
            self.fd = theirs.detach()
            return
        vhost, cid = claim(plan.vsock.cid)
        self.fd = vhost.fd
        publish_cid(plan.vsock.directory, cid)
        self.plan = msgspec.structs.replace(
            plan, vsock=msgspec.structs.replace(plan.vsock, cid=cid)
        )

    def serve(self, loop: EventLoop) -> None:
        """QEMU runs, and waits for a word from its device."""
        os.close(self.fd)
        self.fd = -1
        if self._ours is not None:
            raise_file_limit()
            device = Vsock(loop, main_path(self._vsock.directory), cid=self._vsock.cid)
            self._backend = Backend(loop, self._ours, device, queues=SERVED_QUEUES)
            self._ours = None

    def statistics(self) -> dict[str, Any]:
        return self._backend.device.statistics() if self._backend else {"plane": "vhost"}

    def close(self) -> None:
        """Before the event loop ends. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._ours is not None:
            self._ours.close()
        if self._backend is not None:
            self._backend.close()
