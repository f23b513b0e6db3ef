"""The emulated 82540EM on a real tap, from a driver's side: registers, frames, interrupts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from devices.e1000_driver import DATA, EOP, IFCS, LAST, RING, CardDriver
from hostel.abi import e1000 as abi
from hostel.abi import pci
from hostel.virtio.net_port import TapPort
from virtio.netns import GUEST_MAC, HOST_MAC, Namespace, frame, make_tap, plug, raw_socket
from virtio.rig import Rig, eventually


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        make_tap(net)
        yield net


@pytest.fixture
def card(rig: Rig, net: Namespace) -> Iterator[CardDriver]:
    (fd,) = plug(net)
    driver = CardDriver(rig, TapPort(fd))
    yield driver
    driver.card.close()


@pytest.fixture
def wire(net: Namespace) -> Iterator[socket.socket]:
    with raw_socket(net) as wire:
        yield wire


OUT = frame(b"out" * 30, to=HOST_MAC, sender=GUEST_MAC)


# --- What a driver looks at first ----------------------------------------------------------------


def read_microwire(card: CardDriver, address: int, words: int = 1) -> list[int]:
    """§5.3: chip select, start bit and READ, six address bits, then data at each rise of the clock."""
    base = abi.EECD_CS | abi.EECD_REQ
    card.set(abi.EECD, abi.EECD_REQ)
    assert card.get(abi.EECD) & abi.EECD_GNT
    card.set(abi.EECD, base)
    for bit in f"110{address:06b}":
        out = base | (abi.EECD_DI if bit == "1" else 0)
        card.set(abi.EECD, out)
        card.set(abi.EECD, out | abi.EECD_SK)
        card.set(abi.EECD, out)
    assert not card.get(abi.EECD) & abi.EECD_DO, "a 0 comes before the data"
    found = []
    for _ in range(words):
        value = 0
        for _ in range(16):
            card.set(abi.EECD, base | abi.EECD_SK)
            value = value << 1 | bool(card.get(abi.EECD) & abi.EECD_DO)
            card.set(abi.EECD, base)
        found.append(value)
    card.set(abi.EECD, 0)
    return found


def test_identity(card: CardDriver) -> None:
    assert card.rig.read(card.config, 4) == 0x100E_8086
    assert card.rig.read(card.config + pci.CLASS_PROG, 4) & 0xFFFFFF == 0x02_0000
    assert card.rig.read(card.config + pci.INTERRUPT_PIN, 1) == 1


def test_the_eeprom_by_either_way(card: CardDriver) -> None:
    words = read_microwire(card, 0, abi.EEPROM_WORDS)
    assert sum(words) & 0xFFFF == abi.EEPROM_SUM
    assert b"".join(word.to_bytes(2, "little") for word in words[:3]) == GUEST_MAC
    assert read_microwire(card, 0x0D) == [abi.DEVICE]
    for address in (0, 2, 0x3F):
        card.set(abi.EERD, address << 8 | abi.EERD_START)
        assert card.get(abi.EERD) & abi.EERD_DONE
        assert card.get(abi.EERD) >> 16 == words[address]


def mdio(card: CardDriver, register: int, value: int | None = None, *, phy: int = 1) -> int:
    operation = abi.MDIC_READ if value is None else abi.MDIC_WRITE
    card.set(abi.MDIC, operation << 26 | phy << 21 | register << 16 | (value or 0))
    return card.get(abi.MDIC)


def test_the_phy(card: CardDriver) -> None:
    assert mdio(card, abi.PHY_ID1) & 0xFFFF == 0x0141
    assert mdio(card, abi.PHY_ID2) & 0xFFF0 == 0x0C20
    assert mdio(card, abi.PHY_STATUS) & abi.PHY_STATUS_LINK
    assert mdio(card, abi.PHY_STATUS) & abi.MDIC_READY
    assert mdio(card, abi.PHY_STATUS, phy=2) & abi.MDIC_ERROR
    mdio(card, abi.PHY_CTRL, abi.PHY_CTRL_AUTONEG | abi.PHY_CTRL_RESTART)
    assert mdio(card, abi.PHY_CTRL) & 0xFFFF == abi.PHY_CTRL_AUTONEG
    mdio(card, abi.PHY_ID1, 0x1234)
    assert mdio(card, abi.PHY_ID1) & 0xFFFF == 0x0141
    mdio(card, abi.PHY_CTRL, abi.PHY_CTRL_RESET)
    assert mdio(card, abi.PHY_CTRL) & abi.PHY_CTRL_FULL_DUPLEX


def test_the_cable(card: CardDriver) -> None:
    card.start()
    assert card.get(abi.STATUS) & abi.STATUS_LU
    card.card.set_link(False)
    assert card.level
    assert card.get(abi.ICR) & abi.INT_LSC
    assert not card.get(abi.STATUS) & abi.STATUS_LU
    assert not mdio(card, abi.PHY_STATUS) & abi.PHY_STATUS_LINK
    card.send(OUT)
    assert card.sent
    assert card.card.statistics()["dropped"] == 1
    card.card.set_link(True)
    assert card.get(abi.STATUS) & abi.STATUS_LU
    mdio(card, abi.PHY_CTRL, abi.PHY_CTRL_POWER_DOWN)
    assert not card.get(abi.STATUS) & abi.STATUS_LU


def test_the_ports_lead_to_the_registers(card: CardDriver) -> None:
    ports = card.rig.ports
    ports.write(card.ports, abi.VET.to_bytes(4, "little"))
    ports.write(card.ports + 4, (0x8100).to_bytes(4, "little"))
    assert card.get(abi.VET) == 0x8100
    assert ports.read(card.ports + 4, 4) == (0x8100).to_bytes(4, "little")
    ports.write(card.ports, abi.CTRL.to_bytes(4, "little"))
    ports.write(card.ports + 4, abi.CTRL_RST.to_bytes(4, "little"))
    assert card.get(abi.VET) == 0, "a reset through the ports"


def test_registers_that_are_not_there(card: CardDriver) -> None:
    for offset in (0x04, 0x3000, abi.REGISTERS_SIZE - 4):
        card.set(offset, 0xFFFF_FFFF)
        assert card.get(offset) == 0
    card.set(abi.STATUS, 0)
    assert card.get(abi.STATUS) & abi.STATUS_SPEED_1000
    card.rig.write(card.bar + abi.VET, 1, 0x81)
    assert card.get(abi.VET) == 0, "registers are taken whole"
    card.set(abi.RDLEN, 0xFFFF_FFFF)
    assert card.get(abi.RDLEN) == 0xF_FF80


# --- Frames --------------------------------------------------------------------------------------


def test_frames_both_ways(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    for size in (46, 300, 1500):
        payload = bytes(range(256)) * 6
        wire.send(frame(payload[:size]))
        data, status, _ = card.receive()
        assert data == frame(payload[:size]).ljust(60, b"\0")
        assert status & abi.RX_IXSM
        card.send(frame(payload[:size], to=HOST_MAC, sender=GUEST_MAC))
        assert card.sent
        assert wire.recv(4096)[14:] == payload[:size]
    assert (card.get(abi.TPR), card.get(abi.TPT)) == (3, 3)
    assert card.get(abi.TPR) == 0, "reading clears"
    assert card.card.statistics()["sent"] == 0
    assert (card.get(abi.PRC64), card.get(abi.PRC1522)) == (1, 1)


def test_the_ring_wraps(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    for number in range(3 * RING):
        wire.send(frame(b"%03d" % number))
        assert card.receive()[0][14:17] == b"%03d" % number
        card.send(OUT[:50] + b"%03d" % number)
        assert wire.recv(4096)[50:53] == b"%03d" % number


def test_the_checksum_of_the_frame(card: CardDriver, wire: socket.socket) -> None:
    """Without RCTL.SECRC the frame's own checksum is in memory too: the residue is CRC-32's."""
    import zlib

    card.start()
    card.set(abi.RCTL, abi.RCTL_EN | abi.RCTL_BAM)
    wire.send(frame(b"x" * 100))
    data, _, _ = card.receive()
    assert len(data) == 118
    assert zlib.crc32(data) == 0x2144_DF1C


def test_pieces_become_one_frame(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    for start in range(0, 90, 10):
        card.piece(OUT[start : start + 10], IFCS)
    card.piece(OUT[90:], LAST)
    card.kick()
    assert wire.recv(4096) == OUT


def test_small_buffers_are_chained(card: CardDriver, wire: socket.socket) -> None:
    card.start(3 << abi.RCTL_BSIZE_SHIFT)
    wire.send(frame(bytes(1000)))
    data, _, _ = card.receive()
    assert len(data) == 1014
    assert card.received == 4


def test_large_frames_want_a_bit(card: CardDriver, wire: socket.socket, net: Namespace) -> None:
    net.run("ip link set tap0 mtu 4000")
    card.start()
    wire.send(frame(bytes(3000)))
    assert eventually(lambda: card.get(abi.ROC) == 1)
    card.start(abi.RCTL_LPE)
    wire.send(frame(bytes(3000)))
    assert len(card.receive()[0]) == 3014


def test_without_descriptors_frames_wait(card: CardDriver, wire: socket.socket) -> None:
    card.start(receive=1)
    for number in range(3):
        wire.send(frame(b"%d" % number))
    assert eventually(lambda: bool(card.get(abi.RDH)))
    card.set(abi.RDT, 5)
    for number in range(3):
        assert card.receive()[0][14:15] == b"%d" % number


def test_who_is_listened_to(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    other, group = bytes.fromhex("525400aabb77"), bytes.fromhex("01005e000001")
    card.set(abi.RAL + 8, int.from_bytes(other[:4], "little"))
    hashed = int.from_bytes(group[4:], "little") >> 4 & 0xFFF

    def passes(to: bytes) -> bool:
        wire.send(frame(b"?", to=to))
        wire.send(frame(b"!", to=GUEST_MAC))
        data = card.receive()[0]
        if data[14:15] == b"!":
            return False
        assert card.receive()[0][14:15] == b"!"
        return data[:6] == to

    assert passes(b"\xff" * 6)
    assert not passes(other)
    assert not passes(group)
    card.set(abi.RAH + 8, int.from_bytes(other[4:], "little") | abi.RAH_AV)
    assert passes(other)
    card.set(abi.MTA + 4 * (hashed >> 5), 1 << (hashed & 31))
    assert passes(group)
    assert not passes(bytes.fromhex("01005e000002"))
    card.set(abi.RCTL, abi.RCTL_EN | abi.RCTL_UPE | abi.RCTL_MPE)
    assert passes(bytes.fromhex("525400aabb78"))
    assert passes(bytes.fromhex("01005e000101"))


def test_vlan_tags(card: CardDriver, wire: socket.socket) -> None:
    card.start(abi.RCTL_VFE)
    card.set(abi.VET, 0x8100)
    card.set(abi.CTRL, abi.CTRL_SLU | abi.CTRL_VME)
    card.set(abi.VFTA + 4 * (100 >> 5), 1 << (100 & 31))
    wire.send(frame(b"not ours", tag=101))
    wire.send(frame(b"ours", tag=100))
    data, status, tag = card.receive()
    assert (data[14:18], tag) == (b"ours", 100)
    assert status & abi.RX_VP
    card.piece(OUT, DATA | LAST | abi.TX_CMD_VLE, special=5)
    card.kick()
    # The kernel takes the tag off and hands the frame to whoever listens to its type.
    assert eventually(lambda: card.sent)
    assert card.card.counters.values[abi.TOTL] == len(OUT) + 4 + 4


# --- Interrupts ----------------------------------------------------------------------------------


def test_causes_and_mask(card: CardDriver) -> None:
    card.start()
    card.set(abi.IMC, abi.INT_ALL)
    card.set(abi.ICS, abi.INT_LSC)
    assert not card.level
    card.set(abi.IMS, abi.INT_LSC)
    assert card.level
    assert card.get(abi.IMS) == abi.INT_LSC
    assert card.get(abi.ICR) == abi.INT_LSC
    assert not card.level
    assert card.get(abi.ICR) == 0


def test_a_transmission_interrupts(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    card.send(OUT)
    assert card.level
    assert card.get(abi.ICR) == abi.INT_TXDW | abi.INT_TXQE
    card.piece(OUT, EOP)
    card.kick()
    assert card.get(abi.ICR) == abi.INT_TXQE, "not asked to report"
    assert not card.sent


def test_few_descriptors_interrupt(card: CardDriver, wire: socket.socket) -> None:
    card.start(receive=9)
    wire.send(frame(b"nine are left, eight after this: half of the ring"))
    card.receive()
    assert eventually(lambda: bool(card.get(abi.ICR) & abi.INT_RXDMT0))


def test_interrupts_are_throttled(card: CardDriver) -> None:
    card.start()
    before = card.card.interrupts
    card.set(abi.ITR, 0xFFFF)  # 16.8 ms
    for _ in range(20):
        card.set(abi.ICS, abi.INT_LSC)
        card.get(abi.ICR)
    assert card.card.interrupts - before <= 2
    card.set(abi.ICS, abi.INT_LSC)
    assert eventually(lambda: card.level, 2.0), "late, not never"


# --- Life ----------------------------------------------------------------------------------------


def test_state(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    card.send(OUT)
    card.piece(OUT[:50], 0)
    card.kick()
    state = json.loads(json.dumps(card.card.save()))
    card.card.reset()
    assert not card.level
    card.card.load(state)
    assert card.card.save() == state
    assert card.level
    card.piece(OUT[50:], LAST)
    card.kick()
    assert [wire.recv(4096) for _ in range(2)] == [OUT, OUT]
    wire.send(frame(b"still here"))
    assert card.receive()[0][14:].startswith(frame(b"still here")[14:])


def test_no_master_no_transfer(card: CardDriver, wire: socket.socket) -> None:
    card.start()
    card.command(pci.COMMAND_MEMORY)
    card.send(OUT)
    assert not card.sent
    card.command(pci.COMMAND_MEMORY | pci.COMMAND_MASTER)
    assert card.sent
