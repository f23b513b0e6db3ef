"""Routes, wires and messages on a real KVM; what reaches a guest is in tests/kvm and test_monitor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from guests.tiny import TinyGuest
from hostel.hypervisor import GsiRoute, MsiMessage
from hostel.vmm import layout
from hostel.vmm.irq import InterruptTable, pin_routes

pytestmark = pytest.mark.kvm
LAPIC_IRR = 0x200
MESSAGE = MsiMessage(0xFEE0_0000, 0x41)


@pytest.fixture
def guest() -> Iterator[TinyGuest]:
    with TinyGuest("hlt", irqchip=True) as guest:
        lapic = guest.vcpu.get_lapic()
        state = bytearray(lapic)
        state[0xF0:0xF4] = b"\xff\x01\x00\x00"  # the spurious-interrupt register turns it on
        guest.vcpu.set_lapic(type(lapic).from_buffer_copy(state))
        yield guest


@pytest.fixture
def table(guest: TinyGuest) -> Iterator[InterruptTable]:
    table = InterruptTable(guest.vm)
    yield table
    table.close()


def requested(guest: TinyGuest) -> list[int]:
    """Vectors that wait in the LAPIC's interrupt request register."""
    state = bytes(guest.vcpu.get_lapic())
    words = (state[LAPIC_IRR + 16 * n : LAPIC_IRR + 16 * n + 4] for n in range(8))
    bits = enumerate(int.from_bytes(word, "little") for word in words)
    return [32 * n + bit for n, word in bits for bit in range(32) if word >> bit & 1]


def test_pins_are_a_pcs() -> None:
    routes = {(route.gsi, route.target) for route in pin_routes()}
    assert {
        (0, (0, 0)),
        (0, (2, 2)),
        (4, (0, 4)),
        (4, (2, 4)),
        (9, (1, 1)),
        (23, (2, 23)),
    } <= routes
    assert not any(gsi == 2 for gsi, _ in routes)
    assert len(routes) == 15 + 23


def test_message_arrives(guest: TinyGuest, table: InterruptTable) -> None:
    slot = table.allocate_msi()
    slot.program(MESSAGE)
    slot.unmask()
    assert requested(guest) == []
    os.eventfd_write(slot.eventfd, 1)
    assert requested(guest) == [0x41]


def test_masked_message_is_pending_and_comes_once(guest: TinyGuest, table: InterruptTable) -> None:
    slot = table.allocate_msi()
    slot.program(MESSAGE)
    for _ in range(3):
        os.eventfd_write(slot.eventfd, 1)
    assert slot.pending
    assert requested(guest) == []
    slot.unmask()
    wait_for(lambda: requested(guest) == [0x41])
    assert not slot.pending
    slot.mask()
    assert not slot.pending


def test_message_can_change_while_masked_and_while_not(
    guest: TinyGuest, table: InterruptTable
) -> None:
    slot = table.allocate_msi()
    slot.program(MESSAGE)
    slot.program(MsiMessage(0xFEE0_0000, 0x42))
    slot.unmask()
    os.eventfd_write(slot.eventfd, 1)
    wait_for(lambda: requested(guest) == [0x42])
    slot.program(MsiMessage(0xFEE0_0000, 0x43))
    os.eventfd_write(slot.eventfd, 1)
    wait_for(lambda: requested(guest) == [0x42, 0x43])


def test_unmasked_before_it_has_a_message(guest: TinyGuest, table: InterruptTable) -> None:
    slot = table.allocate_msi()
    slot.unmask()
    os.eventfd_write(slot.eventfd, 1)
    slot.program(MESSAGE)
    wait_for(lambda: requested(guest) == [0x41])


def test_a_message_to_nowhere_harms_nobody(guest: TinyGuest, table: InterruptTable) -> None:
    slot = table.allocate_msi()
    slot.program(MsiMessage(0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF))
    slot.unmask()
    os.eventfd_write(slot.eventfd, 1)
    slot.mask()
    assert len(requested(guest)) <= 1


def test_slots_are_given_back(table: InterruptTable) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    slots = [table.allocate_msi() for _ in range(8)]
    assert [slot.gsi for slot in slots] == list(range(24, 32))
    for slot in slots:
        slot.program(MESSAGE)
        slot.unmask()
    slots[3].free()
    slots[3].free()
    assert table.allocate_msi().gsi == 27
    table.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_slots_run_out(monkeypatch: pytest.MonkeyPatch, table: InterruptTable) -> None:
    monkeypatch.setattr(layout, "GSI_COUNT", 26)
    table.allocate_msi()
    table.allocate_msi()
    with pytest.raises(ValueError, match="more than 26"):
        table.allocate_msi()


class Recorder:
    """What reaches a VM, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def irq_line(self, gsi: int, level: bool) -> None:
        self.calls.append((gsi, level))

    def set_gsi_routes(self, routes: list[GsiRoute]) -> None:
        self.calls.append(len(routes))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def test_a_wire_is_quiet_while_nothing_changes() -> None:
    vm = Recorder()
    table = InterruptTable(vm)
    line = table.line(4)
    for level in (False, True, True, False, False):
        line.set(level)
    line.set(True)
    line.pulse()
    assert table.line(4) is line
    assert vm.calls[1:] == [(4, True), (4, False), (4, True), (4, False), (4, True), (4, False)]
    with pytest.raises(ValueError, match="not a pin"):
        table.line(24)


def test_a_masked_message_costs_no_system_call() -> None:
    vm = Recorder()
    slot = InterruptTable(vm).allocate_msi()
    slot.program(MESSAGE)
    slot.program(MsiMessage(0xFEE0_1000, 1))
    slot.mask()
    assert vm.calls == [38]
    slot.free()


def wait_for(condition: Any) -> None:
    """KVM injects what piled up from a worker of its own."""
    import time

    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
