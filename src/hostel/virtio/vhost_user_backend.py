"""The other side of vhost-user: a device with a Python data plane, served to a VMM in another process.

::

    VMM (ours, QEMU) ── Unix socket: memory, ring addresses, eventfds ──► Backend ──► device
    guest ── ioeventfd (kick) ────────────────────────────────────────────► device.serve(queue)
    guest ◄─ irqfd (call) ─────────────────────────────────────────────────

So engine ``qemu`` has the devices of ours that QEMU has not (``qemu/vsock.py``), and our file server is
a process of its own (``host/fileserver.py``). QEMU docs/interop/vhost-user.rst.

The rings run together: they start when each that has a kick is enabled, and stop when the first is
disabled, asked for its position or given another kick. Messages are taken as they come, on the event
loop: nothing waits for the rest of one. What the VMM sends is checked as far as it decides what is read
or mapped; what it gets wrong ends the connection. A guest's fault is the device's affair.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import msgspec

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HelperError, HostelError, QueueError
from hostel.memory import Region
from hostel.vmm.loop import EventLoop

from .device import QueueWiring
from .foreign import ForeignMemory
from .plane import QueueDevice

MAX_PAYLOAD = 4096


class Ring(msgspec.Struct):
    """What the VMM has said of one virtqueue so far."""

    size: int = 0
    base: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False

    def close_kick(self) -> None:
        if self.kick >= 0:
            os.close(self.kick)
            self.kick = -1


def _nothing() -> None:
    pass


class Backend:
    """Serves the first ``queues`` queues of ``device`` over ``sock``, and owns both."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        device: QueueDevice,
        *,
        queues: int,
        on_end: Callable[[], None] = _nothing,
    ) -> None:
        """``on_end`` is called when all is closed: ``error`` then says why, if the VMM did not hang up."""
        self.device = device
        self.error: HostelError | None = None
        self._on_end = on_end
        self._loop = loop
        self._sock = sock
        self._sock.setblocking(False)
        self._rings = [Ring() for _ in range(queues)]
        self._features = self._protocol_features = 0
        self._memory: ForeignMemory | None = None
        self._running: list[int] = []
        """The rings that ``device`` serves now."""
        self._closed = False
        self._header = self._payload = b""
        self._fds: list[int] = []
        self._handlers: dict[int, Callable[[bytes], bytes | None]] = {
            abi.GET_FEATURES: self._get_features,
            abi.SET_FEATURES: self._set_features,
            abi.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            abi.SET_PROTOCOL_FEATURES: self._set_protocol_features,
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
        except ConnectionError:
            cut = HelperError("the VMM hung up in the middle of a message")
            self._close(cut if self._header else None)
        except OSError as error:
            self._close(HelperError(f"what the VMM sent cannot be used: {error}"))
        except HostelError as error:
            self._close(error)

    def _read_message(self) -> bool:
        """Whether one is there, in ``_header`` and ``_payload``; its descriptors in ``_fds``."""
        try:
            self._header += self._read(abi.HEADER.size - len(self._header))
            if len(self._header) < abi.HEADER.size:
                return False
            request, flags, size = abi.HEADER.unpack(self._header)
            if flags & abi.VERSION_MASK != abi.VERSION or size > MAX_PAYLOAD:
                raise HelperError(f"the VMM sent request {request}, flags {flags:#x}, {size} bytes")
            self._payload += self._read(size - len(self._payload))
        except BlockingIOError:
            return False
        return len(self._payload) == int(size)

    def _read(self, size: int) -> bytes:
        if not size:
            return b""
        data, fds, _, _ = socket.recv_fds(
            self._sock, size, abi.MAX_REGIONS, socket.MSG_CMSG_CLOEXEC
        )
        self._fds += fds
        if len(self._fds) > abi.MAX_REGIONS:
            raise HelperError(f"the VMM sent {len(self._fds)} files with one message")
        if not data:
            raise ConnectionResetError
        return data

    def _handle(self, request: int, flags: int, payload: bytes) -> None:
        handler = self._handlers.get(request)
        if handler is None:
            raise HelperError(f"the VMM sent request {request}, which was not offered")
        try:
            answer = handler(payload)
        except struct.error:
            raise HelperError(f"the VMM sent request {request}, malformed") from None
        self._close_fds()
        acknowledged = self._protocol_features >> abi.PROTOCOL_F_REPLY_ACK & 1
        if answer is None and acknowledged and flags & abi.FLAG_NEED_REPLY:
            answer = abi.U64.pack(0)
        if answer is not None:
            reply = abi.HEADER.pack(request, abi.VERSION | abi.FLAG_REPLY, len(answer)) + answer
            self._sock.sendall(reply)  # a few bytes, and the peer waits for them

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    # -- requests -----------------------------------------------------------------------------

    def _get_features(self, _: bytes) -> bytes:
        return abi.U64.pack(self.device.features | 1 << abi.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes) -> None:
        (self._features,) = abi.U64.unpack(payload)

    def _get_protocol_features(self, _: bytes) -> bytes:
        offered = 1 << abi.PROTOCOL_F_MQ | 1 << abi.PROTOCOL_F_REPLY_ACK
        if self.device.config:
            offered |= 1 << abi.PROTOCOL_F_CONFIG
        return abi.U64.pack(offered)

    def _set_protocol_features(self, payload: bytes) -> None:
        (self._protocol_features,) = abi.U64.unpack(payload)

    def _get_config(self, payload: bytes) -> bytes:
        offset, size, flags = abi.CONFIG_HEADER.unpack_from(payload)
        if size > abi.MAX_CONFIG_SIZE:
            raise HelperError(f"the VMM wants {size} bytes of config space")
        return abi.CONFIG_HEADER.pack(offset, size, flags) + self.device.read_config(offset, size)

    def _set_mem_table(self, payload: bytes) -> None:
        """While rings run too: they keep their views, and find the next buffers in what is shown now."""
        count, _ = abi.MEMORY_HEADER.unpack_from(payload)
        if count != len(self._fds) or not count:
            raise HelperError(f"the VMM sent {len(self._fds)} files for {count} regions of memory")
        regions = []
        for index in range(count):
            at = abi.MEMORY_HEADER.size + index * abi.MEMORY_REGION.size
            gpa, size, address, offset = abi.MEMORY_REGION.unpack_from(payload, at)
            regions.append(Region(gpa, size, address, offset))
        if self._memory is None:
            self._memory = ForeignMemory(regions, self._fds)
        else:
            self._memory.show(regions, self._fds)

    def _set_num(self, payload: bytes) -> None:
        index, size = abi.VRING_STATE.unpack(payload)
        self._ring(index).size = size

    def _set_base(self, payload: bytes) -> None:
        index, base = abi.VRING_STATE.unpack(payload)
        self._ring(index).base = base & 0xFFFF

    def _set_addr(self, payload: bytes) -> None:
        index, _, desc, used, avail, _ = abi.VRING_ADDR.unpack(payload)
        ring, gpa_of = self._ring(index), self._require_memory().gpa_of
        ring.desc, ring.used, ring.avail = gpa_of(desc), gpa_of(used), gpa_of(avail)

    def _set_kick(self, payload: bytes) -> None:
        ring, fd = self._ring_and_fd(payload)
        self._stop()
        ring.close_kick()
        ring.kick = fd
        self._start()

    def _set_call(self, payload: bytes) -> None:
        """While the ring runs too, when the guest masks its interrupt: the number stays the same.

        Until now an interrupt may have gone where nobody looks any more, and with event index (§2.7.7)
        the guest would not get another: so it gets one too many.
        """
        ring, fd = self._ring_and_fd(payload)
        if fd < 0:
            fd = _unheard()
        if ring.call < 0:
            ring.call = fd
            return
        os.dup2(fd, ring.call, inheritable=False)
        os.close(fd)
        if self._running:
            os.eventfd_write(ring.call, 1)

    def _set_enable(self, payload: bytes) -> None:
        index, enabled = abi.VRING_STATE.unpack(payload)
        ring = self._ring(index)
        ring.enabled = bool(enabled)
        if not enabled and index in self._running:
            self._stop()
        self._start()

    def _get_base(self, payload: bytes) -> bytes:
        """It stops the ring. When this answers nobody here touches guest memory."""
        index, _ = abi.VRING_STATE.unpack(payload)
        ring = self._ring(index)
        self._stop()
        ring.close_kick()
        return abi.VRING_STATE.pack(index, ring.base)

    # -- rings --------------------------------------------------------------------------------

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise HelperError(f"the VMM speaks of ring {index}, of {len(self._rings)}")
        return self._rings[index]

    def _ring_and_fd(self, payload: bytes) -> tuple[Ring, int]:
        """Of a message with an eventfd, ours from now on; -1 where it says that there is none."""
        (word,) = abi.U64.unpack(payload)
        ring = self._ring(word & abi.VRING_INDEX)
        if word & abi.VRING_NO_FD:
            return ring, -1
        if len(self._fds) != 1:
            raise HelperError("the VMM sent no eventfd where one is due")
        os.set_blocking(self._fds[0], False)
        return ring, self._fds.pop()

    def _require_memory(self) -> ForeignMemory:
        if self._memory is None:
            raise HelperError("the VMM speaks of rings before it has shown memory")
        return self._memory

    def _start(self) -> None:
        """Unless all that could be served are.

        Without protocol features a ring is enabled from the start (vhost-user.rst, "Ring states").
        """
        always = not self._features >> abi.F_PROTOCOL_FEATURES & 1
        kicked = [index for index, ring in enumerate(self._rings) if ring.kick >= 0]
        if kicked == self._running or not all(always or self._rings[i].enabled for i in kicked):
            return
        self._stop()
        memory = self._require_memory()
        places = [[index, *_position(memory, self._rings[index])] for index in kicked]
        self.device.load({"queues": places})
        self._running = kicked
        features = self._features & self.device.features | 1 << virtio.F_VERSION_1
        try:
            self.device.activate_in(memory, features, list(map(self._wiring, kicked)))
        except QueueError as error:
            self.device.fail(error)

    def _wiring(self, index: int) -> QueueWiring:
        ring = self._rings[index]
        if ring.call < 0:
            ring.call = _unheard()
        return QueueWiring(index, ring.size, ring.desc, ring.avail, ring.used, ring.kick, ring.call)

    def _stop(self) -> None:
        if self._running:
            self._running = []
            for index, base, _ in self.device.save()["queues"]:
                self._rings[index].base = base
            self.device.reset()

    def _close(self, error: HostelError | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        self.error = error
        self._stop()
        self.device.close()
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        self._close_fds()
        for ring in self._rings:
            ring.close_kick()
            if ring.call >= 0:
                os.close(ring.call)
                ring.call = -1
        self._on_end()


def _position(memory: ForeignMemory, ring: Ring) -> tuple[int, int]:
    """What was used is written in the ring; only what was taken has to be told."""
    return ring.base, memory.view(ring.used + 2, 2).cast("H")[0]


def _unheard() -> int:
    """The call of a ring whose guest polls."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
