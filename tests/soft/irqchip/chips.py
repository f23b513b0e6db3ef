"""A machine's interrupt controllers with a clock that a test turns."""

from __future__ import annotations

from hostel.soft.irqchip import Irqchip, lapic

APIC, IO = lapic.BASE, 0xFEC0_0000


class Board:
    def __init__(self, cpus: int = 1) -> None:
        self.now = 0
        self.chip = Irqchip(lambda: self.now)
        for id in range(cpus):
            self.chip.add(id)

    def switch_on(self, *ids: int) -> None:
        for id in ids or self.chip.lapics:
            self.set(id, lapic.SVR, 0x1FF)

    def get(self, id: int, number: int) -> int:
        data = self.chip.read_mmio(id, APIC + number * 16, 4)
        assert data is not None
        return int.from_bytes(data, "little")

    def set(self, id: int, number: int, value: int) -> None:
        assert self.chip.write_mmio(id, APIC + number * 16, value.to_bytes(4, "little"))

    def pin(self, pin: int, entry: int) -> None:
        """Program a pin of the IOAPIC."""
        for half in (1, 0):
            self.io(0x10 + 2 * pin + half, entry >> 32 * half & 0xFFFF_FFFF)

    def io(self, register: int, value: int) -> None:
        self.chip.write_mmio(0, IO, register.to_bytes(4, "little"))
        self.chip.write_mmio(0, IO + 0x10, value.to_bytes(4, "little"))

    def io_read(self, register: int) -> int:
        self.chip.write_mmio(0, IO, register.to_bytes(4, "little"))
        return int.from_bytes(self.chip.read_mmio(0, IO + 0x10, 4) or b"", "little")

    def out(self, port: int, *values: int) -> None:
        for value in values:
            assert self.chip.write_port(port, value)

    def pass_time(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.chip.fire(self.now)
