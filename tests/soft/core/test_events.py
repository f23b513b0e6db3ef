"""Delivery through the IDT, without a core: a state, some memory, and the manual's rules."""

from __future__ import annotations

import struct

import pytest

from hostel.soft.core.events import Fault, TaskGate, deliver
from hostel.soft.exceptions import DF, GP, NP, PF, SS, TS
from hostel.soft.silicon import Event, EventType, PageFault
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    RIGHTS_CODE32,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RSP,
    CpuState,
    Segment,
    Table,
)

GDT, IDT, TSS = 0x1000, 0x2000, 0x3000
EXCEPTION = EventType.HARDWARE_EXCEPTION


class Ram:
    """Linear memory as bytes; some pages missing."""

    def __init__(self) -> None:
        self.bytes = bytearray(0x20000)
        self.missing: set[int] = set()

    def read(self, address: int, size: int, user: bool = False) -> int:
        return int.from_bytes(self.bytes[address : address + size], "little")

    def write(self, address: int, size: int, value: int, user: bool = False) -> None:
        self.write_bytes(address, value.to_bytes(size, "little"), user)

    def write_bytes(self, address: int, data: bytes, user: bool = False) -> None:
        if address >> 12 in self.missing:
            raise PageFault(address, 2 | user << 2)
        self.bytes[address : address + len(data)] = data

    def frame(self, address: int, count: int, size: int) -> list[int]:
        return [self.read(address + size * at, size) for at in range(count)]


def long_gate(
    ram: Ram, vector: int, *, offset: int = 0x9000, rights: int = 0x8E, ist: int = 0
) -> None:
    entry = struct.pack(
        "<HHBBHII", offset & 0xFFFF, 8, ist, rights, offset >> 16 & 0xFFFF, offset >> 32, 0
    )
    ram.bytes[IDT + 16 * vector : IDT + 16 * vector + 16] = entry


def long_machine(ring: int = 0) -> tuple[CpuState, Ram]:
    ram = Ram()
    for at, entry in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00AFFB000000FFFF)):
        ram.write(GDT + 8 * at, 8, entry)
    ram.write(TSS + 4, 8, 0x7008)
    ram.write(TSS + 36, 8, 0x8000)
    state = CpuState(rip=0x4000, rflags=2 | RFLAGS_IF | RFLAGS_TF, cr0=CR0_PE | CR0_PG)
    state.efer = EFER_LME | EFER_LMA
    state.gpr[RSP] = 0x5008
    state.cs = Segment(0x23 if ring else 8, 0, 0xFFFF_FFFF, RIGHTS_CODE64 | ring << 5)
    state.ss = Segment(0x1B if ring else 0x10, 0, 0xFFFF_FFFF, RIGHTS_DATA32 | ring << 5)
    state.gdtr, state.idtr = Table(GDT, 0x27), Table(IDT, 0xFFF)
    state.tr = Segment(0x28, TSS, 0x67, 0x8B)
    return state, ram


def test_in_64_bit_mode_the_stack_is_aligned_and_a_fault_has_rf() -> None:
    state, ram = long_machine()
    long_gate(ram, GP)
    deliver(state, ram, Event(GP, EXCEPTION, 0x50), 0x4000)
    assert (state.rip, state.gpr[RSP], state.cs.selector) == (0x9000, 0x5000 - 48, 8)
    flags = 2 | RFLAGS_IF | RFLAGS_TF | RFLAGS_RF
    assert ram.frame(state.gpr[RSP], 6, 8) == [0x50, 0x4000, 8, flags, 0x5008, 0x10]
    assert state.rflags == 2


def test_an_interrupt_pushes_the_flags_as_they_are_and_a_trap_gate_leaves_if() -> None:
    state, ram = long_machine()
    long_gate(ram, 0x40, rights=0x8F)
    deliver(state, ram, Event(0x40, EventType.EXTERNAL), 0x4000)
    assert ram.frame(state.gpr[RSP], 3, 8)[2] == 2 | RFLAGS_IF | RFLAGS_TF
    assert state.rflags == 2 | RFLAGS_IF


def test_from_ring_3_the_stack_comes_from_the_tss_and_ss_is_null() -> None:
    state, ram = long_machine(ring=3)
    long_gate(ram, 0x80, rights=0xEE)
    deliver(state, ram, Event(0x80, EventType.SOFTWARE_INTERRUPT, None, 2), 0x4002)
    assert state.gpr[RSP] == 0x7000 - 40
    assert (state.cpl, state.ss.selector, state.ss.usable) == (0, 0, False)
    assert ram.frame(state.gpr[RSP], 5, 8)[0] == 0x4002


def test_an_ist_entry_is_a_stack_in_any_ring() -> None:
    state, ram = long_machine()
    long_gate(ram, 2, ist=1)
    deliver(state, ram, Event(2, EventType.NMI), 0x4000)
    assert state.gpr[RSP] == 0x8000 - 40


def refuse(state: CpuState, ram: Ram, event: Event) -> tuple[int, int | None]:
    before = state.plain()
    with pytest.raises(Fault) as caught:
        deliver(state, ram, event, state.rip)
    assert state.plain() == before, "a delivery that fails changes nothing"
    return caught.value.vector, caught.value.error


def test_software_needs_a_gate_of_its_ring_and_hardware_does_not() -> None:
    state, ram = long_machine(ring=3)
    long_gate(ram, 0x30)
    software = Event(0x30, EventType.SOFTWARE_INTERRUPT, None, 2)
    assert refuse(state, ram, software) == (GP, 0x30 << 3 | 2)
    deliver(state, ram, Event(0x30, EventType.EXTERNAL), state.rip)
    assert state.rip == 0x9000


@pytest.mark.parametrize(
    ("rights", "vector", "expected"),
    [
        (0x0E, 0x20, (NP, 0x20 << 3 | 3)),
        (0x85, 0x20, (GP, 0x20 << 3 | 3)),
        (0x86, 0x20, (GP, 0x20 << 3 | 3)),
    ],
)
def test_a_gate_must_be_present_and_of_a_64_bit_kind(
    rights: int, vector: int, expected: tuple[int, int]
) -> None:
    state, ram = long_machine()
    long_gate(ram, vector, rights=rights)
    assert refuse(state, ram, Event(vector, EventType.EXTERNAL)) == expected


def test_a_vector_beyond_the_idt() -> None:
    state, ram = long_machine()
    state.idtr.limit = 0x1FF
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (GP, 0x103)


def test_a_gate_to_no_code_segment() -> None:
    state, ram = long_machine()
    long_gate(ram, 0x20)
    ram.write(GDT + 8, 8, 0x00CF93000000FFFF)
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (GP, 9)
    ram.write(GDT + 8, 8, 0x00AF1B000000FFFF)
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (NP, 9)


def test_a_tss_too_short_and_a_stack_that_is_no_address() -> None:
    state, ram = long_machine(ring=3)
    long_gate(ram, 0x20)
    state.tr.limit = 10
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (TS, 0x29)
    state.tr.limit = 0x67
    ram.write(TSS + 4, 8, 1 << 63)
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (SS, 1)


def test_a_page_fault_on_the_stack() -> None:
    state, ram = long_machine()
    long_gate(ram, 0x20)
    ram.missing.add(4)
    with pytest.raises(Fault) as caught:
        deliver(state, ram, Event(0x20, EventType.EXTERNAL), state.rip)
    assert (caught.value.vector, caught.value.error, caught.value.cr2) == (PF, 2, 0x4FD8)


def test_the_accessed_bit_of_a_code_segment_is_set() -> None:
    state, ram = long_machine()
    long_gate(ram, 0x20)
    ram.write(GDT + 8, 8, 0x00AF9A000000FFFF)
    deliver(state, ram, Event(0x20, EventType.EXTERNAL), state.rip)
    assert ram.read(GDT + 13, 1) == 0x9B


def protected_machine(ring: int) -> tuple[CpuState, Ram]:
    state, ram = long_machine(ring)
    state.efer = 0
    state.cr0 = CR0_PE
    ram.write(GDT + 8, 8, 0x00CF9B000000FFFF)
    state.cs.rights = RIGHTS_CODE32 | ring << 5
    state.idtr.limit = 0x7FF
    ram.write(TSS + 4, 4, 0x7000)
    ram.write(TSS + 8, 4, 0x10)
    return state, ram


def gate32(ram: Ram, vector: int, rights: int = 0x8E) -> None:
    ram.write(IDT + 8 * vector, 8, 0x9000 | 8 << 16 | rights << 40)


def test_in_protected_mode_ring_3_enters_ring_0_on_its_stack() -> None:
    state, ram = protected_machine(3)
    gate32(ram, GP)
    deliver(state, ram, Event(GP, EXCEPTION, 4), 0x4000)
    assert (state.rip, state.gpr[RSP], state.ss.selector, state.cpl) == (
        0x9000,
        0x7000 - 24,
        0x10,
        0,
    )
    frame = ram.frame(state.gpr[RSP], 6, 4)
    assert (frame[0], frame[1], frame[4], frame[5]) == (4, 0x4000, 0x5008, 0x1B)


def test_a_16_bit_gate_pushes_words() -> None:
    state, ram = protected_machine(0)
    gate32(ram, 0x21, rights=0x86)
    deliver(state, ram, Event(0x21, EventType.EXTERNAL), 0x4000)
    assert state.gpr[RSP] == 0x5008 - 6
    assert ram.frame(state.gpr[RSP], 2, 2) == [0x4000, 8]


def test_a_task_gate_is_the_hypervisors() -> None:
    state, ram = protected_machine(0)
    ram.write(IDT + 8 * 8, 8, 0x85 << 40 | 0x38 << 16)
    with pytest.raises(TaskGate) as caught:
        deliver(state, ram, Event(DF, EXCEPTION, 0), 0x4000)
    assert caught.value.selector == 0x38


def test_the_stack_of_an_inner_ring_must_be_writable_data_of_it() -> None:
    state, ram = protected_machine(3)
    gate32(ram, 0x20)
    ram.write(TSS + 8, 4, 8)
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (TS, 9)
    ram.write(TSS + 8, 4, 0)
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (TS, 1)


def test_a_stack_that_is_full_is_a_stack_fault() -> None:
    state, ram = protected_machine(0)
    gate32(ram, 0x20)
    state.gpr[RSP], state.ss.limit = 0x6000, 0x5000
    assert refuse(state, ram, Event(0x20, EventType.EXTERNAL)) == (SS, 0)


def test_in_real_mode_three_words_and_the_table_at_0() -> None:
    ram, state = Ram(), CpuState(rip=0x123, rflags=2 | RFLAGS_IF)
    state.cs.base, state.cs.selector, state.ss.base = 0x1000, 0x100, 0x2000
    state.idtr.limit, state.gpr[RSP] = 0x3FF, 2
    ram.write(4 * 0x10, 4, 0x0300_0044)
    deliver(state, ram, Event(0x10, EventType.SOFTWARE_INTERRUPT, None, 2), 0x125)
    assert (state.rip, state.cs.selector, state.cs.base) == (0x44, 0x300, 0x3000)
    assert state.gpr[RSP] == 0xFFFC
    assert ram.read(0x2000, 2) == 2 | RFLAGS_IF
    assert ram.frame(0x2000 + 0xFFFC, 2, 2) == [0x125, 0x100]
    assert not state.rflags & RFLAGS_IF
