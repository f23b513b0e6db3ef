"""A NIC's config space and control queue, from the driver's side; frames through a real plane."""

from __future__ import annotations

import struct

import pytest

from hostel.abi import virtio
from hostel.abi import virtio_net as abi
from hostel.errors import HostError
from hostel.virtio.mock import Completion
from hostel.virtio.net import Net
from hostel.virtio.net_plane import Filter
from hostel.virtio.net_port import HEADER
from virtio.netns import GUEST_MAC, frame
from virtio.rig import Driver, eventually, wait_fd
from virtio.wire import CONTROL, RX, StreamNics, Wire, command, offer, received, send

EVERY = (
    *(abi.F_CTRL_VQ, abi.F_CTRL_RX, abi.F_CTRL_RX_EXTRA, abi.F_CTRL_VLAN, abi.F_CTRL_MAC_ADDR),
    *(abi.F_GUEST_ANNOUNCE, abi.F_STATUS, abi.F_MAC),
)
FEATURES = sum(1 << bit for bit in EVERY)
OTHER, GROUP = bytes.fromhex("525400000077"), bytes.fromhex("01005e000001")
PROMISCUOUS_OFF = (abi.CTRL_RX, abi.CTRL_RX_PROMISC, b"\0")
STATUS = abi.CONFIG.offsets["status"]


def table(*addresses: bytes) -> bytes:
    return len(addresses).to_bytes(4, "little") + b"".join(addresses)


def filter_of(driver: Driver) -> Filter:
    assert isinstance(driver.device, Net)
    return driver.device.filter


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_config_space(stream_nic: StreamNics, transport: str) -> None:
    driver, _ = stream_nic(transport, pairs=2, mtu=1400)
    assert bytes(driver.config(at, 1) for at in range(6)) == GUEST_MAC
    assert driver.config(STATUS, 2) == abi.S_LINK_UP
    assert driver.config(abi.CONFIG.offsets["max_virtqueue_pairs"], 2) == 2
    assert driver.config(abi.CONFIG.offsets["mtu"], 2) == 1400


def test_features_are_those_of_device_and_plane(stream_nic: StreamNics) -> None:
    plain, _ = stream_nic()
    offered = plain.read_features()
    assert offered & FEATURES == FEATURES
    assert offered >> abi.F_MRG_RXBUF & 1, "the plane's"
    for bit in (abi.F_MTU, abi.F_MQ, abi.F_CSUM, abi.F_CTRL_GUEST_OFFLOADS):
        assert not offered >> bit & 1, f"a stream with one queue has no {bit}"
    more, _ = stream_nic("mmio", pairs=2, mtu=9000)
    assert more.read_features() & (1 << abi.F_MTU | 1 << abi.F_MQ) == 1 << abi.F_MTU | 1 << abi.F_MQ


ACCEPTED = {
    "promiscuous off": (PROMISCUOUS_OFF, {"promiscuous": False}),
    "all multicast": ((abi.CTRL_RX, abi.CTRL_RX_ALLMULTI, b"\1"), {"all_multicast": True}),
    "all unicast": ((abi.CTRL_RX, abi.CTRL_RX_ALLUNI, b"\1"), {"all_unicast": True}),
    "no multicast": ((abi.CTRL_RX, abi.CTRL_RX_NOMULTI, b"\1"), {"no_multicast": True}),
    "no unicast": ((abi.CTRL_RX, abi.CTRL_RX_NOUNI, b"\1"), {"no_unicast": True}),
    "no broadcast": ((abi.CTRL_RX, abi.CTRL_RX_NOBCAST, b"\1"), {"no_broadcast": True}),
    "address": ((abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER), {"mac": OTHER}),
    "tables": (
        (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, table(OTHER) + table(GROUP)),
        {"unicast": frozenset({OTHER}), "multicast": frozenset({GROUP})},
    ),
    "empty tables": ((abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, bytes(8)), {"unicast": frozenset()}),
    "VLAN": ((abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, b"\x07\0"), {"vlans": frozenset({7})}),
    "VLAN that was not there": (
        (abi.CTRL_VLAN, abi.CTRL_VLAN_DEL, b"\x07\0"),
        {"vlans": frozenset()},
    ),
}


@pytest.mark.parametrize(("asked", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_commands(
    stream_nic: StreamNics, asked: tuple[int, int, bytes], expected: dict[str, object]
) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    assert command(driver, *asked) == abi.OK
    for field, value in expected.items():
        assert getattr(filter_of(driver), field) == value


REFUSED = {
    "no such class": (77, 0, b"\1"),
    "no such command": (abi.CTRL_RX, 6, b"\1"),
    "mode without a value": (abi.CTRL_RX, abi.CTRL_RX_PROMISC, b""),
    "mode with two": (abi.CTRL_RX, abi.CTRL_RX_PROMISC, b"\0\0"),
    "short address": (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER[:5]),
    "long address": (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER + b"\0"),
    "one table": (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, table(OTHER)),
    "table shorter than it says": (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, b"\5\0\0\0" + OTHER),
    "table of 4 billion": (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, b"\xff" * 4 + OTHER + bytes(4)),
    "more than both tables": (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, bytes(9)),
    "too many addresses": (
        abi.CTRL_MAC,
        abi.CTRL_MAC_TABLE_SET,
        table(*[OTHER] * 11000) + bytes(4),
    ),
    "VLAN of one byte": (abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, b"\1"),
    "VLAN 4095": (abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, b"\xff\x0f"),
    "announcement with data": (abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK, b"\0"),
    "pairs without MQ": (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\1\0"),
    "offloads without the feature": (abi.CTRL_GUEST_OFFLOADS, 0, bytes(8)),
}


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
def test_commands_that_are_refused(stream_nic: StreamNics, asked: tuple[int, int, bytes]) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    before = filter_of(driver)
    assert command(driver, *asked) == abi.ERR
    assert filter_of(driver) == before
    assert not driver.needs_reset
    assert command(driver, *PROMISCUOUS_OFF) == abi.OK, "and the next one works"


@pytest.mark.parametrize("bit", [abi.F_CTRL_RX, abi.F_CTRL_VLAN, abi.F_CTRL_MAC_ADDR])
def test_commands_without_their_feature(stream_nic: StreamNics, bit: int) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES & ~(1 << bit))
    asked = {
        abi.F_CTRL_RX: PROMISCUOUS_OFF,
        abi.F_CTRL_VLAN: (abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, b"\1\0"),
        abi.F_CTRL_MAC_ADDR: (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER),
    }
    assert command(driver, *asked[bit]) == abi.ERR


def test_a_command_in_pieces(stream_nic: StreamNics) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    done = driver.request(CONTROL, [b"\0", b"\0", b"\0"], [1, 4], indirect=True)
    assert (done.written, done.data) == (1, b"\0")
    assert not filter_of(driver).promiscuous


@pytest.mark.parametrize("readable", [[], [b"\0"]], ids=["empty", "half a header"])
def test_no_command_at_all(stream_nic: StreamNics, readable: list[bytes]) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    assert driver.request(CONTROL, readable, [1]).data == b"\1"


def test_a_command_without_room_for_its_answer(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES)
    driver.queues[CONTROL].add([b"\0\0\0"])
    driver.kick(CONTROL)
    assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    driver.start(FEATURES)
    assert command(driver, *PROMISCUOUS_OFF) == abi.OK, "after a reset all is well"
    wire.send(frame())
    offer(driver, 1)
    assert received(driver) == frame()


# -- what the commands do to frames ---------------------------------------------------------------


def passed(driver: Driver, wire: Wire, *sent: bytes) -> list[bytes]:
    """Which of these reach the driver; one to its own address marks the end."""
    end = frame(b"the end", to=filter_of(driver).mac)
    offer(driver, len(sent) + 1)
    wire.send(*sent, end)
    got: list[bytes] = []
    while end not in got:
        got += [done.data[HEADER:] for done in driver.wait(RX)]
    return got[:-1]


def test_addresses(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES, size=128)
    frames = own, other, group, everybody = [
        frame(to=address) for address in (GUEST_MAC, OTHER, GROUP, b"\xff" * 6)
    ]
    assert passed(driver, wire, *frames) == frames, "promiscuous at first"
    command(driver, *PROMISCUOUS_OFF)
    assert passed(driver, wire, *frames) == [own, everybody]
    command(driver, abi.CTRL_RX, abi.CTRL_RX_ALLMULTI, b"\1")
    assert passed(driver, wire, *frames) == [own, group, everybody]
    command(driver, abi.CTRL_RX, abi.CTRL_RX_ALLMULTI, b"\0")
    command(driver, abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, table(OTHER) + table(GROUP))
    assert passed(driver, wire, *frames) == frames
    command(driver, abi.CTRL_RX, abi.CTRL_RX_NOMULTI, b"\1")
    command(driver, abi.CTRL_RX, abi.CTRL_RX_NOBCAST, b"\1")
    assert passed(driver, wire, *frames) == [own, other]
    statistics = driver.device.statistics()["pairs_served"]["0"]["receive"]
    assert statistics["filtered"] == 2 + 1 + 2


def test_a_new_address(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES, size=128)
    command(driver, *PROMISCUOUS_OFF)
    command(driver, abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER)
    assert bytes(driver.config(at, 1) for at in range(6)) == OTHER
    command(driver, abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET, table(GUEST_MAC) + table())
    assert passed(driver, wire, frame(to=OTHER)) == [frame(to=OTHER)]


def test_vlans(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES, size=128)
    command(driver, *PROMISCUOUS_OFF)
    three, seven = frame(tag=3), frame(tag=0x2007)
    assert passed(driver, wire, three, seven) == []
    command(driver, abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, struct.pack("<H", 7))
    assert passed(driver, wire, three, seven) == [seven], "whatever its priority"
    command(driver, abi.CTRL_VLAN, abi.CTRL_VLAN_DEL, struct.pack("<H", 7))
    assert passed(driver, wire, three, seven) == []


def test_without_vlan_filters_every_tag_passes(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES & ~(1 << abi.F_CTRL_VLAN), size=128)
    command(driver, *PROMISCUOUS_OFF)
    assert passed(driver, wire, frame(tag=3)) == [frame(tag=3)]


# -- link and announcement ------------------------------------------------------------------------


def test_the_link_goes_down_and_up(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(FEATURES)
    offer(driver, 4)
    device = driver.device
    assert isinstance(device, Net)
    generation = driver.generation()
    device.set_link(False)
    assert wait_fd(driver.config_fd())
    assert driver.config(STATUS, 2) == 0
    assert driver.generation() != generation
    wire.send(frame(b"lost"))
    send(driver, frame(b"lost too"))
    driver.wait(1)
    assert eventually(lambda: device.statistics()["pairs_served"]["0"]["receive"]["filtered"] == 1)
    device.set_link(True)
    assert wait_fd(driver.config_fd())
    assert driver.config(STATUS, 2) == abi.S_LINK_UP
    wire.send(frame(b"here"))
    assert received(driver) == frame(b"here")
    send(driver, frame(b"there"))
    assert wire.receive() == frame(b"there")


def test_an_announcement(stream_nic: StreamNics) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    device = driver.device
    assert isinstance(device, Net)
    device.announce()
    assert wait_fd(driver.config_fd())
    assert driver.config(STATUS, 2) == abi.S_LINK_UP | abi.S_ANNOUNCE
    assert command(driver, abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK) == abi.OK
    assert driver.config(STATUS, 2) == abi.S_LINK_UP


def test_a_driver_that_cannot_announce_is_not_asked(stream_nic: StreamNics) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES & ~(1 << abi.F_GUEST_ANNOUNCE))
    assert isinstance(driver.device, Net)
    driver.device.announce()
    assert driver.config(STATUS, 2) == abi.S_LINK_UP
    assert not wait_fd(driver.config_fd(), 0.05)


# -- queues and life cycle ------------------------------------------------------------------------


def test_where_the_control_queue_is(stream_nic: StreamNics) -> None:
    """§5.1.2: after all pairs, but after the first one if the driver knows nothing of more."""
    mq = 1 << abi.F_MQ
    driver, _ = stream_nic(pairs=2)
    driver.start(FEATURES | mq)
    assert command(driver, *PROMISCUOUS_OFF, queue=4) == abi.OK
    for pairs, answer in ((2, abi.OK), (1, abi.OK), (0, abi.ERR), (3, abi.ERR)):
        data = struct.pack("<H", pairs)
        assert command(driver, abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, data, queue=4) == answer
    assert command(driver, abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET, b"\1", queue=4) == abi.ERR
    driver.start(FEATURES)
    assert command(driver, *PROMISCUOUS_OFF, queue=2) == abi.OK


def test_without_a_control_queue(stream_nic: StreamNics) -> None:
    driver, wire = stream_nic()
    driver.start(1 << abi.F_MAC, indexes=(0, 1))
    offer(driver, 1)
    wire.send(frame(to=OTHER))
    assert received(driver) == frame(to=OTHER)


def test_a_reset_forgets_the_drivers_wishes(stream_nic: StreamNics) -> None:
    driver, _ = stream_nic()
    driver.start(FEATURES)
    command(driver, *PROMISCUOUS_OFF)
    command(driver, abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET, OTHER)
    driver.set_status(0)
    assert driver.get_status() == 0
    assert filter_of(driver).promiscuous
    assert bytes(driver.config(at, 1) for at in range(6)) == GUEST_MAC


def test_more_pairs_than_the_backend_has(stream_nic: StreamNics) -> None:
    driver, _ = stream_nic()
    assert isinstance(driver.device, Net)
    driver.device._pairs = 2
    driver.set_status(virtio.CONFIG_S_ACKNOWLEDGE)
    driver.set_status(virtio.CONFIG_S_ACKNOWLEDGE | virtio.CONFIG_S_DRIVER)
    assert isinstance(driver.device.fault, HostError)
    assert "1 pairs of queues, not 2" in str(driver.device.fault)


def test_saved_and_loaded(stream_nic: StreamNics) -> None:
    """Half-way through its buffers, with filters set."""
    driver, wire = stream_nic()
    driver.start(FEATURES)
    offer(driver, 4)
    driver.transport.save()
    wire.send(frame(b"1"))
    assert received(driver) == frame(b"1"), "saving does no harm"
    command(driver, *PROMISCUOUS_OFF)
    command(driver, abi.CTRL_VLAN, abi.CTRL_VLAN_ADD, b"\7\0")
    assert isinstance(driver.device, Net)
    driver.device.announce()
    state = driver.transport.save()
    driver.set_status(0)
    other, other_wire = stream_nic()
    other.transport.load(state)
    assert filter_of(other).vlans == frozenset({7})
    assert not filter_of(other).promiscuous
    assert other.config(STATUS, 2) == abi.S_LINK_UP | abi.S_ANNOUNCE
    other_wire.send(frame(b"2"))
    done: list[Completion] = []

    def arrived() -> bool:
        done.extend(driver.queues[RX].completed())
        return bool(done)

    assert eventually(arrived)
    assert done[0].data[HEADER:] == frame(b"2")
