"""The host's side of one pair of queues: where the Python plane reads frames and writes them.

::

    TapPort      /dev/net/tun, /dev/tapN   a frame a call, its virtio header before it, offloads by the kernel
    StreamPort   a Unix stream socket      frames one after the other, each with its length before it (passt)

A frame always comes and goes with the 12 bytes of its virtio header (§5.1.6): to the driver both ports look
alike. Nothing here blocks: ``BlockingIOError`` where there is nothing to read or no room to write, as
``os.readv`` has it; a port that has failed for good raises ``HelperError``.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from hostel.abi import tun
from hostel.abi import virtio_net as abi
from hostel.errors import HelperError, HostError

from .queue import take, total

HEADER = abi.HDR.size
MAX_FRAME = HEADER + 14 + 4 + 65535
"""The header, Ethernet's and a VLAN tag's, and the longest IP packet: no segment is larger before GSO."""


class NetPort(Protocol):
    """One file descriptor, and what its frames look like."""

    fd: int
    features: int
    """What it adds to the device's features."""

    @property
    def buffered(self) -> bool:
        """Whether there may be frames in the port itself, of which its descriptor tells nothing."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Read one frame, which is cut off where ``buffers`` end; its length, header included."""

    @property
    def unsent(self) -> bool:
        """Whether a frame, or the rest of one, waits in the port itself for room: ``flush`` it then."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Write one frame, all of it; its length. ``OSError`` where the host refuses this frame."""

    def flush(self) -> bool:
        """Write what is still in the port; whether all of it went."""

    def set_offloads(self, offloads: int) -> None:
        """The GUEST_* features that frames to the driver may use."""

    def attach(self, attached: bool) -> None:
        """Whether this queue of several takes part."""

    def close(self) -> None: ...


class TapPort:
    """A tap's or macvtap's queue, opened with IFF_VNET_HDR; belongs to the port from now on."""

    buffered = unsent = False

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._attached = True
        os.set_blocking(fd, False)
        try:
            fcntl.ioctl(fd, tun.TUNSETVNETHDRSZ, HEADER.to_bytes(4, "little"))
        except OSError as error:
            raise HostError(
                f"the tap takes no virtio headers of {HEADER} bytes: {error.strerror}",
                cost="the NIC cannot use it",
                cure="open it with IFF_VNET_HDR",
            ) from None
        self.features = _features(self._possible_offloads())
        self.receive = partial(os.readv, fd)  # a call less for each frame
        self.send = partial(os.writev, fd)

    def _possible_offloads(self) -> int:
        """All that this kernel can do; older ones have no UFO."""
        for known in (_ALL_OFFLOADS, _ALL_OFFLOADS & ~tun.TUN_F_UFO, tun.TUN_F_CSUM):
            try:
                fcntl.ioctl(self.fd, tun.TUNSETOFFLOAD, known)
            except OSError:
                continue
            fcntl.ioctl(self.fd, tun.TUNSETOFFLOAD, 0)
            return known
        return 0

    def flush(self) -> bool:
        return True

    def set_offloads(self, offloads: int) -> None:
        flags = sum(flag for feature, flag in _OFFLOADS if offloads >> feature & 1)
        self._ask(tun.TUNSETOFFLOAD, flags)

    def attach(self, attached: bool) -> None:
        if attached != self._attached:
            flag = tun.IFF_ATTACH_QUEUE if attached else tun.IFF_DETACH_QUEUE
            self._ask(tun.TUNSETQUEUE, tun.IFREQ.pack(b"", flag, b""))
            self._attached = attached

    def _ask(self, request: int, argument: int | bytes) -> None:
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:  # it was deleted under us
            raise HelperError(f"the tap refuses us: {error.strerror}", cost=_COST) from None

    def close(self) -> None:
        os.close(self.fd)


_OFFLOADS = (
    (abi.F_GUEST_CSUM, tun.TUN_F_CSUM),
    (abi.F_GUEST_TSO4, tun.TUN_F_TSO4),
    (abi.F_GUEST_TSO6, tun.TUN_F_TSO6),
    (abi.F_GUEST_ECN, tun.TUN_F_TSO_ECN),
    (abi.F_GUEST_UFO, tun.TUN_F_UFO),
)
_ALL_OFFLOADS = sum(flag for _, flag in _OFFLOADS)
_HOST_SIDE = {
    abi.F_GUEST_CSUM: abi.F_CSUM,
    abi.F_GUEST_TSO4: abi.F_HOST_TSO4,
    abi.F_GUEST_TSO6: abi.F_HOST_TSO6,
    abi.F_GUEST_ECN: abi.F_HOST_ECN,
    abi.F_GUEST_UFO: abi.F_HOST_UFO,
}
"""What a kernel can hand out it can also take in."""


def _features(offloads: int) -> int:
    """The device's features for a tap that can do ``offloads`` (TUN_F_*)."""
    bits = [bit for bit, flag in _OFFLOADS if offloads & flag]
    bits += [_HOST_SIDE[bit] for bit in bits]
    return sum(1 << bit for bit in (*bits, abi.F_CTRL_GUEST_OFFLOADS))


LENGTH = 4
"""Bytes, big-endian, in front of each frame of a stream: QEMU's ``-netdev stream``, passt --one-off."""
_CHUNK = 256 << 10
_BACKLOG = 256 << 10
"""Bytes that a socket did not take and that wait in the port: at least one frame always may."""


class StreamPort:
    """A connected stream socket; belongs to the port from now on. No offloads."""

    features = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fd = sock.fileno()
        sock.setblocking(False)
        self._inbox = bytearray(_CHUNK)
        self._begin = self._end = 0
        self._outbox = b""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        while (size := self._frame_size()) is None:
            self._fill()
        start = self._begin + LENGTH
        self._begin = start + size
        with memoryview(self._inbox) as inbox:
            scatter(buffers, _PLAIN_HEADER, inbox[start : start + size])
        return HEADER + size

    @property
    def buffered(self) -> bool:
        return self._end > self._begin

    @property
    def unsent(self) -> bool:
        return bool(self._outbox)

    def _frame_size(self) -> int | None:
        """Of the frame that is wholly there."""
        there = self._end - self._begin
        if there < LENGTH:
            return None
        size = int.from_bytes(self._inbox[self._begin : self._begin + LENGTH], "big")
        if not 14 <= size <= MAX_FRAME - HEADER:
            raise HelperError(f"the network's stream has a frame of {size} bytes", cost=_COST)
        return size if there >= LENGTH + size else None

    def _fill(self) -> None:
        self._inbox[: self._end - self._begin] = self._inbox[self._begin : self._end]
        self._end -= self._begin
        self._begin = 0
        with memoryview(self._inbox) as inbox:
            try:
                size = self._sock.recv_into(inbox[self._end :])
            except ConnectionError:
                size = 0
        if not size:
            raise HelperError("the network's other end hung up", cost=_COST)
        self._end += size

    def send(self, buffers: Sequence[memoryview]) -> int:
        if self._outbox and not self.flush():
            raise BlockingIOError
        header, frame = take(buffers, HEADER)
        if any(b"".join(header)[:2]):
            raise OSError("the frame needs an offload that was not negotiated")
        length = total(frame).to_bytes(LENGTH, "big")
        try:
            sent = self._sock.sendmsg([length, *frame])
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            raise HelperError("the network's other end hung up", cost=_COST) from None
        if sent < LENGTH + total(frame):
            self._outbox = b"".join([length, *frame])[sent:]
        return HEADER + total(frame)

    def flush(self) -> bool:
        try:
            while self._outbox:
                self._outbox = self._outbox[self._sock.send(self._outbox) :]
        except BlockingIOError:
            return False
        except ConnectionError:
            raise HelperError("the network's other end hung up", cost=_COST) from None
        return True

    def set_offloads(self, offloads: int) -> None:
        """None was offered."""

    def attach(self, attached: bool) -> None:
        """There is one queue."""

    def close(self) -> None:
        self._sock.close()


_COST = "the NIC no longer works"
_PLAIN_HEADER = abi.HDR.pack(0, abi.HDR_GSO_NONE, 0, 0, 0, 0, 1)


def scatter(buffers: Sequence[memoryview], *parts: bytes | memoryview) -> None:
    """Copy ``parts``, one after the other, into ``buffers`` as far as they reach."""
    data = b"".join(parts)
    done = 0
    for buffer in buffers:
        if done >= len(data):
            return
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)
