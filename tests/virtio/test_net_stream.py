"""A NIC on a stream socket, as passt's: framing, room and its lack, rates, a peer that misbehaves."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator

import pytest

from hostel.abi import virtio_net as abi
from hostel.spec import Limits, Rate
from hostel.virtio.mock import Completion
from hostel.virtio.net_port import HEADER, LENGTH, MAX_FRAME
from hostel.virtio.rng import Rng
from virtio.netns import frame
from virtio.rig import EVENT_INDEX, Driver, Rig, wait_fd
from virtio.wire import RX, TX, StreamNics, Wire, offer, received, send

MERGED = 1 << abi.F_MRG_RXBUF
LARGEST = frame(os.urandom(MAX_FRAME - HEADER - 14))


def receive_counts(driver: Driver) -> dict[str, int]:
    counts: dict[str, int] = driver.device.statistics()["pairs_served"]["0"]["receive"]
    return counts


def merged(done: Iterator[Completion]) -> bytes:
    """One frame out of the chains that it fills (§5.1.6.4)."""
    first = next(done)
    count = int.from_bytes(first.data[HEADER - 2 : HEADER], "little")
    return first.data[HEADER:] + b"".join(next(done).data for _ in range(count - 1))


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("features", [0, MERGED | EVENT_INDEX], ids=["plain", "event"])
def test_many_frames_both_ways(stream_nic: StreamNics, transport: str, features: int) -> None:
    driver, wire = stream_nic(transport)
    driver.start(features, size=128)
    frames = [frame(bytes([at]) * (46 + 11 * at)) for at in range(100)]
    offer(driver, 120)
    wire.send(*frames)
    assert [done.data[HEADER:] for done in driver.wait(RX, 100)] == frames
    send(driver, *frames)
    assert [wire.receive() for _ in frames] == frames
    driver.wait(TX, 100)


def test_a_frame_that_comes_in_pieces(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start()
    offer(driver, 1)
    data = len(frame()).to_bytes(LENGTH, "big") + frame()
    for at in range(len(data)):
        wire.sock.sendall(data[at : at + 1])
        time.sleep(0.001)
    assert received(driver) == frame()


@pytest.mark.parametrize("size", [2048, 2040], ids=["side by side", "apart"])
def test_frames_larger_than_a_buffer(stream_nic: StreamNics, size: int) -> None:
    """The first one spills over, if not into a buffer right behind; the second finds room prepared, the third
    is small again."""
    driver, wire = stream_nic()
    driver.start(MERGED, size=256)
    offer(driver, 120, size)
    sent = [LARGEST, LARGEST[::-1], frame(b"small"), LARGEST]
    wire.send(*sent)
    done = iter(driver.wait(RX, 2 + 2 * len(LARGEST) // 2048 + 1 + len(LARGEST) // 2048))
    assert [merged(done) for _ in sent] == sent
    counts = receive_counts(driver)
    assert counts["frames"] == 4
    spilt = len(LARGEST) - size if size == 2040 else 0
    assert spilt <= counts["copied"] <= 2 * spilt


def test_a_large_frame_waits_for_room(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(MERGED)
    offer(driver, 2)
    large = LARGEST[:9000]
    wire.send(large, frame(b"next"))
    time.sleep(0.05)
    assert driver.queues[RX].completed() == []
    assert not receive_counts(driver)["dropped"]
    offer(driver, 6)
    done = iter(driver.wait(RX, 6))
    assert merged(done) == large
    assert merged(done) == frame(b"next")


def test_a_large_frame_takes_all_the_room(stream_nic: StreamNics) -> None:
    """It waited, and nothing is left for the next one, which waits in turn."""
    driver, wire = stream_nic()
    driver.start(MERGED)
    offer(driver, 2)
    large = LARGEST[:9000]
    wire.send(large, large, frame(b"next"))
    for _ in range(2):
        time.sleep(0.05)
        offer(driver, 3)
        assert merged(iter(driver.wait(RX, 5))) == large
        offer(driver, 2)
    assert received(driver) == frame(b"next")


def test_what_no_ring_can_hold_is_dropped(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(MERGED, size=4)
    offer(driver, 4, 100)
    wire.send(LARGEST, frame(b"fits"))
    assert received(driver) == frame(b"fits")
    assert receive_counts(driver)["dropped"] == 1


def test_without_merging_a_frame_needs_one_chain(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start()
    offer(driver, 1, 1024)
    wire.send(frame(bytes(1100)), frame(b"fits"))
    assert received(driver) == frame(b"fits")
    assert receive_counts(driver)["dropped"] == 1
    driver.queues[RX].add([], [HEADER, 600, 600])
    driver.queues[RX].add([], [HEADER, 600, 600])
    driver.kick(RX)
    wire.send(frame(bytes(1000)), frame(bytes(1100)))
    done = driver.wait(RX, 2)
    assert [one.data[HEADER:] for one in done] == [frame(bytes(1000)), frame(bytes(1100))]


def test_no_room_stops_the_sender_and_loses_nothing(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(size=64)
    frames = [frame(at.to_bytes(4, "big") + bytes(1000)) for at in range(2000)]
    sender = threading.Thread(target=wire.send, args=frames)
    sender.start()
    time.sleep(0.05)
    assert sender.is_alive(), "the socket is full"
    got: list[bytes] = []
    while len(got) < len(frames):
        offer(driver, len(driver.queues[RX]._free))
        got += [done.data[HEADER:] for done in driver.wait(RX)]
    sender.join()
    assert got == frames


def test_a_slow_network_slows_the_driver_and_loses_nothing(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(EVENT_INDEX, size=64, heap=1 << 20)
    frames = [frame(at.to_bytes(4, "big") + bytes(8000)) for at in range(300)]
    left = iter(frames)
    send(driver, *itertools.islice(left, 64))
    time.sleep(0.05)
    assert len(driver.queues[TX].completed()) < 64, "the port is full and takes no more"
    got: list[bytes] = []
    network = threading.Thread(target=lambda: got.extend(wire.receive() for _ in frames))
    network.start()
    while more := list(itertools.islice(left, len(driver.queues[TX]._free))):
        send(driver, *more)
        driver.wait(TX)
    network.join()
    assert got == frames


def send_until_one_is_cut(driver: Driver, wire: Wire, size: int) -> list[bytes]:
    """One frame after the other, until the driver has back what the socket did not wholly take."""
    sent: list[bytes] = []
    while wire.readable() == sum(LENGTH + len(one) for one in sent):
        sent.append(frame(len(sent).to_bytes(4, "big") + bytes(size)))
        send(driver, sent[-1])
        driver.wait(TX)
    return sent


@pytest.mark.parametrize("size", [2000, 8001, 60000])
@pytest.mark.parametrize("features", [0, EVENT_INDEX], ids=["plain", "event"])
def test_the_end_of_a_burst_needs_no_other_frame(
    stream_nic: StreamNics, size: int, features: int
) -> None:
    """The driver has all its buffers back and says no more; what the port still holds goes out."""
    driver, wire = stream_nic()
    driver.start(features, size=64)
    sent = send_until_one_is_cut(driver, wire, size)
    assert [wire.receive() for _ in sent] == sent


def test_the_end_of_a_burst_has_been_paid_for(stream_nic: StreamNics) -> None:
    """It puts the NIC into debt for minutes. That holds back what comes after it, and costs no time."""
    driver, wire = stream_nic()
    driver.start(size=64)
    cut = len(send_until_one_is_cut(driver, wire, 8000))
    rate = Rate(per_second=10, burst=(cut - 1) * len(frame(bytes(8004))))
    driver, wire = stream_nic(limits=Limits(bytes=rate))
    driver.start(size=64)
    sent = send_until_one_is_cut(driver, wire, 8000)
    assert len(sent) == cut
    assert [wire.receive() for _ in sent] == sent
    send(driver, frame())
    begin = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begin < 0.1, "the thread of these queues is busy waiting"
    assert not driver.queues[TX].completed()


def test_rates(stream_nic: StreamNics) -> None:
    """Both directions share them."""
    limits = Limits(operations=Rate(per_second=100, burst=10))
    driver, wire = stream_nic(limits=limits)
    driver.start(size=64)
    offer(driver, 20)
    begin = time.monotonic()
    send(driver, *[frame()] * 20)
    for _ in range(20):
        wire.receive()
    wire.send(*[frame()] * 10)
    driver.wait(RX, 10)
    assert 0.15 < time.monotonic() - begin < 2, "20 more than the burst, at 100 a second"


def test_bytes_have_a_rate_too(stream_nic: StreamNics) -> None:
    limits = Limits(bytes=Rate(per_second=1_000_000, burst=20_000))
    driver, wire = stream_nic(limits=limits)
    driver.start(size=64)
    begin = time.monotonic()
    send(driver, *[frame(bytes(9986))] * 20)
    for _ in range(20):
        wire.receive()
    assert 0.15 < time.monotonic() - begin < 2, "180 kB more than the burst, at 1 MB/s"


@pytest.mark.parametrize(
    "data", [b"\0\0\0\0", b"\0\0\0\x0d", b"\xff\xff\xff\xff", (MAX_FRAME + 1).to_bytes(4, "big")]
)
def test_a_stream_out_of_step(stream_nic: StreamNics, data: bytes) -> None:
    driver, wire = stream_nic()
    driver.start()
    offer(driver, 1)
    wire.sock.sendall(data + bytes(100))
    assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    assert "has a frame of" in str(driver.device.fault)


def test_the_network_hangs_up(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start()
    offer(driver, 1)
    wire.sock.close()
    assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    assert "hung up" in str(driver.device.fault)


def test_offloads_that_a_stream_does_not_have(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start()
    send(driver, frame(b"1"), header=abi.HDR.pack(abi.HDR_F_NEEDS_CSUM, 0, 0, 0, 0, 0, 0))
    send(driver, frame(b"2"), header=abi.HDR.pack(0, abi.HDR_GSO_TCPV4, 54, 1448, 0, 0, 0))
    send(driver, frame(b"3"))
    driver.wait(TX, 3)
    assert wire.receive() == frame(b"3")
    assert driver.device.statistics()["pairs_served"]["0"]["transmit"]["dropped"] == 2


def test_a_flood_starves_nobody(stream_nic: StreamNics, rig: Rig) -> None:
    driver, wire = stream_nic()
    driver.start(size=256, heap=1 << 20)
    other = rig.on_pci(Rng(rig.loop))
    other.start()
    stop = threading.Event()
    wire.sock.settimeout(0.1)

    def drain() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                wire.sock.recv(1 << 20)

    def flood() -> None:
        while not stop.is_set():
            queue = driver.queues[TX]
            queue.completed()
            while queue._free:
                queue.add([bytes(HEADER) + frame(bytes(1000))])
            driver.kick(TX)

    threads = [threading.Thread(target=work) for work in (drain, flood)]
    for thread in threads:
        thread.start()
    try:
        worst, end = 0.0, time.monotonic() + 0.5
        while (begin := time.monotonic()) < end:
            other.request(0, [], [64])
            worst = max(worst, time.monotonic() - begin)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert worst < 1
    assert driver.device.statistics()["pairs_served"]["0"]["transmit"]["frames"] > 100
