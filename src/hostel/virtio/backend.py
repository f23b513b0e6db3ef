"""The other end of vhost-user: serves a device's queues for a monitor in another process.

::

    monitor (ours, QEMU) ── Unix socket: memory, ring addresses, eventfds ──► Backend ─► serve(chain)
    guest ── kick, an eventfd ─────────────────────────────────────────────► Backend
    guest ◄─ call, an eventfd ───────────────────────────────────────────────

One thread, one connection; ``run`` returns when the monitor hangs up. A process of its own: it has an
interpreter lock of its own, its faults are its own, and it may do less than the monitor. QEMU's
docs/interop/vhost-user.rst is the protocol.

What the guest does wrong ends the backend with an error that says what; the monitor then sees the
connection end, and the device fails. What the monitor sends is checked as far as it decides what is
read or mapped.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HelperError
from hostel.memory import Region

from .device import RING_FEATURES
from .foreign import ForeignMemory
from .queue import Chain, Queue

FEATURES = 1 << virtio.F_VERSION_1 | RING_FEATURES | 1 << abi.F_PROTOCOL_FEATURES
PROTOCOL_FEATURES = 1 << abi.PROTOCOL_F_MQ | 1 << abi.PROTOCOL_F_REPLY_ACK
BATCH = 64
NO_FD = 1 << 8
_MOST_FDS = abi.MAX_REGIONS

Serve = Callable[[Chain], int]
"""Do what a chain asks; how many bytes of its writable buffers are new."""


class Ring:
    """What the monitor has said of one virtqueue so far."""

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick = self.call = -1
        self.queue: Queue | None = None

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()
            self.queue = None
        for fd in (self.kick, self.call):
            if fd >= 0:
                os.close(fd)
        self.kick = self.call = -1


class Backend:
    """``sock`` is connected to the monitor, and belongs to the backend."""

    def __init__(self, sock: socket.socket, queues: int, serve: Serve) -> None:
        self._sock = sock
        self._rings = [Ring() for _ in range(queues)]
        self._serve = serve
        self._memory: ForeignMemory | None = None
        self._features = self._protocol_features = 0
        self._poll = select.epoll()
        self._poll.register(sock, select.EPOLLIN)
        self._by_kick: dict[int, Ring] = {}
        self._handlers: dict[int, Callable[[bytes, list[int]], bytes | None]] = {
            abi.GET_FEATURES: lambda _, fds: abi.U64.pack(FEATURES),
            abi.SET_FEATURES: self._set_features,
            abi.SET_OWNER: lambda _, fds: None,
            abi.GET_PROTOCOL_FEATURES: lambda _, fds: abi.U64.pack(PROTOCOL_FEATURES),
            abi.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            abi.GET_QUEUE_NUM: lambda _, fds: abi.U64.pack(queues),
            abi.SET_MEM_TABLE: self._set_memory,
            abi.SET_VRING_NUM: self._set_size,
            abi.SET_VRING_ADDR: self._set_addresses,
            abi.SET_VRING_BASE: self._set_base,
            abi.GET_VRING_BASE: self._stop_ring,
            abi.SET_VRING_KICK: self._set_kick,
            abi.SET_VRING_CALL: self._set_call,
            abi.SET_VRING_ERR: lambda _, fds: None,
            abi.SET_VRING_ENABLE: self._enable,
        }

    def run(self) -> None:
        """Serve until the monitor hangs up."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._poll.close)
            undo.callback(self._sock.close)
            for ring in self._rings:
                undo.callback(ring.close)
            while True:
                for fd, _ in self._poll.poll():
                    kicked = self._by_kick.get(fd)
                    if kicked is not None:
                        self._kicked(kicked)
                    elif fd == self._sock.fileno() and not self._message():
                        return

    # -- rings --------------------------------------------------------------------------------

    def _kicked(self, ring: Ring) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(ring.kick)
        queue, serve = ring.queue, self._serve
        if queue is None:
            return
        queue.disable_notifications()
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None and queue.enable_notifications():
                chain = queue.pop()
            if chain is None:
                return
            queue.push(chain, serve(chain))
            if queue.needs_interrupt() and ring.call >= 0:
                os.eventfd_write(ring.call, 1)
        os.eventfd_write(ring.kick, 1)  # the other rings first

    def _start_ring(self, ring: Ring) -> None:
        """A kick starts it (vhost-user.rst, "Ring states")."""
        if ring.queue is not None or ring.kick < 0:
            return
        memory, addresses = self._memory, ring.addresses
        if memory is None or addresses is None:
            raise HelperError("the monitor started a ring that it has not described")
        desc, used, avail = map(memory.gpa_of, addresses)
        ring.queue = Queue(
            memory,
            ring.size,
            desc=desc,
            avail=avail,
            used=used,
            features=self._features,
            position=(ring.base, ring.base),
        )
        self._by_kick[ring.kick] = ring
        os.set_blocking(ring.kick, False)
        self._poll.register(ring.kick, select.EPOLLIN)
        os.eventfd_write(ring.kick, 1)  # what was offered before

    def _halt(self, ring: Ring) -> None:
        if ring.queue is not None:
            ring.base = ring.queue.position[0]
            self._poll.unregister(ring.kick)
            del self._by_kick[ring.kick]
        ring.close()

    # -- messages -----------------------------------------------------------------------------

    def _message(self) -> bool:
        """Read one and answer it; False when the monitor has hung up."""
        try:
            header, fds, _, _ = socket.recv_fds(self._sock, abi.HEADER.size, _MOST_FDS)
        except ConnectionError:  # it was killed
            return False
        if not header:
            return False
        header += self._read(abi.HEADER.size - len(header))
        request, flags, size = abi.HEADER.unpack(header)
        if flags & abi.VERSION_MASK != abi.VERSION or size > 1 << 12:
            raise HelperError(f"the monitor sent request {request}, flags {flags:#x}, {size} bytes")
        payload = self._read(size)
        handler = self._handlers.get(request)
        if handler is None:
            raise HelperError(f"the monitor sent request {request}, which was not offered")
        try:
            answer = handler(payload, fds)
        except (struct.error, IndexError):
            raise HelperError(f"the monitor sent request {request}, malformed") from None
        finally:
            for fd in fds:
                os.close(fd)
        acknowledge = flags & abi.FLAG_NEED_REPLY
        if answer is None and acknowledge and self._has(abi.PROTOCOL_F_REPLY_ACK):
            answer = abi.U64.pack(0)
        if answer is not None:
            reply = abi.HEADER.pack(request, abi.VERSION | abi.FLAG_REPLY, len(answer))
            self._sock.sendall(reply + answer)
        return True

    def _read(self, size: int) -> bytes:
        data = self._sock.recv(size, socket.MSG_WAITALL) if size else b""
        if len(data) < size:
            raise HelperError("the monitor hung up in the middle of a message")
        return data

    def _has(self, bit: int) -> bool:
        return bool(self._protocol_features >> bit & 1)

    def _set_features(self, payload: bytes, _: list[int]) -> None:
        self._features = abi.U64.unpack(payload)[0]

    def _set_protocol_features(self, payload: bytes, _: list[int]) -> None:
        self._protocol_features = abi.U64.unpack(payload)[0]

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        count, _ = abi.MEMORY_HEADER.unpack_from(payload)
        start, size = abi.MEMORY_HEADER.size, abi.MEMORY_REGION.size
        if count != len(fds):
            raise HelperError(f"the monitor sent {len(fds)} files for {count} regions of memory")
        entries = (abi.MEMORY_REGION.unpack_from(payload, start + at * size) for at in range(count))
        regions = [Region(gpa, size, hva, offset) for gpa, size, hva, offset in entries]
        self._memory = ForeignMemory(regions, fds)
        for ring in self._rings:  # QEMU shows memory anew while rings run
            if ring.queue is not None:
                ring.base = ring.queue.position[0]
                self._poll.unregister(ring.kick)
                ring.queue.close()
                ring.queue = None
                self._start_ring(ring)

    def _ring(self, payload: bytes) -> tuple[Ring, int]:
        index, value = abi.VRING_STATE.unpack(payload)
        return self._rings[index], value

    def _set_size(self, payload: bytes, _: list[int]) -> None:
        ring, size = self._ring(payload)
        ring.size = size

    def _set_base(self, payload: bytes, _: list[int]) -> None:
        ring, base = self._ring(payload)
        ring.base = base & 0xFFFF

    def _set_addresses(self, payload: bytes, _: list[int]) -> None:
        index, _flags, desc, used, avail, _log = abi.VRING_ADDR.unpack(payload)
        self._rings[index].addresses = (desc, used, avail)

    def _stop_ring(self, payload: bytes, _: list[int]) -> bytes:
        index, _value = abi.VRING_STATE.unpack(payload)
        self._halt(self._rings[index])
        return abi.VRING_STATE.pack(index, self._rings[index].base)

    def _set_kick(self, payload: bytes, fds: list[int]) -> None:
        ring = self._rings[abi.U64.unpack(payload)[0] & 0xFF]
        if ring.queue is not None:
            self._halt(ring)
        elif ring.kick >= 0:
            os.close(ring.kick)
        ring.kick = _taken(payload, fds)
        if not self._features >> abi.F_PROTOCOL_FEATURES & 1:
            self._start_ring(ring)  # enabled from the start, without protocol features

    def _set_call(self, payload: bytes, fds: list[int]) -> None:
        ring = self._rings[abi.U64.unpack(payload)[0] & 0xFF]
        if ring.call >= 0:
            os.close(ring.call)
        ring.call = _taken(payload, fds)

    def _enable(self, payload: bytes, _: list[int]) -> None:
        ring, enable = self._ring(payload)
        if enable:
            self._start_ring(ring)
        elif ring.queue is not None:
            call = os.dup(ring.call) if ring.call >= 0 else -1
            kick = os.dup(ring.kick)
            self._halt(ring)
            ring.kick, ring.call = kick, call


def _taken(payload: bytes, fds: list[int]) -> int:
    """The descriptor of a message, ours from now on; -1 where it says that there is none."""
    if abi.U64.unpack(payload)[0] & NO_FD:
        return -1
    return fds.pop(0)
