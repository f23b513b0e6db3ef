"""A NIC's driver that means harm, on a real tap: none of it reaches beyond the NIC.

After each case a well-behaved frame passes: on the same queues where the device goes on, and after a reset
where it stopped (NEEDS_RESET).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hostel.abi import virtio
from hostel.abi import virtio_net as abi
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, MAX_FRAME, TapPort
from hostel.virtio.net_python import PythonPlane
from virtio.netns import GUEST_MAC, HOST_MAC, Namespace, frame, make_tap, plug, raw_socket
from virtio.rig import Driver, Rig, wait_fd
from virtio.wire import PLAIN, RX, TX, offer, send

OFFLOADS = sum(
    1 << bit
    for bit in (
        *(abi.F_CSUM, abi.F_HOST_TSO4, abi.F_HOST_TSO6, abi.F_HOST_ECN, abi.F_MRG_RXBUF),
        *(abi.F_GUEST_CSUM, abi.F_GUEST_TSO4, abi.F_GUEST_TSO6),
    )
)
NEEDS = abi.HDR_F_NEEDS_CSUM
OUT = frame(b"out", to=HOST_MAC, sender=GUEST_MAC)


@pytest.fixture(scope="module")
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        make_tap(net)
        yield net


@pytest.fixture
def driver(rig: Rig, net: Namespace) -> Iterator[Driver]:
    plane = PythonPlane([TapPort(fd) for fd in plug(net)])
    driver = rig.on_pci(Net(rig.loop, plane, mac=GUEST_MAC))
    driver.start(OFFLOADS)
    yield driver
    rig.unseat(driver)


def works(driver: Driver, net: Namespace) -> None:
    with raw_socket(net) as wire:
        send(driver, OUT)
        while wire.recv(70_000) != OUT:
            pass
        wire.send(frame(b"in"))
        got: list[bytes] = []
        while frame(b"in") not in got:  # others may be waiting in the tap
            offer(driver, len(driver.queues[RX]._free))
            got += [done.data[HEADER:] for done in driver.wait(RX)]


HEADERS = {
    "checksum far away": abi.HDR.pack(NEEDS, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
    "checksum at the end": abi.HDR.pack(NEEDS, 0, 0, 0, len(OUT), 0, 0),
    "checksum straddles the end": abi.HDR.pack(NEEDS, 0, 0, 0, 14, len(OUT) - 15, 0),
    "gso of size 0": abi.HDR.pack(NEEDS, abi.HDR_GSO_TCPV4, 54, 0, 34, 16, 0),
    "gso of size 1": abi.HDR.pack(NEEDS, abi.HDR_GSO_TCPV4, 54, 1, 34, 16, 0),
    "gso of 64K": abi.HDR.pack(NEEDS, abi.HDR_GSO_TCPV4, 54, 0xFFFF, 34, 16, 0),
    "gso without a checksum": abi.HDR.pack(0, abi.HDR_GSO_TCPV4, 54, 1448, 0, 0, 0),
    "no such gso": abi.HDR.pack(NEEDS, 0x7F, 54, 1448, 34, 16, 0),
    "all ones": b"\xff" * HEADER,
    "a header longer than the frame": abi.HDR.pack(0, 0, 0xFFFF, 0, 0, 0, 0),
    "number of buffers": abi.HDR.pack(0, 0, 0, 0, 0, 0, 0xFFFF),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize(
    "data", [OUT, OUT[:14], OUT + bytes(60_000)], ids=["whole", "short", "long"]
)
def test_lying_headers(driver: Driver, net: Namespace, header: bytes, data: bytes) -> None:
    """The kernel judges them; what it refuses is dropped."""
    send(driver, data, header=header)
    driver.wait(TX)
    assert not driver.needs_reset
    works(driver, net)


PIECES: dict[str, list[bytes]] = {
    "one byte": [b"\0"],
    "half a header": [PLAIN[:6]],
    "a header alone": [PLAIN],
    "a frame of one byte": [PLAIN + b"\xff"],
    "a frame of 13 bytes": [PLAIN, bytes(13)],
    "larger than any frame": [PLAIN, bytes(MAX_FRAME)],
    "largest": [PLAIN, bytes(MAX_FRAME - HEADER)],
    "header in pieces": [PLAIN[:1], PLAIN[1:7], PLAIN[7:] + OUT],
    "a byte each": [bytes([at]) for at in PLAIN + b"\xff"],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("indirect", [False, True])
def test_frames_cut_oddly(
    driver: Driver, net: Namespace, pieces: list[bytes], indirect: bool
) -> None:
    driver.queues[TX].add(pieces, indirect=indirect)
    driver.kick(TX)
    driver.wait(TX)
    assert not driver.needs_reset
    works(driver, net)


def test_a_frame_to_send_that_is_room_to_receive(driver: Driver, net: Namespace) -> None:
    driver.queues[TX].add([], [2048])
    driver.queues[TX].add([PLAIN + OUT], [2048])
    driver.kick(TX)
    assert [done.written for done in driver.wait(TX, 2)] == [0, 0]
    works(driver, net)


def test_room_in_crumbs(driver: Driver, net: Namespace) -> None:
    """Less than a header in each chain, which a driver may not offer (§5.1.6.3.1): its own loss."""
    with raw_socket(net) as wire:
        for _ in range(8):
            driver.queues[RX].add([], [5])
        driver.kick(RX)
        wire.send(frame(b"crumbs"))
        done = driver.wait(RX, 7)
        assert b"".join(one.data for one in done)[HEADER:] == frame(b"crumbs")
    driver.start(OFFLOADS)
    works(driver, net)


def test_room_in_pieces(driver: Driver, net: Namespace) -> None:
    """What a driver may do: cut a chain as it likes, through the header too (§2.7.4)."""
    with raw_socket(net) as wire:
        driver.queues[RX].add([b"not for you"], [5, 6, 1, 3, 2000])
        driver.kick(RX)
        wire.send(frame(b"pieces"))
        (done,) = driver.wait(RX)
        assert done.data[HEADER:] == frame(b"pieces")
        assert done.data[HEADER - 2 : HEADER] == b"\1\0", "the number of buffers"
    works(driver, net)


def _no_room(driver: Driver) -> None:
    driver.queues[RX].add([b"read this"])


def _many_pieces(driver: Driver) -> None:
    driver.queues[RX].add([], [1] * 1024, indirect=True)


def _outside(driver: Driver) -> None:
    queue = driver.queues[RX]
    queue.set_descriptor(0, 1 << 40, 2048, virtio.DESC_F_WRITE)
    queue.offer(0)


def _jump(driver: Driver) -> None:
    driver.queues[RX].set_available_index(1000)


def _send_outside(driver: Driver) -> None:
    queue = driver.queues[TX]
    queue.set_descriptor(0, driver.rig.memory.size - 10, 2048)
    queue.offer(0)


def _send_loop(driver: Driver) -> None:
    queue = driver.queues[TX]
    queue.set_descriptor(0, queue.heap, 64, virtio.DESC_F_NEXT, 0)
    queue.offer(0)


FATAL = {
    "no room in a receive chain": _no_room,
    "more pieces than a read takes": _many_pieces,
    "room outside memory": _outside,
    "the index jumps": _jump,
    "a frame outside memory": _send_outside,
    "a loop": _send_loop,
}


@pytest.mark.parametrize("break_it", FATAL.values(), ids=FATAL)
def test_the_device_stops_and_a_reset_cures_it(
    driver: Driver, net: Namespace, break_it: Callable[[Driver], None]
) -> None:
    break_it(driver)
    with raw_socket(net) as wire:
        wire.send(frame(b"look at the ring"))
        driver.kick(RX)
        driver.kick(TX)
        assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    driver.start(OFFLOADS)
    works(driver, net)


def test_a_storm_of_kicks(driver: Driver, net: Namespace) -> None:
    for _ in range(20_000):
        driver.kick(RX)
        driver.kick(TX)
    works(driver, net)


def test_resets_in_the_middle_of_a_flood(driver: Driver, net: Namespace) -> None:
    with raw_socket(net) as wire:
        for _ in range(20):
            offer(driver, 8)
            for _ in range(16):
                wire.send(frame(bytes(1000)))
            send(driver, OUT, OUT)
            driver.set_status(0)
            used = driver.rig.memory.read(driver.queues[RX].used, 64)
            wire.send(frame(b"after the reset"))
            assert driver.rig.memory.read(driver.queues[RX].used, 64) == used
            driver.start(OFFLOADS)
    works(driver, net)
