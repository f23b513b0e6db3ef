"""File system (virtio 1.2 §5.11): FUSE over virtqueues, served by a virtiofsd process.

The guest mounts it by its tag: ``mount -t virtiofs TAG /mnt``.
"""

from __future__ import annotations

import os

from hostel.abi import virtio as abi
from hostel.errors import SpecError
from hostel.vmm.loop import EventLoop

from .vhost_user import VhostUserDevice, connect

TAG_BYTES = 36
QUEUE_SIZE = 512
"""A Linux guest sizes its largest request by it: a page for each descriptor but four."""
REQUEST_QUEUES = 1
"""More than one is not implemented in the virtiofsd of QEMU 7."""


class VirtioFs(VhostUserDevice):
    """``path`` is a socket that is bound already; the daemon may come to listen later."""

    device_id = abi.ID_FS

    def __init__(
        self, loop: EventLoop, tag: str, path: str | os.PathLike[str], *, name: str = ""
    ) -> None:
        encoded = tag.encode()
        if not 0 < len(encoded) <= TAG_BYTES:
            raise SpecError(
                f"a virtiofs tag has 1 to {TAG_BYTES} bytes, not {len(encoded)}: {tag!r}"
            )
        self.config = abi.FS_CONFIG.pack(encoded, REQUEST_QUEUES)
        sizes = (QUEUE_SIZE,) * (1 + REQUEST_QUEUES)  # the high-priority queue comes first
        super().__init__(
            loop, connect(path, "virtiofsd"), name=name or f"fs {tag}", queue_sizes=sizes
        )
