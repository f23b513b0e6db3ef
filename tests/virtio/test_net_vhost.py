"""The vhost plane of a NIC on the kernel's own vhost-net and a real tap, from the driver's side."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from hostel.abi import virtio_net as abi
from hostel.errors import HostelError
from hostel.host.tap import open_tap
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, TapPort
from hostel.virtio.net_vhost import VhostPlane
from virtio.netns import (
    GUEST_IP,
    GUEST_MAC,
    HOST_IP,
    HOST_MAC,
    Namespace,
    frame,
    make_tap,
    plug,
    raw_socket,
)
from virtio.rig import EVENT_INDEX, Driver, Rig, eventually

pytestmark = pytest.mark.linux_kvm

RX, TX = 0, 1
MERGED = 1 << abi.F_MRG_RXBUF
CONTROL = 1 << abi.F_CTRL_VQ
MQ = 1 << abi.F_MQ
PLAIN = bytes(HEADER)


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        yield net


def seat(rig: Rig, net: Namespace, transport: str = "pci", pairs: int = 1) -> Driver:
    make_tap(net, several=pairs > 1)
    ports = [TapPort(fd) for fd in plug(net, queues=pairs)]
    return rig.seat(
        transport, Net(rig.loop, VhostPlane(rig.loop, ports), mac=GUEST_MAC, pairs=pairs)
    )


def offer(driver: Driver, count: int, queue: int = RX) -> None:
    for _ in range(count):
        driver.queues[queue].add([], [2048])
    driver.kick(queue)


def send(driver: Driver, data: bytes, header: bytes = PLAIN, queue: int = TX) -> None:
    driver.queues[queue].add([header + data])
    driver.kick(queue)


def exchange(driver: Driver, wire: socket.socket, payload: bytes) -> None:
    wire.send(frame(payload))
    assert driver.wait(RX)[0].data[HEADER:] == frame(payload)
    send(driver, frame(payload, to=HOST_MAC, sender=GUEST_MAC))
    assert wire.recv(4096)[14:] == payload
    driver.wait(TX)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("features", [0, MERGED | EVENT_INDEX], ids=["0", "merged"])
def test_frames_both_ways(rig: Rig, net: Namespace, transport: str, features: int) -> None:
    driver = seat(rig, net, transport)
    driver.start(features)
    offer(driver, 8)
    with raw_socket(net) as wire:
        for payload in (b"one", bytes(range(256)) * 5):
            exchange(driver, wire, payload)
    assert driver.device.statistics()["plane"] == "vhost"
    assert driver.device.statistics()["running"] == 1


def udp(payload: bytes) -> bytes:
    """To the host, with nothing but the pseudo header's sum where the checksum goes."""
    length = 8 + len(payload)
    addresses = socket.inet_aton(GUEST_IP) + socket.inet_aton(HOST_IP)
    pseudo = sum(struct.unpack(">4H", addresses)) + 17 + length
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack(">10H", ip))
    ip = ip[:10] + (~(total % 0xFFFF) & 0xFFFF).to_bytes(2, "big") + ip[12:]
    head = struct.pack(">HHHH", 5000, 6000, length, pseudo % 0xFFFF)
    return b"".join((HOST_MAC, GUEST_MAC, b"\x08\x00", ip, head, payload))


def test_the_host_completes_checksums(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start(1 << abi.F_CSUM)
    with net.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST_IP, 6000))
        sock.settimeout(10)
        header = abi.HDR.pack(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_NONE, 0, 0, 34, 6, 0)
        send(driver, udp(b"sum me"), header)
        assert sock.recv(100) == b"sum me"


def test_reset_while_frames_come_and_start_again(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    with raw_socket(net) as wire:
        for turn in range(5):
            driver.start()
            offer(driver, 8)
            for _ in range(50):
                wire.send(frame(b"flood"))
            driver.set_status(0)
            after = rig.memory.read_u16(driver.queues[RX].used + 2)
            wire.send(frame(b"late"))
            assert rig.memory.read_u16(driver.queues[RX].used + 2) == after, turn
        driver.start()
        offer(driver, 8)
        assert eventually(lambda: bool(driver.queues[RX].completed())), "what waited in the tap"


def test_saving_goes_on_where_it_was(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start()
    offer(driver, 8)
    with raw_socket(net) as wire:
        exchange(driver, wire, b"before")
        rings = {index: tuple(at) for index, *at in driver.device.save()["queues"]}
        assert rings[TX] == (1, 1)
        assert rings[RX][1] == 1
        exchange(driver, wire, b"after")


@pytest.mark.parametrize("index", [RX, TX], ids=["receive", "transmit"])
def test_a_bad_descriptor_is_the_devices_fault(rig: Rig, net: Namespace, index: int) -> None:
    driver = seat(rig, net)
    faults: list[HostelError] = []
    driver.device.on_fault = lambda device, error: faults.append(error)
    driver.start()
    queue = driver.queues[index]
    queue.set_descriptor(0, 1 << 45, 2048, flags=2 if index == RX else 0)
    queue.offer(0)
    driver.kick(index)
    with raw_socket(net) as wire:
        wire.send(frame(b"early"))
        assert eventually(lambda: driver.needs_reset)
        kind = "receive" if index == RX else "transmit"
        assert f"gave up {kind} queue 0" in str(faults[0])
        driver.set_status(0)
        driver.start()
        offer(driver, 8)
        assert driver.wait(RX)[0].data[HEADER:] == frame(b"early"), "it waited in the tap"
        exchange(driver, wire, b"well again")


def test_an_error_from_before_a_reset(rig: Rig, net: Namespace) -> None:
    """That nobody had read yet: it is not the fault of the driver that starts then."""
    driver = seat(rig, net)
    with raw_socket(net) as wire:
        for turn in range(10):
            driver.start()
            driver.queues[TX].set_descriptor(0, 1 << 45, 2048)
            driver.queues[TX].offer(0)
            driver.kick(TX)
            time.sleep(turn / 2000)
            driver.set_status(0)
            driver.start()
            offer(driver, 4)
            exchange(driver, wire, f"turn {turn}".encode())


def test_a_ring_outside_memory(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start()
    driver.negotiate()
    driver.queues[TX].used = 1 << 45
    for index in (RX, TX):
        driver.set_up(index, driver.queues[index])
    driver.set_status(15)
    assert driver.needs_reset
    driver.start()
    offer(driver, 8)
    with raw_socket(net) as wire:
        exchange(driver, wire, b"well again")


def test_the_cable(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    device = driver.device
    assert isinstance(device, Net)
    driver.start(1 << abi.F_STATUS)
    offer(driver, 8)
    with raw_socket(net) as wire:
        device.set_link(False)
        send(driver, frame(b"down", to=HOST_MAC, sender=GUEST_MAC))
        wire.settimeout(0.2)
        with pytest.raises(TimeoutError):
            wire.recv(4096)
        device.set_link(True)
        wire.settimeout(10)
        assert wire.recv(4096)[14:] == b"down", "it waited in the ring"


def command(driver: Driver, queue: int, kind: int, what: int, data: bytes) -> bytes:
    done = driver.request(queue, [abi.CTRL_HDR.pack(kind, what) + data], [1])
    return done.data


def test_several_queues(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net, pairs=2)
    driver.start(CONTROL | MQ)
    statistics = driver.device.statistics
    assert statistics()["running"] == 1
    pairs = (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET)
    for wanted in (2, 1, 2):
        assert command(driver, 4, *pairs, wanted.to_bytes(2, "little")) == b"\0"
        assert statistics()["running"] == wanted
    offer(driver, 8, 0)
    offer(driver, 8, 2)
    with raw_socket(net) as wire:
        send(driver, frame(b"by the second", to=HOST_MAC, sender=GUEST_MAC), queue=3)
        assert wire.recv(4096)[14:] == b"by the second"
        wire.send(frame(b"back"))
        assert eventually(
            lambda: bool(driver.queues[0].completed() or driver.queues[2].completed())
        )


def test_a_tap_in_use_is_refused(rig: Rig, net: Namespace) -> None:
    seat(rig, net)
    with pytest.raises(HostelError, match="is in use"):
        net.call(open_tap, "tap0")
