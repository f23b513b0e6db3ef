"""Interrupts: the GSI routing table of one VM, its wires and its messages.

::

    device ─ Interrupt.set(level) ─► GSI 0–23 ─► PIC and IOAPIC pins       (KVM_IRQ_LINE)
    device ─ write(eventfd) ───────► GSI 24–  ─► message to a LAPIC        (irqfd, MSI route)

KVM replaces the whole table at each KVM_SET_GSI_ROUTING (api.rst §4.52), so one object owns it.

A masked MSI-X vector must not interrupt, but must remember that it wanted to (PCI Local Bus 3.0
§6.8.2.9 and §6.8.3.5: pending bit, sent on unmask). The eventfd is that memory: masking takes the
irqfd away, so writes pile up in the eventfd's counter; unmasking puts it back, and KVM delivers a
counter that is not zero at once, as one interrupt. ``pending`` is "the counter is not zero".
"""

from __future__ import annotations

import os
import select
import threading
from typing import Protocol

from hostel.hypervisor import GsiRoute, MsiMessage, Vm

from . import layout

PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2  # KVM_IRQCHIP_*
IOAPIC_PINS = 24


class Interrupt(Protocol):
    """What a device is handed to ask for attention."""

    def set(self, level: bool) -> None: ...
    def pulse(self) -> None: ...


def pin_routes() -> list[GsiRoute]:
    """The pins of a PC: GSI 0–15 on the PICs and the IOAPIC, 16–23 on the IOAPIC alone.

    GSI 0 is the timer and sits on IOAPIC pin 2, whose own GSI is the PICs' cascade and unused.
    """
    routes = []
    for gsi in range(IOAPIC_PINS):
        if gsi == 2:
            continue
        if gsi < 16:
            routes.append(GsiRoute(gsi, (PIC_MASTER if gsi < 8 else PIC_SLAVE, gsi % 8)))
        routes.append(GsiRoute(gsi, (IOAPIC, gsi or 2)))
    return routes


class Line:
    """A wire to an interrupt controller's pin. A level that does not change costs nothing."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self.gsi = gsi
        self._vm = vm
        self._level = False

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._vm.irq_line(self.gsi, level)

    def pulse(self) -> None:
        """One edge, whatever the level was: an edge-triggered pin sees only a rise from low."""
        self.set(False)
        self.set(True)
        self.set(False)


class MsiSlot:
    """One message-signalled interrupt: one GSI, one eventfd, one irqfd. Begins masked."""

    def __init__(self, table: InterruptTable, vm: Vm, gsi: int) -> None:
        self.gsi = gsi
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.message: MsiMessage | None = None
        self.masked = True
        self._table = table
        self._vm = vm
        self._assigned = False

    @property
    def pending(self) -> bool:
        """Signalled and not delivered: the bit of the Pending Bit Array."""
        if self._assigned:
            return False
        poll = select.poll()
        poll.register(self.eventfd, select.POLLIN)
        return bool(poll.poll(0))

    def program(self, message: MsiMessage) -> None:
        """Where the interrupt goes. While masked this costs nothing yet."""
        with self._table.lock:
            changed, self.message = message != self.message, message
            if not self.masked:
                self._arm(changed)

    def mask(self) -> None:
        with self._table.lock:
            self.masked = True
            self._disarm()

    def unmask(self) -> None:
        with self._table.lock:
            if self.masked:
                self.masked = False
                self._arm(True)

    def free(self) -> None:
        """Give the GSI back and close the eventfd."""
        with self._table.lock:
            if self.eventfd < 0:
                return
            self._disarm()
            self._table.forget(self)
            os.close(self.eventfd)
            self.eventfd = -1

    def _arm(self, changed: bool) -> None:
        if self.message is None:
            return
        if changed:
            self._table.update()
        if not self._assigned:
            self._vm.irqfd(self.gsi, self.eventfd)
            self._assigned = True

    def _disarm(self) -> None:
        if self._assigned:
            self._vm.irqfd(self.gsi, self.eventfd, assign=False)
            self._assigned = False


class InterruptTable:
    """The GSI routing table of one VM. ``lock`` guards it and the slots in it."""

    def __init__(self, vm: Vm) -> None:
        self.lock = threading.RLock()
        self._vm = vm
        self._lines: dict[int, Line] = {}
        self._slots: dict[int, MsiSlot] = {}
        self._current: list[GsiRoute] = []
        self.update()

    def line(self, gsi: int) -> Line:
        """The wire to a pin; the same object each time, so that it knows its level."""
        if not 0 <= gsi < IOAPIC_PINS:
            raise ValueError(f"GSI {gsi} is not a pin")
        with self.lock:
            return self._lines.setdefault(gsi, Line(self._vm, gsi))

    def allocate_msi(self) -> MsiSlot:
        with self.lock:
            for gsi in range(layout.GSI_MSI_FIRST, layout.GSI_COUNT):
                if gsi not in self._slots:
                    self._slots[gsi] = slot = MsiSlot(self, self._vm, gsi)
                    return slot
        raise ValueError(f"more than {layout.GSI_COUNT} interrupts")

    def forget(self, slot: MsiSlot) -> None:
        del self._slots[slot.gsi]

    def update(self) -> None:
        """Hand KVM the table, if it changed."""
        routes = pin_routes()
        for slot in self._slots.values():
            if slot.message is not None:
                routes.append(GsiRoute(slot.gsi, slot.message))
        if routes != self._current:
            self._vm.set_gsi_routes(routes)
            self._current = routes

    def close(self) -> None:
        for slot in list(self._slots.values()):
            slot.free()
