"""Packets of virtio-vsock (virtio 1.2 §5.10.6): a header in guest memory, and data behind it.

A driver may cut both over buffers as it likes (§2.7.4). What is too short for its header, or for the
length that this says, is no packet: the driver is broken, and its device stops.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.abi import virtio as abi
from hostel.errors import QueueError

from .queue import Chain, take, total
from .vsock_stream import WORD, Stream

HEADER = abi.VSOCK_HDR.size


class Packet(NamedTuple):
    """A header of the guest's."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


class Word(NamedTuple):
    """A packet without data for the guest; its header is made when there is room for it."""

    stream: Stream
    op: int
    flags: int = 0

    def header(self, cid: int) -> bytes:
        return header(self.stream, cid, self.op, flags=self.flags)


def parse(chain: Chain) -> tuple[Packet, list[memoryview]]:
    """A packet of the guest's, and its data where it lies. Read once: the guest may change it."""
    head, data = split(chain.readable)
    packet = Packet(*abi.VSOCK_HDR.unpack(b"".join(head)))
    data, _ = take(data, packet.len)
    if packet.len > total(data):
        raise QueueError(f"a packet of {packet.len} bytes in a chain of {chain.size}")
    return packet, data


def split(buffers: list[memoryview]) -> tuple[list[memoryview], list[memoryview]]:
    """A chain's buffers for the header, and those for data. Linux has a buffer for each, or one for both."""
    if buffers:
        first = buffers[0]
        if len(first) == HEADER:
            return buffers[:1], buffers[1:]
        if len(first) > HEADER:
            return [first[:HEADER]], [first[HEADER:], *buffers[1:]]
    head, data = take(buffers, HEADER)
    if total(head) < HEADER:
        raise QueueError(f"{total(head)} bytes where a packet's header should be")
    return head, data


def header(stream: Stream, cid: int, op: int, *, flags: int = 0, size: int = 0) -> bytes:
    """To the guest ``cid``. Each packet tells of our room too (§5.10.6.3)."""
    stream.reported = stream.forwarded
    return abi.VSOCK_HDR.pack(
        abi.VSOCK_CID_HOST,
        cid,
        stream.host_port,
        stream.guest_port,
        size,
        abi.VSOCK_TYPE_STREAM,
        op,
        flags,
        stream.window,
        stream.forwarded & WORD,
    )


def refusal(packet: Packet) -> bytes:
    """RST to a packet that belongs to no connection, from wherever it was sent to."""
    return abi.VSOCK_HDR.pack(
        packet.dst_cid,
        packet.src_cid,
        packet.dst_port,
        packet.src_port,
        0,
        packet.type,
        abi.VSOCK_OP_RST,
        0,
        0,
        0,
    )
