"""What the card does to a frame on its way out: checksums, segments, VLAN tags. Plain bytes, no card.

8254x SDM §3.4 (TCP segmentation) and §3.5 (checksum offloading). A checksum is of 16-bit words in ones'
complement: that is arithmetic modulo 65535, which Python's integers do faster than a loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from hostel.abi import e1000 as abi
from hostel.abi import virtio_net

Buffer = bytes | bytearray | memoryview

MAX_SEGMENTS = 1024
"""More of one frame are a driver's mischief: it is dropped."""
_IPV6_HEADER = 40
_TCP_FIN, _TCP_PSH = 0x01, 0x08


class Context(msgspec.Struct, frozen=True):
    """The last context descriptor (§3.3.6): where the headers are. An end of 0 is the frame's."""

    ipcss: int = 0
    ipcso: int = 0
    ipcse: int = 0
    tucss: int = 0
    tucso: int = 0
    tucse: int = 0
    hdrlen: int = 0
    mss: int = 0
    tcp: bool = False
    ipv4: bool = False

    @classmethod
    def of(cls, descriptor: bytes) -> Context:
        ipcss, ipcso, ipcse, tucss, tucso, tucse, lower, _, hdrlen, mss = abi.TX_CONTEXT.unpack(
            descriptor
        )
        tcp, ipv4 = bool(lower & abi.TX_CONTEXT_TCP), bool(lower & abi.TX_CONTEXT_IPV4)
        return cls(ipcss, ipcso, ipcse, tucss, tucso, tucse, hdrlen, mss, tcp, ipv4)


def checksum(data: Buffer) -> int:
    """The sum, not its complement. An odd byte at the end is a word's high half."""
    number = int.from_bytes(data, "big")
    if len(data) % 2:
        number <<= 8
    return number % 0xFFFF or (0xFFFF if number else 0)


def insert_checksum(frame: bytearray, start: int, at: int, end: int) -> None:
    """Put the checksum of ``start`` to ``end`` (inclusive) at ``at``, whose value before is part of it:
    a driver leaves the pseudo header's sum there. Out of the frame: nothing happens."""
    if at + 2 <= len(frame):
        area = frame[start : end + 1 if end else None]
        frame[at : at + 2] = (~checksum(area) & 0xFFFF).to_bytes(2, "big")


def tagged(parts: Sequence[Buffer], ethertype: int, tag: int) -> list[Buffer]:
    """The frame with a VLAN tag after its two addresses (IEEE 802.1Q §9.6)."""
    whole = b"".join(parts)
    return [whole[:12], ethertype.to_bytes(2, "big") + tag.to_bytes(2, "big"), whole[12:]]


# --- TCP segmentation ------------------------------------------------------------------------------


def segments(frame: bytes, context: Context, options: int) -> Iterator[bytearray]:
    """The frame as packets of at most ``mss`` bytes of payload (§3.4.7)."""
    size, payload = context.hdrlen, len(frame) - context.hdrlen
    count = -(-payload // context.mss) if context.mss else 0
    if not 0 < count <= MAX_SEGMENTS or not headers_fit(context):
        return
    for number in range(count):
        start = size + number * context.mss
        segment = bytearray(frame[:size]) + frame[start : start + context.mss]
        _set_lengths(segment, len(segment), context)
        if context.ipv4:
            _add(segment, context.ipcss + 4, number)  # identification
        if context.tcp:
            _advance_tcp(segment, context.tucss, number * context.mss, last=number + 1 == count)
        _add_sum(segment, context.tucso, len(segment) - context.tucss)
        if options & abi.TX_POPTS_IXSM:
            insert_checksum(segment, context.ipcss, context.ipcso, context.ipcse)
        if options & abi.TX_POPTS_TXSM:
            insert_checksum(segment, context.tucss, context.tucso, context.tucse)
        yield segment


def large_frame(head: bytearray, size: int, context: Context, shift: int) -> bytes:
    """The virtio header that lets the host's kernel cut a TCP frame of ``size`` bytes. ``head``, its
    headers, is completed: lengths and the pseudo header's sum are the whole frame's then."""
    _set_lengths(head, size, context)
    if context.ipv4:
        head[context.ipcso : context.ipcso + 2] = b"\0\0"
        ip_header = head[context.ipcss : context.tucss]
        head[context.ipcso : context.ipcso + 2] = (~checksum(ip_header) & 0xFFFF).to_bytes(2, "big")
    _add_sum(head, context.tucso, size - context.tucss)
    kind = virtio_net.HDR_GSO_TCPV4 if context.ipv4 else virtio_net.HDR_GSO_TCPV6
    return partial_checksum(context, shift, kind, context.hdrlen + shift, context.mss)


def partial_checksum(
    context: Context, shift: int = 0, kind: int = 0, hdrlen: int = 0, mss: int = 0
) -> bytes:
    """The virtio header that leaves the checksum to the host. ``shift``: bytes of a VLAN tag before it."""
    start, offset = context.tucss + shift, context.tucso - context.tucss
    flags = virtio_net.HDR_F_NEEDS_CSUM
    return virtio_net.HDR.pack(flags, kind, hdrlen, mss, start, offset, 0)


def headers_fit(context: Context) -> bool:
    """Whether all that is written into the headers lies in them, in their order."""
    ip_end = context.ipcss + (20 if context.ipv4 else _IPV6_HEADER)
    transport_end = context.tucss + (20 if context.tcp else 8)
    ordered = ip_end <= context.tucss and transport_end <= context.hdrlen
    sums_inside = context.tucss <= context.tucso < context.hdrlen - 1
    ip_sum_inside = not context.ipv4 or context.ipcss <= context.ipcso < context.tucss - 1
    return ordered and sums_inside and ip_sum_inside


def _set_lengths(head: bytearray, size: int, context: Context) -> None:
    """The IP packet's length; of UDP its own too. All of a frame of ``size`` bytes."""
    at, counted = (2, context.ipcss) if context.ipv4 else (4, context.ipcss + _IPV6_HEADER)
    _put(head, context.ipcss + at, size - counted)
    if not context.tcp:
        _put(head, context.tucss + 4, size - context.tucss)


def _advance_tcp(segment: bytearray, at: int, offset: int, *, last: bool) -> None:
    sequence = int.from_bytes(segment[at + 4 : at + 8], "big") + offset & 0xFFFF_FFFF
    segment[at + 4 : at + 8] = sequence.to_bytes(4, "big")
    if not last:
        segment[at + 13] &= ~(_TCP_FIN | _TCP_PSH)


def _put(data: bytearray, at: int, value: int) -> None:
    data[at : at + 2] = (value & 0xFFFF).to_bytes(2, "big")


def _add(data: bytearray, at: int, value: int) -> None:
    _put(data, at, int.from_bytes(data[at : at + 2], "big") + value)


def _add_sum(data: bytearray, at: int, value: int) -> None:
    """In ones' complement: the pseudo header's sum lacks the length, which the card adds (§3.4.6)."""
    total = int.from_bytes(data[at : at + 2], "big") + value
    _put(data, at, total % 0xFFFF or (0xFFFF if total else 0))
