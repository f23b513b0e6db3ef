"""The devices that the table of malicious cases is played on: how each is made, what an ordinary request
looks like, how one sees that it works, and which well-formed chains lie in what they carry.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec

from hostel.abi import virtio as abi
from hostel.abi import virtio_net as net
from hostel.virtio.balloon import Balloon
from hostel.virtio.block import Block
from hostel.virtio.console import Console, Port
from hostel.virtio.device import VirtioDevice
from hostel.virtio.net import Net
from hostel.virtio.net_port import StreamPort
from hostel.virtio.net_python import PythonPlane
from hostel.virtio.rng import Rng
from hostel.virtio.vsock import Vsock
from virtio.rig import PATIENCE, Driver, Rig, eventually

MAC = bytes.fromhex("525400aabb01")
CID = 7
ETHERNET = b"\xff" * 6 + MAC + b"\x88\xb5"
Lie = tuple[int, Sequence[bytes], Sequence[int]]
"""A queue, readable buffers, writable ones."""


def _silent(data: bytes) -> None:
    pass


class Made(msgspec.Struct):
    """A device, and the host's side of it."""

    device: VirtioDevice
    works: Callable[[Driver], None]
    """Fails unless the started device answers as it should."""
    speak: Callable[[bytes], None] = _silent
    """Something comes from the host."""


class Subject(msgspec.Struct, frozen=True):
    name: str
    make: Callable[[Rig, Path, ExitStack], Made]
    hot: dict[int, tuple[Sequence[bytes], Sequence[int]]]
    """Queues whose chains are taken as soon as they are offered, each with an ordinary request."""
    lies: dict[str, Lie]
    features: int = 0


def _ones(format: str) -> bytes:
    return b"\xff" * struct.calcsize(format)


# -- console ------------------------------------------------------------------------------------


def _console(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    ports = []
    outputs: list[socket.socket] = []
    for name in ("hvc0", "agent"):
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        ours.setblocking(False)
        outputs.append(ours)
        ports.append(Port(name, theirs.detach(), console=name == "hvc0"))

    def works(driver: Driver) -> None:
        _drained(outputs[0])
        driver.queues[1].add([b"hello"])
        driver.kick(1)
        driver.wait(1)
        assert eventually(lambda: _drained(outputs[0]).endswith(b"hello"))

    return Made(Console(rig.loop, ports), works, partial(_send, outputs[1]))


def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(BlockingIOError):
        sock.send(data)


def _drained(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(1 << 16):
            data += part
    except BlockingIOError:
        pass
    return data


def _control(id: int, event: int, value: int = 1) -> bytes:
    return abi.CONSOLE_CONTROL.pack(id, event, value)


CONSOLE = Subject(
    "console",
    _console,
    {1: ([b"output"], []), 3: ([_control(0, abi.CONSOLE_PORT_READY)], [])},
    {
        "a port that is not there": (3, [_control(2**32 - 1, abi.CONSOLE_PORT_OPEN)], []),
        "an unknown event": (3, [_control(0, 0xFFFF)], []),
        "a short message": (3, [b"\0\0"], []),
        "a long message": (3, [_control(1, abi.CONSOLE_PORT_OPEN) + os.urandom(60000)], []),
        "the host's own messages": (3, [_control(0, abi.CONSOLE_PORT_ADD)], []),
        "output with room to write": (1, [b"x"], [4096]),
        "output of nothing": (1, [], [4096]),
        "much output": (1, [bytes(60000)] * 8, []),
        "a closed port writes": (5, [bytes(5000)], []),
    },
    features=1 << abi.CONSOLE_F_MULTIPORT,
)


# -- entropy ------------------------------------------------------------------------------------


def _rng(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    def works(driver: Driver) -> None:
        assert driver.request(0, [], [64]).written == 64

    return Made(Rng(rig.loop), works)


RNG = Subject(
    "rng",
    _rng,
    {0: ([], [64])},
    {"no room": (0, [b"readable"], []), "much room": (0, [], [500_000])},
)


# -- block --------------------------------------------------------------------------------------

SECTORS = 256


def _block(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    image = folder / "disk"
    image.write_bytes(b"disk".ljust(SECTORS * 512, b"\0"))

    def works(driver: Driver) -> None:
        data = os.urandom(512)
        written = driver.request(0, [_request(abi.BLK_T_OUT, 9), data], [1])
        assert written.data == b"\0"
        read = driver.request(0, [_request(abi.BLK_T_IN, 9)], [512, 1])
        assert read.data == data + b"\0"
        assert image.stat().st_size == SECTORS * 512, "a disk does not grow"

    return Made(Block(rig.loop, str(image), name="disk"), works)


def _request(kind: int, sector: int) -> bytes:
    return abi.BLK_OUTHDR.pack(kind, 0, sector)


def _range(sector: int, count: int, flags: int = 0) -> bytes:
    return abi.BLK_RANGE.pack(sector, count, flags)


BLOCK = Subject(
    "block",
    _block,
    {0: ([_request(abi.BLK_T_IN, 0)], [512, 1])},
    {
        "read behind the end": (0, [_request(abi.BLK_T_IN, SECTORS)], [512, 1]),
        "read across the end": (0, [_request(abi.BLK_T_IN, SECTORS - 1)], [1024, 1]),
        "a sector that wraps": (0, [_request(abi.BLK_T_IN, 2**64 - 1)], [512, 1]),
        "a byte offset that wraps": (0, [_request(abi.BLK_T_OUT, 2**55), bytes(512)], [1]),
        "write behind the end": (0, [_request(abi.BLK_T_OUT, SECTORS), bytes(512)], [1]),
        "half a sector": (0, [_request(abi.BLK_T_OUT, 0), bytes(100)], [1]),
        "an unknown type": (0, [_request(2**32 - 1, 0)], [512, 1]),
        "half a header": (0, [bytes(8)], [512, 1]),
        "no room for the status": (0, [_request(abi.BLK_T_OUT, 0), bytes(512)], []),
        "nothing but a status": (0, [], [1]),
        "a discard without a range": (0, [_request(abi.BLK_T_DISCARD, 0)], [1]),
        "a discard of everything": (
            0,
            [_request(abi.BLK_T_DISCARD, 0), _range(0, 2**32 - 1)],
            [1],
        ),
        "a discard that wraps": (
            0,
            [_request(abi.BLK_T_DISCARD, 0), _range(2**64 - 1, 2)],
            [1],
        ),
        "zeroes behind the end": (
            0,
            [_request(abi.BLK_T_WRITE_ZEROES, 0), _range(SECTORS - 1, 2**31)],
            [1],
        ),
        "half a range": (0, [_request(abi.BLK_T_WRITE_ZEROES, 0), bytes(9)], [1]),
        "a thousand ranges": (
            0,
            [_request(abi.BLK_T_WRITE_ZEROES, 0), _range(0, 1) * 1000],
            [1],
        ),
        "the name in one byte": (0, [_request(abi.BLK_T_GET_ID, 0)], [1]),
        "a flush with data": (0, [_request(abi.BLK_T_FLUSH, 7), bytes(512)], [512, 1]),
    },
    features=1 << abi.BLK_F_FLUSH,
)


# -- net ----------------------------------------------------------------------------------------


def _net(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    ours.setblocking(False)
    plane = PythonPlane([StreamPort(theirs)])

    waiting = bytearray()

    def speak(data: bytes) -> None:
        """A frame; what the socket does not take goes before the next one."""
        frame = ETHERNET + data[:1400]
        if len(waiting) < 1 << 16:
            waiting.extend(len(frame).to_bytes(4, "big") + frame)
        with contextlib.suppress(BlockingIOError):
            del waiting[: ours.send(waiting)]

    def works(driver: Driver) -> None:
        _drained(ours)
        data = os.urandom(50)
        driver.queues[1].add([bytes(net.HDR.size) + ETHERNET + data])
        driver.kick(1)
        driver.wait(1)
        assert eventually(lambda: _drained(ours).endswith(data))
        for _ in range(10_000):  # what was said before comes first
            speak(data)
            driver.queues[0].add([], [2048])
            driver.kick(0)
            if driver.wait(0)[0].data[net.HDR.size :] == ETHERNET + data:
                break
        else:
            raise AssertionError("the frame did not come")
        assert driver.request(2, [_command(net.CTRL_RX, net.CTRL_RX_PROMISC, b"\1")], [1]).data == (
            bytes([net.OK])
        )

    return Made(Net(rig.loop, plane, mac=MAC), works, speak)


def _command(group: int, number: int, data: bytes) -> bytes:
    return net.CTRL_HDR.pack(group, number) + data


def _header(**fields: int) -> bytes:
    plain = dict.fromkeys(net.HDR.offsets, 0)
    return net.HDR.pack(*(plain | fields).values()) + ETHERNET + bytes(100)


HEADERS = {
    "all ones": _ones("12B") + ETHERNET + bytes(100),
    "an unknown GSO type": _header(gso_type=77, gso_size=1),
    "GSO of size 0": _header(gso_type=net.HDR_GSO_TCPV4, hdr_len=54),
    "GSO with a header longer than the frame": _header(
        gso_type=net.HDR_GSO_TCPV4, hdr_len=0xFFFF, gso_size=1400, flags=net.HDR_F_NEEDS_CSUM
    ),
    "a checksum behind the end": _header(
        flags=net.HDR_F_NEEDS_CSUM, csum_start=0xFFFF, csum_offset=0xFFFF
    ),
    "a count of buffers": _header(num_buffers=0xFFFF),
    "a short frame": bytes(net.HDR.size) + b"short",
    "nothing but a header": bytes(net.HDR.size),
    "less than a header": b"\0",
    "a very long frame": bytes(net.HDR.size) + ETHERNET + bytes(65535 + 14),
}
"""What stands before a frame that a driver sends."""

NET = Subject(
    "net",
    _net,
    {
        1: ([bytes(net.HDR.size) + ETHERNET + bytes(50)], []),
        2: ([_command(net.CTRL_RX, net.CTRL_RX_ALLMULTI, b"\1")], [1]),
    },
    {name: (1, [data], []) for name, data in HEADERS.items()}
    | {
        "a frame in a thousand pieces": (1, [b"\0"] * 12, []),
        "room where a frame should be": (1, [], [2048]),
        "a frame where room should be": (0, [bytes(2048)], []),
        "room for half a header": (0, [], [5]),
        "an unknown command": (2, [_command(99, 99, b"")], [1]),
        "half a command": (2, [b"\0"], [1]),
        "a long command": (2, [bytes(100_000)], [1]),
        "no room for the answer": (2, [_command(0, 0, b"\1")], []),
        "no command": (2, [], [1]),
        "a table of 4 Gi addresses": (
            2,
            [_command(net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, _ones("I") + bytes(60))],
            [1],
        ),
        "a VLAN that cannot be": (2, [_command(net.CTRL_VLAN, 0, b"\xff\xff")], [1]),
        "no pairs of queues": (2, [_command(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, bytes(2))], [1]),
        "many pairs of queues": (
            2,
            [_command(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, _ones("H"))],
            [1],
        ),
    },
    features=1 << net.F_CTRL_VQ | 1 << net.F_CTRL_RX | 1 << net.F_CTRL_VLAN | 1 << net.F_MRG_RXBUF,
)


# -- vsock --------------------------------------------------------------------------------------


def _vsock(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    def works(driver: Driver) -> None:
        """A request to a port where nobody listens is refused."""
        driver.queues[0].add([], [4096])
        driver.kick(0)
        driver.queues[1].add([_packet(abi.VSOCK_OP_REQUEST)])
        driver.kick(1)
        answer = abi.VSOCK_HDR.unpack(driver.wait(0)[0].data)
        assert answer[6] == abi.VSOCK_OP_RST

    return Made(Vsock(rig.loop, folder / "vsock", cid=CID), works)


def _packet(
    op: int,
    length: int = 0,
    *,
    cids: tuple[int, int] = (CID, abi.VSOCK_CID_HOST),
    ports: tuple[int, int] = (1024, 5000),
    kind: int = abi.VSOCK_TYPE_STREAM,
    rest: tuple[int, int, int] = (0, 1 << 16, 0),
) -> bytes:
    return abi.VSOCK_HDR.pack(*cids, *ports, length, kind, op, *rest)


VSOCK = Subject(
    "vsock",
    _vsock,
    {1: ([_packet(abi.VSOCK_OP_CREDIT_UPDATE)], [])},
    {
        "half a header": (1, [bytes(20)], []),
        "no header": (1, [], [100]),
        "longer than its chain": (1, [_packet(abi.VSOCK_OP_RW, 2**32 - 1), bytes(100)], []),
        "shorter than its chain": (1, [_packet(abi.VSOCK_OP_RW, 1), bytes(5000)], []),
        "another guest's address": (1, [_packet(abi.VSOCK_OP_REQUEST, cids=(8, 2))], []),
        "to another guest": (1, [_packet(abi.VSOCK_OP_REQUEST, cids=(CID, 8))], []),
        "addresses of 64 bits": (
            1,
            [_packet(abi.VSOCK_OP_REQUEST, cids=(2**64 - 1, 2**64 - 1))],
            [],
        ),
        "an unknown type": (1, [_packet(abi.VSOCK_OP_REQUEST, kind=0xFFFF)], []),
        "an unknown operation": (1, [_packet(0xFFFF)], []),
        "operation 0": (1, [_packet(0)], []),
        "data of no connection": (1, [_packet(abi.VSOCK_OP_RW, 5), b"hello"], []),
        "an answer to nothing": (1, [_packet(abi.VSOCK_OP_RESPONSE)], []),
        "a credit that cannot be": (
            1,
            [_packet(abi.VSOCK_OP_CREDIT_UPDATE, rest=(0, 2**32 - 1, 2**32 - 1))],
            [],
        ),
        "ports that cannot be": (
            1,
            [_packet(abi.VSOCK_OP_REQUEST, ports=(2**32 - 1, 2**32 - 1))],
            [],
        ),
        "every flag": (1, [_packet(abi.VSOCK_OP_SHUTDOWN, rest=(2**32 - 1, 0, 0))], []),
        "room for half a header": (0, [], [20]),
        "an event to us": (2, [bytes(8)], []),
    },
)


# -- balloon ------------------------------------------------------------------------------------


def _balloon(rig: Rig, folder: Path, stack: ExitStack) -> Made:
    def works(driver: Driver) -> None:
        page = driver.queues[0].end >> 12  # nobody's
        rig.memory.write(page << 12, b"used")
        driver.request(0, [page.to_bytes(4, "little")])
        assert rig.memory.read(page << 12, 4) == bytes(4)

    return Made(Balloon(rig.loop, rig.memory.size), works)


PAGE = ((20 << 20) >> 12).to_bytes(4, "little")
BALLOON = Subject(
    "balloon",
    _balloon,
    {0: ([PAGE], []), 1: ([PAGE], []), 3: ([], [8192])},
    {
        "a page outside memory": (0, [_ones("I")], []),
        "pages outside memory": (0, [_ones("500I")], []),
        "no page": (0, [], [100]),
        "half a page number": (0, [b"\0"], []),
        "a page that was not there, back": (1, [_ones("I")], []),
        "many page numbers": (1, [os.urandom(100_000)], []),
        "unknown statistics": (2, [_ones("10B") * 100], []),
        "half a statistic": (2, [b"\0\0\0"], []),
        "a report of less than a page": (3, [], [100]),
        "a report to read": (3, [bytes(8192)], []),
    },
    features=1 << abi.BALLOON_F_STATS_VQ | 1 << abi.BALLOON_F_REPORTING,
)

SUBJECTS = (CONSOLE, RNG, BLOCK, NET, VSOCK, BALLOON)
BOUND = PATIENCE / 2
"""Seconds within which another device answers, whatever the subject is made to do."""
