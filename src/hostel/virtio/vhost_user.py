"""The vhost-user data plane: the device's queues are served by another process.

::

    this process ── Unix socket: memory (a memfd), ring addresses, eventfds ──► backend
    guest ── ioeventfd (kick) ────────────────────────────────────────────────► backend
    guest ◄─ irqfd (call) ────────────────────────────────────────────────────  backend

After the set-up this process is not on the path. ``Frontend`` is the protocol (QEMU's
docs/interop/vhost-user.rst), ``VhostUserDevice`` a virtio device on it.

What the backend sends is checked like any input: an answer of the wrong kind or size, or none in
time, ends the connection with a ``HelperError``; so does the backend's death. The device then needs a
reset that it will not recover from, and the machine lives.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HelperError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import RING_FEATURES, QueueWiring, VirtioDevice
from .queue import check_rings

TIMEOUT = 10.0
"""Seconds that a backend has for an answer. Stopping a ring waits for the requests in it."""


class Frontend:
    """One connection to a backend. Not thread-safe; raises ``HelperError``."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self.protocol_features = 0
        self._sock = sock
        self._sock.settimeout(TIMEOUT)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    # -- what can be asked --------------------------------------------------------------------

    def get_features(self) -> int:
        return self._get_u64(abi.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self._set(abi.SET_FEATURES, abi.U64.pack(features))

    def negotiate(self, wanted: int) -> None:
        """Settle on the protocol features that both know. Before anything but ``get_features``."""
        common = self._get_u64(abi.GET_PROTOCOL_FEATURES) & wanted
        self._send(abi.SET_PROTOCOL_FEATURES, abi.U64.pack(common))
        self.protocol_features = common

    def has(self, bit: int) -> bool:
        return bool(self.protocol_features >> bit & 1)

    def set_owner(self) -> None:
        self._set(abi.SET_OWNER)

    def shake_hands(self, *protocol_features: int) -> int:
        """Everything that comes before the rings: what the backend offers, if we can talk with it."""
        offered = self.get_features()
        for bit, lack in (
            (virtio.F_VERSION_1, "knows legacy virtio only"),
            (abi.F_PROTOCOL_FEATURES, "has no protocol features"),
        ):
            if not offered >> bit & 1:
                raise HelperError(f"{self.name}: the vhost-user backend {lack}")
        self.negotiate(sum(1 << bit for bit in protocol_features))
        self.set_owner()
        return offered

    def get_queue_num(self) -> int:
        return self._get_u64(abi.GET_QUEUE_NUM)

    def set_mem_table(self, memory: GuestMemory) -> None:
        """Every region by file descriptor, and by our own address, which ring addresses use."""
        regions = memory.regions
        payload = abi.MEMORY_HEADER.pack(len(regions), 0) + b"".join(
            abi.MEMORY_REGION.pack(at.gpa, at.size, at.hva, at.offset) for at in regions
        )
        self._set(abi.SET_MEM_TABLE, payload, [memory.fd] * len(regions))

    def set_vring_num(self, index: int, size: int) -> None:
        self._set(abi.SET_VRING_NUM, abi.VRING_STATE.pack(index, size))

    def set_vring_base(self, index: int, base: int) -> None:
        self._set(abi.SET_VRING_BASE, abi.VRING_STATE.pack(index, base))

    def get_vring_base(self, index: int) -> int:
        """Stop the ring; the next available index. When it returns the backend is done with it."""
        request = abi.VRING_STATE.pack(index, 0)
        answer = self._ask(abi.GET_VRING_BASE, request, abi.VRING_STATE.size)
        answered, base = abi.VRING_STATE.unpack(answer)
        if answered != index or base > 0xFFFF:
            raise self._broken(f"answered for ring {answered}, index {base}")
        return int(base)

    def set_vring_addr(self, index: int, *, desc: int, used: int, avail: int) -> None:
        """Host virtual addresses in this process (vhost-user.rst, "A vring address description")."""
        self._set(abi.SET_VRING_ADDR, abi.VRING_ADDR.pack(index, 0, desc, used, avail, 0))

    def set_vring_kick(self, index: int, fd: int) -> None:
        self._set(abi.SET_VRING_KICK, abi.U64.pack(index), [fd])

    def set_vring_call(self, index: int, fd: int) -> None:
        self._set(abi.SET_VRING_CALL, abi.U64.pack(index), [fd])

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self._set(abi.SET_VRING_ENABLE, abi.VRING_STATE.pack(index, enable))

    def get_config(self, offset: int, size: int) -> bytes:
        """Part of the device's config space, for backends that own it (block, for one)."""
        if not 0 < size <= abi.MAX_CONFIG_SIZE:
            raise ValueError(f"{size} bytes of config space")
        header = abi.CONFIG_HEADER.pack(offset, size, 0)
        expected = abi.CONFIG_HEADER.size + size
        answer = self._ask(abi.GET_CONFIG, header + bytes(size), expected)
        return answer[abi.CONFIG_HEADER.size :]

    def set_config(self, offset: int, data: bytes) -> None:
        self._set(abi.SET_CONFIG, abi.CONFIG_HEADER.pack(offset, len(data), 0) + data)

    def send_rarp(self, mac: bytes) -> None:
        """Have the network told that ``mac`` is here now, for a driver that cannot do it itself."""
        self._set(abi.SEND_RARP, mac.ljust(abi.U64.size, b"\0"))

    def net_set_mtu(self, mtu: int) -> None:
        self._set(abi.NET_SET_MTU, abi.U64.pack(mtu))

    def set_status(self, status: int) -> None:
        """The virtio device status (§2.1), for a backend that wants to know."""
        self._set(abi.SET_STATUS, abi.U64.pack(status))

    # -- rings --------------------------------------------------------------------------------

    def start_ring(self, memory: GuestMemory, wiring: QueueWiring, base: int) -> None:
        """All but what enables it. The kick comes last: from then on the backend works
        (vhost-user.rst, "Ring states")."""
        index = wiring.index
        self.set_vring_num(index, wiring.size)
        self.set_vring_base(index, base)
        self.set_vring_addr(
            index,
            desc=memory.hva(wiring.desc),
            used=memory.hva(wiring.used),
            avail=memory.hva(wiring.avail),
        )
        self.set_vring_call(index, wiring.call)
        self.set_vring_kick(index, wiring.kick)

    # -- messages -----------------------------------------------------------------------------

    def _set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without an answer of its own: with REPLY_ACK the backend says how it went."""
        acknowledged = self.has(abi.PROTOCOL_F_REPLY_ACK)
        self._send(request, payload, fds, abi.FLAG_NEED_REPLY if acknowledged else 0)
        if acknowledged and (code := abi.U64.unpack(self._receive(request, abi.U64.size))[0]):
            raise self._broken(f"refused request {request} with {code}")

    def _get_u64(self, request: int) -> int:
        return int(abi.U64.unpack(self._ask(request, b"", abi.U64.size))[0])

    def _ask(self, request: int, payload: bytes, expected: int) -> bytes:
        self._send(request, payload)
        return self._receive(request, expected)

    def _send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        message = abi.HEADER.pack(request, abi.VERSION | flags, len(payload)) + payload
        try:
            sent = socket.send_fds(self._sock, [message], fds)
            self._sock.sendall(message[sent:])
        except OSError as error:
            raise self._broken(str(error)) from None

    def _receive(self, request: int, expected: int) -> bytes:
        answered, flags, size = abi.HEADER.unpack(self._read(abi.HEADER.size))
        if flags & abi.VERSION_MASK != abi.VERSION or not flags & abi.FLAG_REPLY:
            raise self._broken(f"sent flags {flags:#x} where an answer was due")
        if answered != request or size != expected:
            raise self._broken(
                f"answered request {request} with {answered}, {size} bytes instead of {expected}"
            )
        return self._read(size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self._sock.recv(size - len(data))
            except OSError as error:
                raise self._broken(str(error)) from None
            if not part:
                raise self._broken("hung up")
            data += part
        return data

    def _broken(self, what: str) -> HelperError:
        return HelperError(
            f"{self.name}: the vhost-user backend {what}", cost="the device no longer works"
        )


class VhostUserDevice(VirtioDevice):
    """``sock`` is connected to a backend of this device, and belongs to the device from now on."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        *,
        name: str,
        queue_sizes: tuple[int, ...],
        device_features: int = 0,
        again: Callable[[], socket.socket] | None = None,
    ) -> None:
        """``device_features``: bits of this device that we understand, if the backend has them. ``again``
        connects to a backend that lives on when it has hung up on a guest that breaks the rules."""
        super().__init__()
        self.name = name
        self.queue_sizes = queue_sizes
        self._loop = loop
        self._again = again
        self._lock = threading.RLock()
        self._memory: GuestMemory | None = None
        self._wirings: list[QueueWiring] = []
        self._bases: dict[int, int] = {}
        self._known = 1 << virtio.F_VERSION_1 | RING_FEATURES | device_features
        self._connect(sock)

    def _connect(self, sock: socket.socket) -> None:
        self.frontend = Frontend(sock, self.name)
        self._alive, self._met = True, False
        self._loop.add(self.frontend.fileno(), self._hung_up, read=False)

    def prepare(self) -> None:
        """Only now: a backend that is just being started has time until a driver asks."""
        with self._lock:
            if not self._alive and self._again is not None:
                self._connect(self._again())
            self._require_alive()
            if not self._met:
                self.features = self._shake_hands() & self._known
                self._met = True

    def _require_alive(self) -> None:
        if not self._alive:
            raise HelperError(f"{self.name}: the vhost-user backend is gone")

    def _shake_hands(self) -> int:
        offered = self.frontend.shake_hands(
            abi.PROTOCOL_F_MQ, abi.PROTOCOL_F_REPLY_ACK, abi.PROTOCOL_F_CONFIG
        )
        if self.frontend.has(abi.PROTOCOL_F_MQ):
            most = self.frontend.get_queue_num()
            if most < len(self.queue_sizes):
                raise HelperError(
                    f"{self.name}: the vhost-user backend has {most} queues, not {len(self.queue_sizes)}"
                )
        return offered

    # -- life cycle ---------------------------------------------------------------------------

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        with self._lock:
            self._require_alive()
            for wiring in queues:
                # The backend is handed nothing that is not a well-formed ring in guest memory.
                check_rings(memory, wiring.size, wiring.desc, wiring.avail, wiring.used)
            self.frontend.set_features(features | 1 << abi.F_PROTOCOL_FEATURES)
            self.frontend.set_mem_table(memory)
            self._memory, self._wirings = memory, []
            for wiring in queues:
                self._start_ring(memory, wiring)
                self._wirings.append(wiring)
            self._bases = {}

    def reset(self) -> None:
        with self._lock:
            self._stop_rings()
            self._wirings, self._bases, self._memory = [], {}, None
            self.fault = None

    def close(self) -> None:
        self.reset()
        with self._lock:
            self._disconnect()

    def save(self) -> dict[str, Any]:
        """The rings' positions. What the backend itself remembers (open files) is not in it."""
        with self._lock:
            bases = self._stop_rings()
            self._bases = dict(bases)
            if self._memory is not None and self._alive:
                for wiring in self._wirings:
                    self._start_ring(self._memory, wiring)
            self._bases = {}
            return {"queues": [[index, base, base] for index, base in bases]}

    def load(self, state: dict[str, Any]) -> None:
        self._bases = {index: avail for index, avail, _ in state["queues"]}

    # -- rings --------------------------------------------------------------------------------

    def _start_ring(self, memory: GuestMemory, wiring: QueueWiring) -> None:
        self.frontend.start_ring(memory, wiring, self._bases.get(wiring.index, 0))
        self.frontend.set_vring_enable(wiring.index, True)

    def _stop_rings(self) -> list[tuple[int, int]]:
        """When it returns the backend does not touch guest memory: it said so, or it is cut off.

        A backend that is cut off may still finish what it has begun; the machine's memory is then
        its to harm, as it was all along, but no ring of this device is read again.
        """
        bases = []
        try:
            for wiring in self._wirings if self._alive else ():
                bases.append((wiring.index, self.frontend.get_vring_base(wiring.index)))
        except HelperError as error:
            self._disconnect()
            self.on_fault(self, error)
        return bases

    def _hung_up(self) -> None:
        """The event loop saw the connection end."""
        with self._lock:
            if self._alive:
                self._disconnect()
                self.fail(
                    HelperError(
                        f"{self.name}: the vhost-user backend hung up",
                        cost="what the guest asks of it stays without an answer",
                    )
                )

    def _disconnect(self) -> None:
        if self._alive:
            self._alive = False
            self._loop.remove(self.frontend.fileno())
            self.frontend.close()


def connect(path: str | os.PathLike[str], what: str) -> socket.socket:
    """To a backend, ``what``, whose socket is bound already; it may come to listen later."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise HelperError(f"{what} at {path} cannot be reached: {error.strerror}") from None
    return sock
