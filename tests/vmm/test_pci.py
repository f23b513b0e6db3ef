"""PCI through ECAM: identity, BAR sizing and moving, capabilities, MSI-X."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from hostel.abi import pci as abi
from hostel.hypervisor import MsiMessage
from hostel.vmm import layout
from hostel.vmm.irq import MsiSlot
from hostel.vmm.msix import PBA_OFFSET, MsixTable
from hostel.vmm.pci import PciFunction
from virtio.rig import Rig


class Scratch:
    """A page of registers."""

    def __init__(self) -> None:
        self.bytes = bytearray(4096)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data

    def reset(self) -> None: ...
    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None: ...


class Card(PciFunction):
    """A 32-bit BAR, a 64-bit BAR, a capability, and MSI-X with three vectors."""

    def __init__(self, slots: list[MsiSlot]) -> None:
        super().__init__("card", ids=(0x1234, 0x5678), class_code=0x01_8000, revision=3)
        self.moves: list[tuple[int | None, int | None]] = []
        self.add_bar(0, 4096, Scratch()).on_move = lambda *move: self.moves.append(move)
        self.add_bar(2, 1 << 20, Scratch(), wide=True)
        self.extra = self.add_capability(abi.CAP_ID_VNDR, b"\x05abc", b"\0\xff")
        self.msix = MsixTable(self, 4, slots)

    def write_config(self, offset: int, data: bytes) -> None:
        super().write_config(offset, data)
        if self.msix.touches(offset, len(data)):
            self.msix.update()

    def reset(self) -> None:
        super().reset()
        self.msix.reset()


class Slot:
    """The card in a machine, seen from the guest."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.slots = [rig.irqs.allocate_msi() for _ in range(3)]
        self.card = Card(self.slots)
        self.base = layout.ECAM_START + (rig.pci.add(self.card) << 15)

    def get(self, register: int, size: int = 4) -> int:
        return self.rig.read(self.base + register, size)

    def set(self, register: int, value: int, size: int = 4) -> None:
        self.rig.write(self.base + register, size, value)

    def enable_memory(self) -> None:
        self.set(abi.COMMAND, abi.COMMAND_MEMORY, 2)

    @property
    def msix(self) -> int:
        at = self.get(abi.CAPABILITY_LIST, 1)
        while self.get(at, 1) != abi.CAP_ID_MSIX:
            at = self.get(at + 1, 1)
        return at

    @property
    def table(self) -> int:
        return self.get(0x20) & ~0xF

    def set_control(self, value: int) -> None:
        self.set(self.msix + abi.MSIX_FLAGS, value, 2)

    def set_vector(self, vector: int, data: int, control: int = 0) -> None:
        at = self.table + 16 * vector
        for offset, word in ((0, 0xFEE0_1000), (4, 0), (8, data), (12, control)):
            self.rig.write(at + offset, 4, word)

    def pending(self) -> int:
        return self.rig.read(self.table + PBA_OFFSET, 8)


@pytest.fixture
def slot() -> Iterator[Slot]:
    rig = Rig()
    slot = Slot(rig)
    yield slot
    slot.card.close()
    slot.card.msix.close()
    rig.close()


def test_identity(slot: Slot) -> None:
    assert slot.get(abi.VENDOR_ID) == 0x5678_1234
    assert slot.get(abi.REVISION_ID) == 0x01_8000_03
    assert slot.get(abi.HEADER_TYPE, 1) == 0
    slot.set(abi.VENDOR_ID, 0)
    assert slot.get(abi.VENDOR_ID) == 0x5678_1234


def test_host_bridge_and_empty_slots(slot: Slot) -> None:
    rig = slot.rig
    assert rig.read(layout.ECAM_START + abi.CLASS_PROG, 4) >> 0 & 0xFFFFFF == 0x06_0000
    for empty in (2 << 15, 1 << 15 | 1 << 12, 31 << 15):
        assert rig.read(layout.ECAM_START + empty, 4) == 0xFFFF_FFFF
        rig.write(layout.ECAM_START + empty, 4, 0)


def test_the_firmware_has_placed_the_bars(slot: Slot) -> None:
    addresses = [slot.get(0x10), slot.get(0x18) & ~0xF, slot.table]
    assert slot.get(0x18) & 0xF == abi.BASE_ADDRESS_MEM_TYPE_64
    for address, size in zip(addresses, (4096, 1 << 20, 1 << 16), strict=True):
        assert address % size == 0
        assert layout.PCI_MMIO32_START <= address < layout.PCI_MMIO32_END


def test_bar_sizing(slot: Slot) -> None:
    """PCI Local Bus 3.0 §6.2.5.1: write all ones, read the size back."""
    for register in (0x10, 0x18, 0x1C, 0x14):
        slot.set(register, 0xFFFF_FFFF)
    assert slot.get(0x10) == 0xFFFF_F000
    assert (slot.get(0x18), slot.get(0x1C)) == (0xFFF0_0004, 0xFFFF_FFFF)
    assert slot.get(0x14) == 0, "there is no BAR 1"


def test_a_bar_answers_only_while_memory_is_enabled(slot: Slot) -> None:
    at = slot.get(0x10)
    assert slot.rig.read(at, 4) == 0xFFFF_FFFF
    slot.enable_memory()
    slot.rig.write(at, 4, 0xCAFE)
    assert slot.rig.read(at, 4) == 0xCAFE
    slot.set(abi.COMMAND, 0, 2)
    assert slot.rig.read(at, 4) == 0xFFFF_FFFF
    assert slot.card.moves == [(None, at), (at, None)]


def test_a_bar_moves_with_what_it_holds(slot: Slot) -> None:
    slot.enable_memory()
    old = slot.get(0x10)
    slot.rig.write(old, 4, 0xCAFE)
    slot.set(0x10, 0xD123_4000)
    assert slot.rig.read(0xD123_4000, 4) == 0xCAFE
    assert slot.rig.read(old, 4) == 0xFFFF_FFFF


def test_a_64_bit_bar_moves_above_4_gib(slot: Slot) -> None:
    slot.enable_memory()
    slot.set(0x18, 0)
    slot.set(0x1C, 0x40)
    slot.rig.write(0x40_0000_0000, 4, 7)
    assert slot.rig.read(0x40_0000_0000, 4) == 7


def test_a_bar_on_top_of_another_device_answers_nowhere(slot: Slot) -> None:
    slot.enable_memory()
    home = slot.get(0x10)
    slot.set(0x10, layout.ECAM_START)
    assert slot.get(abi.VENDOR_ID) == 0x5678_1234, "ECAM is still there"
    slot.set(0x10, home)
    slot.rig.write(home, 4, 5)
    assert slot.rig.read(home, 4) == 5


def test_capabilities_and_their_masks(slot: Slot) -> None:
    assert slot.get(abi.STATUS, 2) == abi.STATUS_CAP_LIST
    at = slot.card.extra
    slot.set(at + 2, 0xFFFF_FFFF)
    body = [slot.get(at + 2 + n, 1) for n in range(4)]
    assert body == [0x05, 0xFF, ord("b"), ord("c")]
    assert slot.msix % 4 == 0


def test_reset_sends_everything_home(slot: Slot) -> None:
    home = slot.get(0x10)
    slot.enable_memory()
    slot.set(0x10, 0xD123_4000)
    slot.set_vector(0, 0x41)
    slot.set_control(abi.MSIX_FLAGS_ENABLE)
    slot.rig.pci.reset()
    assert (slot.get(0x10), slot.get(abi.COMMAND, 2)) == (home, 0)
    assert slot.get(slot.msix + 2, 2) == 2
    assert not slot.rig.vm.irqfds


# --- MSI-X -------------------------------------------------------------------------------------


def delivered(slot: Slot) -> set[int]:
    """The vectors that KVM delivers."""
    return {n for n, one in enumerate(slot.slots) if slot.rig.vm.irqfds.get(one.gsi) == one.eventfd}


def test_a_vector_is_delivered_when_nothing_masks_it(slot: Slot) -> None:
    slot.enable_memory()
    assert slot.get(slot.msix + abi.MSIX_FLAGS, 2) & abi.MSIX_FLAGS_QSIZE == 2
    slot.set_vector(1, 0x41)
    assert delivered(slot) == set(), "MSI-X is not enabled"
    slot.set_control(abi.MSIX_FLAGS_ENABLE | abi.MSIX_FLAGS_MASKALL)
    assert delivered(slot) == set(), "the function is masked"
    slot.set_control(abi.MSIX_FLAGS_ENABLE)
    assert delivered(slot) == {1}, "the others are masked one by one"
    assert slot.rig.vm.routes[slot.slots[1].gsi] == MsiMessage(0xFEE0_1000, 0x41)
    slot.set_vector(1, 0x42)
    assert slot.rig.vm.routes[slot.slots[1].gsi] == MsiMessage(0xFEE0_1000, 0x42)
    slot.set_vector(1, 0x42, control=abi.MSIX_ENTRY_CTRL_MASKBIT)
    assert delivered(slot) == set()


def test_a_masked_vector_is_pending(slot: Slot) -> None:
    slot.enable_memory()
    for vector in range(3):
        slot.set_vector(vector, 0x40 + vector)
    slot.set_control(abi.MSIX_FLAGS_ENABLE | abi.MSIX_FLAGS_MASKALL)
    os.eventfd_write(slot.slots[2].eventfd, 1)
    assert slot.pending() == 1 << 2
    slot.rig.write(slot.table + PBA_OFFSET, 8, 0)
    assert slot.pending() == 1 << 2, "read-only"
    slot.set_control(abi.MSIX_FLAGS_ENABLE)
    assert delivered(slot) == {0, 1, 2}
    assert slot.pending() == 0


def test_the_table_reads_back_and_ends(slot: Slot) -> None:
    slot.enable_memory()
    slot.set_vector(2, 0x77)
    assert slot.rig.read(slot.table + 32, 8) == 0xFEE0_1000
    assert slot.rig.read(slot.table + 40, 8) == 0x77
    slot.rig.write(slot.table + 48, 8, 2**64 - 1)
    assert slot.rig.read(slot.table + 48, 8) == 0


def test_state_moves_to_another_machine(slot: Slot) -> None:
    slot.enable_memory()
    slot.set(0x10, 0xD123_4000)
    slot.set_vector(1, 0x41)
    slot.set_control(abi.MSIX_FLAGS_ENABLE)
    os.eventfd_write(slot.slots[0].eventfd, 1)
    saved = json.loads(json.dumps([slot.rig.pci.save(), slot.card.msix.save()]))
    rig = Rig()
    other = Slot(rig)
    try:
        rig.pci.load(saved[0])
        other.card.msix.load(saved[1])
        assert other.get(0x10) == 0xD123_4000
        assert delivered(other) == {1}
        assert other.pending() == 1
    finally:
        other.card.close()
        other.card.msix.close()
        rig.close()


def test_the_bus_is_full_at_32(slot: Slot) -> None:
    for number in range(2, 32):
        one = PciFunction(f"card {number}", ids=(1, number), class_code=0)
        assert slot.rig.pci.add(one) == number
    with pytest.raises(ValueError, match="no slot is left"):
        slot.rig.pci.add(PciFunction("one too many", ids=(1, 1), class_code=0))


def test_any_configuration_write_is_survived(slot: Slot) -> None:
    for register in range(0, 4096, 4):
        for value in (0xFFFF_FFFF, 0, 0xA5A5_A5A5):
            slot.set(register, value)
    assert slot.get(abi.VENDOR_ID) == 0x5678_1234
    slot.rig.pci.reset()
    slot.enable_memory()
    slot.rig.write(slot.get(0x10), 4, 1)
    assert slot.rig.read(slot.get(0x10), 4) == 1
