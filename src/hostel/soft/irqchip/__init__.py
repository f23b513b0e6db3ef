"""The interrupt controllers of one machine, in software: what ``KVM_CREATE_IRQCHIP`` is elsewhere.

::

    devices ──wire──► Pic ──LINT0──► Lapic 0 ─► vCPU 0
               └────► Ioapic ──bus──► Lapic n ─► vCPU n ──IPI──► bus
    devices ──MSI───────────bus

``Irqchip`` is the bus, and answers for all ports and MMIO of them. It knows no vCPU: who runs one looks
before each entry. Times are nanoseconds of ``clock``; ``deadline`` says when ``fire`` is to be called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hostel.hypervisor import GsiRoute, MsiMessage

from . import ioapic, lapic, pic, pit
from .ioapic import Ioapic
from .lapic import FIXED, LOWEST, Lapic, Message, Refused
from .pic import Pic
from .pit import Pit

__all__ = ["Irqchip", "Lapic", "Message", "Refused"]

PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
"""The chips' numbers in a ``GsiRoute`` (KVM_IRQCHIP_*)."""


def standard_routes() -> list[GsiRoute]:
    """As KVM has them at first: GSI n is IOAPIC pin n, below 16 also PIC pin n; the PIT, IRQ 0, is pin 2."""
    routes = [GsiRoute(gsi, (gsi // 8, gsi % 8)) for gsi in range(16) if gsi != 2]
    pins = [GsiRoute(gsi, (IOAPIC, 2 if gsi == 0 else gsi)) for gsi in range(24) if gsi != 2]
    return routes + pins


class Irqchip:
    """All of one machine. Not thread-safe: its owner holds the machine's lock."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.lapics: dict[int, Lapic] = {}
        self.pic = Pic()
        self.ioapic = Ioapic(self)
        self.pit = Pit(clock, self._pit_tick)
        self._turn = 0
        self.set_routes(standard_routes())

    def add(self, id: int) -> Lapic:
        """The APIC of a new vCPU."""
        made = self.lapics[id] = Lapic(id, self, self._clock)
        made.external = lambda: self.pic.asking
        return made

    # --- Wires and messages ---

    def set_routes(self, routes: Iterable[GsiRoute]) -> None:
        self._routes: dict[int, list[MsiMessage | tuple[int, int]]] = {}
        for route in routes:
            self._routes.setdefault(route.gsi, []).append(route.target)

    def irq_line(self, gsi: int, level: bool) -> None:
        for target in self._routes.get(gsi, ()):
            if isinstance(target, MsiMessage):
                if level:
                    self.signal(target)
            elif target[0] == IOAPIC:
                if target[1] < ioapic.PINS:
                    self.ioapic.set(target[1], level)
            else:
                self.pic.set(target[0] * 8 + target[1], level)

    def signal(self, message: MsiMessage) -> bool:
        """An MSI; whether an APIC took it."""
        return self.send(Message.of_msi(message))

    def send(self, message: Message, sender: Lapic | None = None) -> bool:
        """Carry a message to those it is for; of several by lowest priority, one in turn."""
        targets = list(self._targets(message, sender))
        if message.mode == LOWEST and len(targets) > 1:
            self._turn += 1
            targets = [targets[self._turn % len(targets)]]
        if message.mode == LOWEST:
            message = Message(FIXED, message.vector, 0, level=message.level)
        return any([target.deliver(message) for target in targets])

    def _targets(self, message: Message, sender: Lapic | None) -> Iterable[Lapic]:
        match message.shorthand:
            case 1:
                return [sender] if sender else []
            case 2:
                return self.lapics.values()
            case 3:
                return [one for one in self.lapics.values() if one is not sender]
        return [one for one in self.lapics.values() if one.matches(message)]

    def end_of_interrupt(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def _pit_tick(self) -> None:
        self.irq_line(0, True)
        self.irq_line(0, False)

    # --- What a vCPU takes ---

    def take(self, id: int) -> int | None:
        """The vector that this vCPU takes now, if any; it is in service from here on."""
        local = self.lapics[id]
        vector = local.pending
        if vector is None:
            return None
        if vector < 0:
            return self.pic.acknowledge()
        local.acknowledge(vector)
        return vector

    # --- Time ---

    @property
    def deadline(self) -> int | None:
        soonest = self.pit.deadline
        for one in self.lapics.values():
            time = one.deadline
            if time is not None and (soonest is None or time < soonest):
                soonest = time
        return soonest

    def fire(self, now: int) -> None:
        """All timers that are due."""
        self.pit.fire(now)
        for one in self.lapics.values():
            one.fire(now)

    # --- Ports and MMIO ---

    def read_port(self, port: int) -> int | None:
        """A byte; None: the port is none of ours."""
        if port in _PIC_PORTS:
            return self.pic.read(port)
        return self.pit.read(port) if port in _PIT_PORTS else None

    def write_port(self, port: int, value: int) -> bool:
        if port in _PIC_PORTS:
            self.pic.write(port, value)
        elif port in _PIT_PORTS:
            self.pit.write(port, value)
        else:
            return False
        return True

    def read_mmio(self, id: int, address: int, size: int) -> bytes | None:
        """What vCPU ``id`` reads there; None: none of ours."""
        if address & ~0xFFF == lapic.BASE:
            return self.lapics[id].read(address & 0xFFF, size)
        if address & ~0xFFF == ioapic.BASE:
            return self.ioapic.read(address & 0xFFF, size)
        return None

    def write_mmio(self, id: int, address: int, data: bytes) -> bool:
        if address & ~0xFFF == lapic.BASE:
            self.lapics[id].write(address & 0xFFF, data)
        elif address & ~0xFFF == ioapic.BASE:
            self.ioapic.write(address & 0xFFF, data)
        else:
            return False
        return True


_PIC_PORTS = {base + n for base in (pic.MASTER, pic.SLAVE, pic.EDGES) for n in range(2)}
_PIT_PORTS = {*range(pit.PORTS, pit.CONTROL + 1), pit.SPEAKER}
