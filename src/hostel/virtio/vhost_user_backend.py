"""The other side of vhost-user: a device with a Python data plane, served to a VMM in another process.

::

    QEMU ── Unix socket: memory, ring addresses, eventfds ──► Backend ──► device.activate(…)
    guest ── ioeventfd (kick) ──────────────────────────────────────────► device.serve(queue)
    guest ◄─ irqfd (call) ───────────────────────────────────────────────

So engine ``qemu`` has the devices of ours that QEMU has not. QEMU docs/interop/vhost-user.rst; the
device's configuration is ours, all else of the transport is QEMU's.

The rings start together, when each has its kick and is enabled, and stop together when the first is
asked for its position. Messages are taken as they come, on the event loop: nothing waits for the rest
of one. What the peer, a helper of our own, gets wrong ends the connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable

import msgspec

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HelperError, HostelError
from hostel.memory import ForeignMemory, Region
from hostel.vmm.loop import EventLoop

from .device import QueueWiring
from .plane import QueueDevice

PROTOCOL = 1 << abi.PROTOCOL_F_MQ | 1 << abi.PROTOCOL_F_REPLY_ACK | 1 << abi.PROTOCOL_F_CONFIG
MAX_PAYLOAD = 4096
RING_MASK = 0xFF
NO_FD = 1 << 8


class Ring(msgspec.Struct):
    size: int = 0
    base: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False


class Backend:
    """Serves the first ``queues`` queues of ``device`` over ``sock``, and owns both."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, device: QueueDevice, *, queues: int
    ) -> None:
        self.device = device
        self._loop = loop
        self._sock = sock
        self._sock.setblocking(False)
        self._rings = [Ring() for _ in range(queues)]
        self._features = 0
        self._memory: ForeignMemory | None = None
        self._theirs: list[tuple[int, int, int]] = []
        """The peer's addresses of guest memory: where, how many bytes, guest address."""
        self._running = False
        self._closed = False
        self._header = self._payload = b""
        self._fds: list[int] = []
        self._handlers: dict[int, Callable[[bytes], bytes | None]] = {
            abi.GET_FEATURES: self._get_features,
            abi.SET_FEATURES: self._set_features,
            abi.GET_PROTOCOL_FEATURES: lambda _: abi.U64.pack(PROTOCOL),
            abi.SET_PROTOCOL_FEATURES: lambda _: None,
            abi.SET_OWNER: lambda _: None,
            abi.GET_QUEUE_NUM: lambda _: abi.U64.pack(queues),
            abi.SET_MEM_TABLE: self._set_mem_table,
            abi.SET_VRING_NUM: self._set_num,
            abi.SET_VRING_BASE: self._set_base,
            abi.SET_VRING_ADDR: self._set_addr,
            abi.SET_VRING_KICK: self._set_kick,
            abi.SET_VRING_CALL: self._set_call,
            abi.SET_VRING_ERR: lambda _: None,
            abi.SET_VRING_ENABLE: self._set_enable,
            abi.GET_VRING_BASE: self._get_base,
            abi.GET_CONFIG: self._get_config,
        }
        loop.add(sock.fileno(), self._ready)

    def close(self) -> None:
        """Not with a lock that the event loop's callbacks take."""
        self._loop.run_sync(self._close)

    # -- messages -----------------------------------------------------------------------------

    def _ready(self) -> None:
        try:
            while not self._closed and self._read_message():
                request, flags, _ = abi.HEADER.unpack(self._header)
                payload, self._header, self._payload = self._payload, b"", b""
                self._handle(request, flags, payload)
        except BlockingIOError:
            return
        except (OSError, HostelError, struct.error):
            self._close()

    def _read_message(self) -> bool:
        """Whether one is there, in ``_header`` and ``_payload``; its descriptors in ``_fds``."""
        self._header += self._read(abi.HEADER.size - len(self._header))
        if len(self._header) < abi.HEADER.size:
            return False
        size = abi.HEADER.unpack(self._header)[2]
        if size > MAX_PAYLOAD:
            raise HelperError(f"a vhost-user message of {size} bytes")
        self._payload += self._read(size - len(self._payload))
        return len(self._payload) == int(size)

    def _read(self, size: int) -> bytes:
        if not size:
            return b""
        data, fds, _, _ = socket.recv_fds(self._sock, size, abi.MAX_REGIONS)
        self._fds += fds
        if not data:
            raise HelperError("the peer hung up")
        return data

    def _handle(self, request: int, flags: int, payload: bytes) -> None:
        handler = self._handlers.get(request)
        if handler is None:
            raise HelperError(f"a vhost-user request {request} that we do not know")
        answer = handler(payload)
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if answer is None and flags & abi.FLAG_NEED_REPLY:
            answer = abi.U64.pack(0)
        if answer is not None:
            reply = abi.HEADER.pack(request, abi.VERSION | abi.FLAG_REPLY, len(answer)) + answer
            self._sock.sendall(reply)  # a few bytes, and the peer waits for them

    # -- requests -----------------------------------------------------------------------------

    def _get_features(self, _: bytes) -> bytes:
        return abi.U64.pack(self.device.features | 1 << abi.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes) -> None:
        self._features = _u64(payload) & self.device.features

    def _get_config(self, payload: bytes) -> bytes:
        offset, size, flags = abi.CONFIG_HEADER.unpack_from(payload)
        if size > abi.MAX_CONFIG_SIZE:
            raise HelperError(f"{size} bytes of config space")
        return abi.CONFIG_HEADER.pack(offset, size, flags) + self.device.read_config(offset, size)

    def _set_mem_table(self, payload: bytes) -> None:
        count, _ = abi.MEMORY_HEADER.unpack_from(payload)
        if count != len(self._fds) or not count:
            raise HelperError(f"{count} memory regions with {len(self._fds)} files")
        if len({_identity(fd) for fd in self._fds}) > 1:
            raise HelperError("guest memory in more than one file")
        regions, theirs = [], []
        for index in range(count):
            at = abi.MEMORY_HEADER.size + index * abi.MEMORY_REGION.size
            gpa, size, address, offset = abi.MEMORY_REGION.unpack_from(payload, at)
            regions.append(Region(gpa, size, 0, offset))
            theirs.append((address, size, gpa))
        before = self._memory
        # Rings that run keep their views: the same bytes of the same file, wherever they are shown.
        self._memory = ForeignMemory(self._fds[0], tuple(regions))
        self._theirs = theirs
        if before is not None:
            before.regions = self._memory.regions

    def _set_num(self, payload: bytes) -> None:
        self._ring(payload).size = abi.VRING_STATE.unpack(payload)[1]

    def _set_base(self, payload: bytes) -> None:
        self._ring(payload).base = abi.VRING_STATE.unpack(payload)[1]

    def _set_addr(self, payload: bytes) -> None:
        _, _, desc, used, avail, _ = abi.VRING_ADDR.unpack(payload)
        ring = self._ring(payload)
        ring.desc, ring.used, ring.avail = map(self._guest_address, (desc, used, avail))

    def _set_kick(self, payload: bytes) -> None:
        ring = self._ring(payload)
        if self._running:
            raise HelperError("a new kick for a ring that runs")
        if ring.kick >= 0:
            os.close(ring.kick)
        ring.kick = self._take_fd(payload)
        self._start()

    def _set_call(self, payload: bytes) -> None:
        """While the ring runs too, when the guest masks its interrupt: the number stays the same.

        Until now an interrupt may have gone where nobody looks any more, and with event index (§2.7.7)
        the guest would not get another: so it gets one too many.
        """
        ring, fd = self._ring(payload), self._take_fd(payload)
        if ring.call < 0:
            ring.call = fd
        elif fd >= 0:
            os.dup2(fd, ring.call, inheritable=False)
            os.close(fd)
            if self._running:
                os.eventfd_write(ring.call, 1)

    def _set_enable(self, payload: bytes) -> None:
        self._ring(payload).enabled = bool(abi.VRING_STATE.unpack(payload)[1])
        self._start()

    def _get_base(self, payload: bytes) -> bytes:
        """It stops the ring. When this answers nobody here touches guest memory."""
        self._stop()
        ring = self._ring(payload)
        if ring.kick >= 0:
            os.close(ring.kick)
            ring.kick = -1
        return abi.VRING_STATE.pack(payload[0], ring.base)

    # -- rings --------------------------------------------------------------------------------

    def _ring(self, payload: bytes) -> Ring:
        """The one that a message is about: its first word, or the low byte of it."""
        index = payload[0] if len(payload) >= 8 else len(self._rings)
        if index >= len(self._rings):
            raise HelperError(f"no ring {index}")
        return self._rings[index]

    def _take_fd(self, payload: bytes) -> int:
        if _u64(payload) & NO_FD:
            return -1
        if len(self._fds) != 1:
            raise HelperError("an eventfd is missing")
        os.set_blocking(self._fds[0], False)
        return self._fds.pop()

    def _guest_address(self, theirs: int) -> int:
        for address, size, gpa in self._theirs:
            if 0 <= theirs - address < size:
                return gpa + theirs - address
        raise HelperError(f"a ring at {theirs:#x}, outside the memory that was shared")

    def _start(self) -> None:
        ready = all(min(r.kick, r.call) >= 0 and r.enabled for r in self._rings)
        if self._running or not ready or self._memory is None:
            return
        memory = self._memory
        places = [
            [index, ring.base, memory.read_u16(ring.used + 2)]
            for index, ring in enumerate(self._rings)
        ]
        self.device.load({"queues": places})
        self._running = True
        wirings = [
            QueueWiring(at, r.size, r.desc, r.avail, r.used, r.kick, r.call)
            for at, r in enumerate(self._rings)
        ]
        try:
            self.device.activate(memory, self._features | 1 << virtio.F_VERSION_1, wirings)
        except HostelError as error:
            self.device.fail(error)

    def _stop(self) -> None:
        if self._running:
            self._running = False
            for index, base, _ in self.device.save()["queues"]:
                self._rings[index].base = base
            self.device.reset()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop()
        self.device.close()
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        for fd in (*self._fds, *(fd for ring in self._rings for fd in (ring.kick, ring.call))):
            with contextlib.suppress(OSError):
                os.close(fd)


def _u64(payload: bytes) -> int:
    if len(payload) != abi.U64.size:
        raise HelperError(f"{len(payload)} bytes where 8 were due")
    return int(abi.U64.unpack(payload)[0])


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
