"""The kernel's vhost: a device's queues are served by a thread of the host kernel.

::

    this process ── ioctls: memory (our addresses), rings, eventfds ──► /dev/vhost-*
    guest ── ioeventfd (kick) ────────────────────────────────────────► kernel's worker
    guest ◄─ irqfd (call) ────────────────────────────────────────────  kernel's worker

After the set-up this process is not on the path. ``Vhost`` is one open descriptor with one method for
each request; what makes a device of it is its user's business (``net_vhost.py``, ``vsock_vhost.py``).

The worker reads and writes guest memory through our own mapping, by the addresses that it is given
here: so rings are checked first (``start_ring``), and the worker checks buffers against the memory
table. A ring that breaks the rules signals its error eventfd, and the worker leaves it alone.
"""

from __future__ import annotations

import contextlib
import os
from fcntl import ioctl

from hostel.abi import vhost as abi
from hostel.errors import HostError
from hostel.memory import GuestMemory

from .device import QueueWiring
from .queue import check_rings

CURES = {
    "/dev/vhost-net": "modprobe vhost_net (as root)",
    "/dev/vhost-vsock": "modprobe vhost_vsock (as root)",
}


def forget(error: int) -> bool:
    """Take what a ring's error eventfd holds; whether that was anything."""
    with contextlib.suppress(BlockingIOError):
        return bool(os.eventfd_read(error))
    return False


class Vhost:
    """One descriptor of ``/dev/vhost-*``. Not thread-safe; raises ``HostError``.

    ``close`` ends the worker: when it returns nobody touches guest memory.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"{path}: {error.strerror}",
                cost="the kernel cannot serve this device",
                cure=CURES.get(path, ""),
            ) from None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- requests, in the order of a set-up ---------------------------------------------------

    def set_owner(self) -> None:
        """VHOST_SET_OWNER: this process's memory, and a worker thread. Before all else."""
        self._call("VHOST_SET_OWNER", abi.SET_OWNER)

    def get_features(self) -> int:
        """VHOST_GET_FEATURES: virtio's bits, and vhost's own."""
        return self._get_u64("VHOST_GET_FEATURES", abi.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """VHOST_SET_FEATURES."""
        self._call("VHOST_SET_FEATURES", abi.SET_FEATURES, abi.U64.pack(features))

    def get_backend_features(self) -> int:
        """VHOST_GET_BACKEND_FEATURES: extensions of this interface."""
        return self._get_u64("VHOST_GET_BACKEND_FEATURES", abi.GET_BACKEND_FEATURES)

    def set_backend_features(self, features: int) -> None:
        """VHOST_SET_BACKEND_FEATURES."""
        self._call("VHOST_SET_BACKEND_FEATURES", abi.SET_BACKEND_FEATURES, abi.U64.pack(features))

    def set_mem_table(self, memory: GuestMemory) -> None:
        """VHOST_SET_MEM_TABLE: guest addresses, and ours of the same bytes."""
        regions = memory.regions
        table = abi.MEMORY.pack(len(regions), 0) + b"".join(
            abi.MEMORY_REGION.pack(at.gpa, at.size, at.hva, 0) for at in regions
        )
        self._call("VHOST_SET_MEM_TABLE", abi.SET_MEM_TABLE, table)

    def set_vring_num(self, index: int, size: int) -> None:
        """VHOST_SET_VRING_NUM: how many descriptors. While the ring does not run."""
        self._call("VHOST_SET_VRING_NUM", abi.SET_VRING_NUM, abi.VRING_STATE.pack(index, size))

    def set_vring_base(self, index: int, base: int) -> None:
        """VHOST_SET_VRING_BASE: the next available index. While the ring does not run."""
        self._call("VHOST_SET_VRING_BASE", abi.SET_VRING_BASE, abi.VRING_STATE.pack(index, base))

    def get_vring_base(self, index: int) -> int:
        """VHOST_GET_VRING_BASE: the next available index. It stops nothing."""
        state = bytearray(abi.VRING_STATE.pack(index, 0))
        self._call("VHOST_GET_VRING_BASE", abi.GET_VRING_BASE, state)
        return int(abi.VRING_STATE.unpack(state)[1])

    def set_vring_addr(self, index: int, *, desc: int, used: int, avail: int) -> None:
        """VHOST_SET_VRING_ADDR: addresses in this process."""
        address = abi.VRING_ADDR.pack(index, 0, desc, used, avail, 0)
        self._call("VHOST_SET_VRING_ADDR", abi.SET_VRING_ADDR, address)

    def set_vring_kick(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_KICK: the worker waits on this eventfd, and never reads it."""
        self._file("VHOST_SET_VRING_KICK", abi.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_CALL: the worker signals this eventfd after it used buffers."""
        self._file("VHOST_SET_VRING_CALL", abi.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_ERR: the worker signals this eventfd when the ring breaks the rules."""
        self._file("VHOST_SET_VRING_ERR", abi.SET_VRING_ERR, index, fd)

    def net_set_backend(self, index: int, fd: int) -> None:
        """VHOST_NET_SET_BACKEND: run the ring on this tap; ``FILE_UNBIND``: stop it, and return when
        the worker is done with it."""
        self._file("VHOST_NET_SET_BACKEND", abi.NET_SET_BACKEND, index, fd)

    def vsock_set_guest_cid(self, cid: int) -> None:
        """VHOST_VSOCK_SET_GUEST_CID: the guest's address; refused if another machine has it."""
        self._call("VHOST_VSOCK_SET_GUEST_CID", abi.VSOCK_SET_GUEST_CID, abi.U64.pack(cid))

    def vsock_set_running(self, running: bool) -> None:
        """VHOST_VSOCK_SET_RUNNING: start or stop both rings; stopping waits for the worker."""
        self._call("VHOST_VSOCK_SET_RUNNING", abi.VSOCK_SET_RUNNING, abi.INT.pack(running))

    # -- rings --------------------------------------------------------------------------------

    def start_ring(
        self, index: int, memory: GuestMemory, wiring: QueueWiring, *, base: int = 0, err: int
    ) -> None:
        """All of ring ``index`` of this descriptor but what makes it run. ``VirtqueueError``: it is
        malformed, or not in guest memory, and the kernel has not heard of it."""
        check_rings(memory, wiring.size, wiring.desc, wiring.avail, wiring.used)
        self.set_vring_num(index, wiring.size)
        self.set_vring_base(index, base)
        self.set_vring_addr(
            index,
            desc=memory.hva(wiring.desc),
            used=memory.hva(wiring.used),
            avail=memory.hva(wiring.avail),
        )
        self.set_vring_err(index, err)
        self.set_vring_call(index, wiring.call)
        self.set_vring_kick(index, wiring.kick)

    def stop_ring(self, index: int, memory: GuestMemory, wiring: QueueWiring) -> tuple[int, int]:
        """Let go of the eventfds of a ring that its user has stopped; its next available and next
        used index. The second is in the ring itself, where the worker reads it on a start."""
        self.set_vring_kick(index, abi.FILE_UNBIND)
        self.set_vring_call(index, abi.FILE_UNBIND)
        return self.get_vring_base(index), memory.read_u16(wiring.used + 2)

    # -- ioctl --------------------------------------------------------------------------------

    def _file(self, name: str, request: int, index: int, fd: int) -> None:
        self._call(name, request, abi.VRING_FILE.pack(index, fd))

    def _get_u64(self, name: str, request: int) -> int:
        value = bytearray(abi.U64.size)
        self._call(name, request, value)
        return int(abi.U64.unpack(value)[0])

    def _call(self, name: str, request: int, argument: bytes | bytearray | int = 0) -> None:
        """A ``bytearray`` is filled in place."""
        try:
            ioctl(self.fd, request, argument)
        except OSError as error:
            raise HostError(f"{self.path}: {name} failed: {error.strerror}") from error
