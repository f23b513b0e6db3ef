"""The Python plane of a NIC on a real tap, from the driver's side: frames, offloads, several queues."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from hostel.abi import virtio_net as abi
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, TapPort
from hostel.virtio.net_python import PythonPlane
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
from virtio.rig import EVENT_INDEX, Driver, Rig, eventually, wait_fd
from virtio.wire import PLAIN, RX, TX, command, offer, send

MERGED = 1 << abi.F_MRG_RXBUF
GUEST_OFFLOADS = 1 << abi.F_GUEST_CSUM | 1 << abi.F_GUEST_TSO4
OFFLOADS = GUEST_OFFLOADS | 1 << abi.F_CSUM | 1 << abi.F_HOST_TSO4
CONTROLLED = 1 << abi.F_CTRL_VQ | 1 << abi.F_CTRL_GUEST_OFFLOADS
SOL_PACKET, PACKET_VNET_HDR = 263, 15
PORT = 4242
SOMEBODY = bytes.fromhex("525400000055")
SEGMENT_HEADER = abi.HDR.pack(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_TCPV4, 54, 1448, 34, 16, 0)


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        yield net


def seat(rig: Rig, net: Namespace, transport: str = "pci", queues: int = 1) -> Driver:
    make_tap(net, several=queues > 1)
    plane = PythonPlane([TapPort(fd) for fd in plug(net, queues=queues)])
    return rig.seat(transport, Net(rig.loop, plane, mac=GUEST_MAC, pairs=queues))


def checksum(data: bytes) -> int:
    """RFC 1071."""
    words = struct.unpack(f">{len(data) // 2}H", data)
    total = int(sum(words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_packet(protocol: int, body: bytes, *, to: str = HOST_IP, sender: str = GUEST_IP) -> bytes:
    addresses = socket.inet_aton(sender) + socket.inet_aton(to)
    fields = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(body), 0, 0, 64, protocol)
    return fields + struct.pack(">H", checksum(fields + bytes(2) + addresses)) + addresses + body


def pseudo_header(protocol: int, length: int) -> bytes:
    addresses = socket.inet_aton(GUEST_IP) + socket.inet_aton(HOST_IP)
    return addresses + struct.pack(">HH", protocol, length)


def udp_frame(payload: bytes, *, partial: bool) -> bytes:
    """From the guest to the host's PORT; ``partial``: the checksum is the pseudo header's alone."""
    length = 8 + len(payload)
    head = struct.pack(">HHH", PORT, PORT, length)
    seed = pseudo_header(17, length)
    if partial:
        total = 0xFFFF & ~checksum(seed)
    else:
        total = checksum(seed + head + bytes(2) + payload + bytes(len(payload) % 2))
    return (
        HOST_MAC + GUEST_MAC + b"\x08\0" + ip_packet(17, head + total.to_bytes(2, "big") + payload)
    )


def tcp_segment(payload: bytes) -> bytes:
    """To the guest, its checksum left to whoever cuts it."""
    addresses = socket.inet_aton(HOST_IP) + socket.inet_aton(GUEST_IP)
    seed = 0xFFFF & ~checksum(addresses + struct.pack(">HH", 6, 20 + len(payload)))
    head = struct.pack(">HHIIBBHHH", PORT, PORT, 1, 1, 0x50, 0x10, 1000, seed, 0)
    packet = ip_packet(6, head + payload, to=GUEST_IP, sender=HOST_IP)
    return GUEST_MAC + HOST_MAC + b"\x08\0" + packet


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize(
    "features", [0, MERGED, MERGED | EVENT_INDEX], ids=["0", "merged", "event"]
)
def test_frames_both_ways(rig: Rig, net: Namespace, transport: str, features: int) -> None:
    driver = seat(rig, net, transport)
    driver.start(features)
    with raw_socket(net) as wire:
        offer(driver, 8)
        for payload in (b"one", bytes(range(256)) * 5):
            wire.send(frame(payload))
            done = driver.wait(RX)[0]
            assert done.data[HEADER:] == frame(payload)
            assert done.data[HEADER - 2 : HEADER] == b"\1\0", "num_buffers"
            send(driver, frame(payload, to=HOST_MAC, sender=GUEST_MAC))
            assert wire.recv(4096)[14:] == payload
            driver.wait(TX)
    statistics = driver.device.statistics()["pairs_served"]["0"]
    assert (statistics["receive"]["frames"], statistics["transmit"]["frames"]) == (2, 2)


# -- offloads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "offloaded"])
def test_checksums_on_the_way_out(rig: Rig, net: Namespace, partial: bool) -> None:
    """A UDP socket of the host gets only what has a right one."""
    driver = seat(rig, net)
    driver.start(OFFLOADS)
    with net.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST_IP, PORT))
        sock.settimeout(10)
        broken = bytearray(udp_frame(b"a wrong checksum", partial=False))
        broken[-1] ^= 1
        send(driver, bytes(broken))
        header = abi.HDR.pack(abi.HDR_F_NEEDS_CSUM, 0, 0, 0, 34, 6, 0) if partial else PLAIN
        send(driver, udp_frame(b"a right checksum", partial=partial), header=header)
        assert sock.recv(100) == b"a right checksum"


@pytest.mark.parametrize("offloads", [0, GUEST_OFFLOADS], ids=["whole", "offloaded"])
def test_checksums_on_the_way_in(rig: Rig, net: Namespace, offloads: int) -> None:
    """A driver that did not ask for partial ones gets none."""
    driver = seat(rig, net)
    driver.start(MERGED | offloads)
    offer(driver, 4)
    with net.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"data", (GUEST_IP, PORT))
    done = driver.wait(RX)[0]
    flags, packet = done.data[0], done.data[HEADER + 14 :]
    assert flags == (abi.HDR_F_NEEDS_CSUM if offloads else 0)
    datagram = packet[20:]
    whole = checksum(packet[12:20] + struct.pack(">HH", 17, len(datagram)) + datagram) == 0
    assert whole is not bool(offloads)


def send_segment(net: Namespace, payload: bytes) -> None:
    """One TCP segment of any size, to be cut into packets of 1448 bytes by whoever needs them."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind(("tap0", 0))
        return sock

    with net.call(make) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.send(SEGMENT_HEADER[:10] + tcp_segment(payload))


def test_a_segment_comes_whole(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start(MERGED | GUEST_OFFLOADS)
    offer(driver, 16, 4096)
    payload = os.urandom(40_000)
    send_segment(net, payload)
    done = driver.wait(RX, 10)
    header = abi.HDR.unpack_from(done[0].data)
    assert header[1] == abi.HDR_GSO_TCPV4
    assert header[3] == 1448
    assert header[6] == len(done) == 10
    assert b"".join(one.data for one in done)[HEADER + 54 :] == payload


def test_a_segment_comes_in_packets_to_who_cannot_take_it(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start(MERGED)
    offer(driver, 16)
    payload = os.urandom(1448 * 3)
    send_segment(net, payload)
    done = driver.wait(RX, 3)
    assert b"".join(one.data[HEADER + 54 :] for one in done) == payload
    assert {one.data[1] for one in done} == {abi.HDR_GSO_NONE}


def test_a_segment_is_cut_on_the_way_out(rig: Rig, net: Namespace) -> None:
    """By the kernel, for a receiver that wants packets as on a wire: another tap, without offloads."""
    driver = seat(rig, net)
    driver.start(OFFLOADS)
    make_tap(net, "tap1")
    (other,) = plug(net, "tap1")
    net.run("ip link add bridge0 type bridge")
    net.run("sysctl -qw net.ipv6.conf.bridge0.disable_ipv6=1")
    for name in ("tap0", "tap1"):
        net.run(f"ip link set {name} master bridge0")
    net.run("ip link set bridge0 up")
    payload = os.urandom(1448 * 4)
    segment = SOMEBODY + tcp_segment(payload)[6:]
    send(driver, segment, header=SEGMENT_HEADER)
    packets: list[bytes] = []
    with os.fdopen(other, "rb", buffering=0) as file:
        while len(packets) < 4:
            assert select.select([file], [], [], 10)[0]
            packet = file.read(70_000)[10:]
            if packet[:6] == SOMEBODY:
                packets.append(packet)
    assert b"".join(packet[54:] for packet in packets) == payload
    for packet in packets:
        pseudo = packet[26:34] + struct.pack(">HH", 6, len(packet) - 34)
        assert checksum(pseudo + packet[34:]) == 0


def test_offloads_change_while_it_runs(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start(MERGED | GUEST_OFFLOADS | CONTROLLED)
    offer(driver, 16)
    set_offloads = (abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET)
    too_much = GUEST_OFFLOADS | 1 << abi.F_GUEST_TSO6
    assert command(driver, *set_offloads, struct.pack("<Q", too_much)) == abi.ERR
    assert command(driver, *set_offloads, bytes(7)) == abi.ERR
    assert command(driver, *set_offloads, bytes(8)) == abi.OK
    send_segment(net, bytes(1448 * 2))
    assert [done.data[1] for done in driver.wait(RX, 2)] == [abi.HDR_GSO_NONE] * 2
    assert command(driver, *set_offloads, struct.pack("<Q", GUEST_OFFLOADS)) == abi.OK
    send_segment(net, bytes(1448 * 2))
    assert driver.wait(RX, 2)[0].data[1] == abi.HDR_GSO_TCPV4


# -- several queues -------------------------------------------------------------------------------


def set_pairs(driver: Driver, pairs: int) -> int:
    data = struct.pack("<H", pairs)
    return command(driver, abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, data, queue=4)


def flows_by_pair(driver: Driver, net: Namespace, count: int = 32) -> list[int]:
    """How many of as many flows each pair received."""
    for index in (0, 2):
        while len(driver.queues[index]._free) > 64:
            driver.queues[index].add([], [2048])
        driver.kick(index)
    before = _received(driver)
    with net.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for port in range(count):
            sock.sendto(b"flow", (GUEST_IP, 1000 + port))
    assert eventually(lambda: sum(_received(driver)) - sum(before) == count)
    return [after - first for after, first in zip(_received(driver), before, strict=True)]


def _received(driver: Driver) -> list[int]:
    served = driver.device.statistics()["pairs_served"]
    return [served[pair]["receive"]["frames"] for pair in ("0", "1")]


def test_pairs_of_queues(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net, queues=2)
    driver.start(MERGED | 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ, size=256)
    assert flows_by_pair(driver, net) == [32, 0], "one pair until the driver asks for more"
    assert set_pairs(driver, 2) == abi.OK
    first, second = flows_by_pair(driver, net)
    assert first > 4
    assert second > 4
    with raw_socket(net) as wire:
        driver.queues[3].add([PLAIN + frame(b"by the second", to=HOST_MAC, sender=GUEST_MAC)])
        driver.kick(3)
        assert wire.recv(4096)[14:] == b"by the second"
    assert set_pairs(driver, 1) == abi.OK
    assert flows_by_pair(driver, net) == [32, 0]
    driver.set_status(0)
    driver.start(MERGED | 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ, size=256)
    assert flows_by_pair(driver, net) == [32, 0], "after a reset too"


# -- the host's side goes away --------------------------------------------------------------------


def test_the_tap_is_deleted(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start()
    offer(driver, 1)
    net.run("ip link del tap0")
    assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    assert "cut off" in str(driver.device.fault)


def test_the_tap_was_deleted_before_the_driver_came(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    net.run("ip link del tap0")
    driver.start(MERGED | GUEST_OFFLOADS)
    assert eventually(lambda: driver.needs_reset)
    assert "the tap refuses us" in str(driver.device.fault)


def test_a_command_that_the_host_cannot_follow(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start(MERGED | GUEST_OFFLOADS | CONTROLLED, indexes=(1, 2))
    net.run("ip link del tap0")
    set_offloads = (abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET)
    assert command(driver, *set_offloads, bytes(8)) == abi.ERR


def test_the_tap_is_down_for_a_while(rig: Rig, net: Namespace) -> None:
    driver = seat(rig, net)
    driver.start()
    offer(driver, 1)
    net.run("ip link set tap0 down")
    send(driver, frame(to=HOST_MAC))
    driver.wait(TX)
    assert driver.device.statistics()["pairs_served"]["0"]["transmit"]["dropped"] == 1
    net.run("ip link set tap0 up")
    with raw_socket(net) as wire:
        assert eventually(lambda: "state UP" in net.run("ip -o link show tap0"))
        wire.send(frame(b"again"))
        assert driver.wait(RX)[0].data[HEADER:] == frame(b"again")
