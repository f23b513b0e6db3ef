"""What only old PCI cards have: an I/O BAR and an interrupt by a wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.abi import pci as abi
from hostel.vmm import layout
from hostel.vmm.pci import PciFunction
from virtio.rig import Rig
from vmm.test_pci import Scratch

PORTS, GSI = 64, 17


class Old:
    """A card with ports and a wire, in a machine."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.card = PciFunction("old card", ids=(0x1234, 0x5678), class_code=0x02_0000)
        self.card.add_bar(0, 4096, Scratch())
        self.card.add_bar(2, PORTS, Scratch(), io=True)
        self.card.connect(rig.irqs.line(GSI))
        self.base = layout.ECAM_START + (rig.pci.add(self.card) << 15)

    def get(self, register: int, size: int = 4) -> int:
        return self.rig.read(self.base + register, size)

    def set(self, register: int, value: int, size: int = 4) -> None:
        self.rig.write(self.base + register, size, value)

    @property
    def level(self) -> bool:
        return self.rig.vm.levels.get(GSI, False)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def old(rig: Rig) -> Iterator[Old]:
    old = Old(rig)
    yield old
    old.card.close()


def test_the_ports_answer_where_the_bar_says(old: Old) -> None:
    ports = old.rig.ports
    bar = old.get(0x18)
    assert bar & 3 == abi.BASE_ADDRESS_SPACE_IO
    assert layout.PCI_IO_START <= bar - 1 < layout.PCI_IO_END
    old.set(abi.COMMAND, abi.COMMAND_MEMORY, 2)
    assert ports.read(bar - 1, 4) == b"\xff" * 4, "memory is enabled, ports are not"
    old.set(abi.COMMAND, abi.COMMAND_IO, 2)
    ports.write(bar - 1, b"abcd")
    assert ports.read(bar - 1, 4) == b"abcd"
    old.set(0x18, 0xD000)
    assert old.get(0x18) == 0xD001
    assert ports.read(0xD000, 4) == b"abcd"
    assert ports.read(bar - 1, 4) == b"\xff" * 4
    old.set(0x18, 0xFFFF_FFFF)
    assert old.get(0x18) == (-PORTS & 0xFFFF_FFFF) | 1


def test_the_wire(old: Old) -> None:
    assert old.get(abi.INTERRUPT_PIN, 1) == 1
    old.card.interrupt(True)
    assert old.level
    assert old.get(abi.STATUS, 2) & abi.STATUS_INTERRUPT
    old.set(abi.COMMAND, abi.COMMAND_INTX_DISABLE, 2)
    assert not old.level
    assert old.get(abi.STATUS, 2) & abi.STATUS_INTERRUPT, "it still wants to"
    old.set(abi.COMMAND, 0, 2)
    assert old.level
    old.card.interrupt(False)
    assert not old.level
    assert not old.get(abi.STATUS, 2) & abi.STATUS_INTERRUPT


def test_reset_lowers_the_wire_and_sends_the_ports_home(old: Old) -> None:
    home = old.get(0x18)
    old.set(abi.COMMAND, abi.COMMAND_IO, 2)
    old.set(0x18, 0xD000)
    old.card.interrupt(True)
    old.rig.pci.reset()
    assert not old.level
    assert old.get(0x18) == home
    assert old.rig.ports.read(home - 1, 1) == b"\xff"


def test_the_window_has_an_end(rig: Rig) -> None:
    rig.pci.add(first := PciFunction("first", ids=(1, 2), class_code=0))
    wide = PciFunction("wide", ids=(1, 2), class_code=0)
    wide.add_bar(0, 0x4000, Scratch(), io=True)
    rig.pci.add(wide)
    more = PciFunction("more", ids=(1, 2), class_code=0)
    more.add_bar(0, PORTS, Scratch(), io=True)
    with pytest.raises(ValueError, match="I/O window"):
        rig.pci.add(more)
    assert first in rig.pci.functions.values()
