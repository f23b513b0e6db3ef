"""What the 82540EM does to frames: checksums and segments, against arithmetic done the slow way, and on a
real network stack: with a tap the kernel cuts, with a stream the card does."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from devices.e1000_driver import DATA, EOP, LAST, CardDriver
from hostel.abi import e1000 as abi
from hostel.abi import virtio_net
from hostel.devices.e1000 import offload
from hostel.devices.e1000.offload import Context
from hostel.spec import Limits, Rate
from hostel.virtio.net_port import LENGTH, StreamPort, TapPort
from virtio.netns import GUEST_IP, GUEST_MAC, HOST_IP, HOST_MAC, Namespace, make_tap, plug
from virtio.rig import Rig, eventually

TCP, IPV4 = abi.TX_CONTEXT_TCP, abi.TX_CONTEXT_IPV4
BOTH = abi.TX_POPTS_IXSM | abi.TX_POPTS_TXSM
TSE = abi.TX_CMD_TSE
HEADERS = 14 + 20 + 20
PORT = 6000


def slow_sum(data: bytes) -> int:
    """RFC 1071 §1."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("size", [0, 1, 2, 3, 19, 20, 1460, 1461, 65535])
def test_checksum(size: int) -> None:
    for data in (bytes(size), b"\xff" * size, bytes(range(256)) * (size // 256) + b"\x80\x01\xfe"):
        assert offload.checksum(data) == slow_sum(data)


def pseudo(length: int, protocol: int = 6) -> int:
    addresses = socket.inet_aton(GUEST_IP) + socket.inet_aton(HOST_IP)
    return slow_sum(addresses + struct.pack(">HH", protocol, length))


def tcp_frame(payload: bytes, *, flags: int = 0x19, length: int = 0) -> bytes:
    """As a driver hands it over for segmentation: no IP length, the pseudo header's sum without it."""
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 7, 0x4000, 64, 6, 0)
    ip += socket.inet_aton(GUEST_IP) + socket.inet_aton(HOST_IP)
    tcp = struct.pack(">HHIIBBHHH", 5000, PORT, 0xFFFF_FF00, 1, 0x50, flags, 1000, pseudo(0), 0)
    return b"".join((HOST_MAC, GUEST_MAC, b"\x08\x00", ip, tcp, payload))


CONTEXT = Context(14, 24, 33, 34, 50, 0, HEADERS, 1000, True, True)


def test_segments_are_good_packets() -> None:
    payload = bytes(range(256)) * 10
    found = [bytes(s) for s in offload.segments(tcp_frame(payload), CONTEXT, BOTH)]
    assert b"".join(segment[HEADERS:] for segment in found) == payload
    for number, segment in enumerate(found):
        assert int.from_bytes(segment[16:18], "big") == len(segment) - 14
        assert int.from_bytes(segment[18:20], "big") == 7 + number
        assert slow_sum(segment[14:34]) == 0xFFFF
        tcp = segment[34:]
        assert slow_sum(pseudo(len(tcp)).to_bytes(2, "big") + tcp) == 0xFFFF
        sequence = (0xFFFF_FF00 + 1000 * number) & 0xFFFF_FFFF
        assert int.from_bytes(tcp[4:8], "big") == sequence
        last = number + 1 == len(found)
        assert tcp[13] == (0x19 if last else 0x10), "FIN and PSH are the last one's"


def test_what_the_kernel_is_told_is_the_whole_packet() -> None:
    frame = tcp_frame(bytes(3000))
    head = bytearray(frame[:HEADERS])
    header = offload.large_frame(head, len(frame), CONTEXT, 0)
    flags, kind, size, mss, start, offset, _ = virtio_net.HDR.unpack(header)
    assert (flags, kind) == (virtio_net.HDR_F_NEEDS_CSUM, virtio_net.HDR_GSO_TCPV4)
    assert (size, mss, start, offset) == (HEADERS, 1000, 34, 16)
    assert slow_sum(bytes(head[14:34])) == 0xFFFF
    assert int.from_bytes(head[16:18], "big") == len(frame) - 14
    assert int.from_bytes(head[50:52], "big") == pseudo(len(frame) - 34)


@pytest.mark.parametrize(
    "changes",
    [
        {"mss": 0},
        {"mss": 1},
        {"hdrlen": 10},
        {"hdrlen": 255},
        {"tucso": 255},
        {"tucss": 250},
        {"ipcso": 200},
        {"ipcss": 240},
        {"tucso": HEADERS - 1},
    ],
)
def test_contexts_that_lie_give_nothing(changes: dict[str, int]) -> None:
    fields = {name: getattr(CONTEXT, name) for name in CONTEXT.__struct_fields__} | changes
    frame = tcp_frame(bytes(200 if "hdrlen" in changes else 3000))
    assert list(offload.segments(frame, Context(**fields), BOTH)) == []


# --- Through the card ------------------------------------------------------------------------------


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def stream(rig: Rig) -> Iterator[tuple[CardDriver, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    driver = CardDriver(rig, StreamPort(ours))
    driver.start()
    with theirs:
        yield driver, theirs
        driver.card.close()


def next_frame(sock: socket.socket) -> bytes:
    size = int.from_bytes(sock.recv(LENGTH, socket.MSG_WAITALL), "big")
    return sock.recv(size, socket.MSG_WAITALL)


def send_large(card: CardDriver, frame: bytes, mss: int) -> None:
    card.context((14, 24, 34, 50), hdrlen=HEADERS, mss=mss, bits=TCP | IPV4 | TSE)
    card.piece(frame[:HEADERS], DATA | TSE, BOTH)
    card.piece(frame[HEADERS:], DATA | TSE | LAST, BOTH)
    card.kick()


def test_segments_on_a_stream(stream: tuple[CardDriver, socket.socket]) -> None:
    card, sock = stream
    payload = bytes(range(256)) * 20
    send_large(card, tcp_frame(payload), 1460)
    found = [next_frame(sock) for _ in range(4)]
    assert b"".join(segment[HEADERS:] for segment in found) == payload
    assert card.sent
    assert card.get(abi.TSCTC) == 1
    assert card.get(abi.GPTC) == 4


def test_a_full_stream_waits_and_goes_on(stream: tuple[CardDriver, socket.socket]) -> None:
    card, sock = stream
    for number in range(12):
        card.start()
        for _ in range(4):
            send_large(card, tcp_frame(bytes((number,)) * 60000), 1460)
        if not card.sent:
            break
    assert not card.sent, "the socket took all"
    while not card.sent:
        if select.select([sock], [], [], 0.01)[0]:
            next_frame(sock)
    assert card.card.transmitter.dropped == 0


def test_a_checksum_by_the_card(stream: tuple[CardDriver, socket.socket]) -> None:
    card, sock = stream
    frame = tcp_frame(b"payload", length=47)
    length = len(frame) - 34
    frame = frame[:50] + pseudo(length).to_bytes(2, "big") + frame[52:]
    card.context((14, 24, 34, 50), bits=TCP | IPV4)
    card.piece(frame, DATA | LAST, BOTH)
    card.kick()
    sent = next_frame(sock)[: len(frame)]
    assert slow_sum(sent[14:34]) == 0xFFFF
    assert slow_sum(pseudo(length).to_bytes(2, "big") + sent[34:]) == 0xFFFF
    card.piece(frame, EOP | abi.TX_CMD_IC | 50 << 16 | abi.TX_CMD_RS, 34)  # legacy: CSO, CSS
    card.kick()
    legacy = next_frame(sock)[: len(frame)]
    assert legacy[34:] == sent[34:]


def test_a_rate_holds_in_both_directions(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    card = CardDriver(rig, StreamPort(ours), Limits(operations=Rate(50, burst=1)))
    card.start()
    out = tcp_frame(b"out" * 10)
    with theirs:
        theirs.settimeout(10)
        started = time.monotonic()
        for _ in range(5):
            card.piece(out, LAST)
        card.kick()
        for _ in range(5):
            assert next_frame(theirs)[: len(out)] == out
            incoming = out.replace(HOST_MAC + GUEST_MAC, GUEST_MAC + HOST_MAC)
            theirs.sendall(len(incoming).to_bytes(LENGTH, "big") + incoming)
            assert card.receive()[0][: len(out)] == incoming
        assert time.monotonic() - started > 8 / 50
        assert card.sent
        card.card.close()


def test_the_other_end_hangs_up(stream: tuple[CardDriver, socket.socket]) -> None:
    card, sock = stream
    sock.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: bool(card.faults))
    assert "hung up" in card.faults[0]
    assert not card.get(abi.STATUS) & abi.STATUS_LU


def test_a_large_frame_reaches_a_real_stack(rig: Rig) -> None:
    """The host's kernel refuses the connection it never knew (RST): only of a segment that is valid."""
    with Namespace() as net:
        make_tap(net)
        (fd,) = plug(net)
        card = CardDriver(rig, TapPort(fd))
        card.start()
        send_large(card, tcp_frame(bytes(5000), flags=0x10), 1460)
        data, _, _ = card.receive()
        assert data[12:14] == b"\x08\x00"
        assert data[23] == 6
        assert data[47] & 0x04, "RST"
        assert "InCsumErrors 0" in " ".join(
            net.run("nstat -az TcpInCsumErrors").replace("Tcp", "").split()
        )
        card.card.close()
