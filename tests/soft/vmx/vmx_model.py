"""The VMX instructions as the manual's pseudo-code has them (SDM vol. 3C ch. 30): a second opinion.

Written from the manual alone; it shares nothing with ``hostel.soft.vmx``. What a VMCS holds is a table of
numbers by encoding; whether its controls, host state and guest state are right is looked up in ``WRONG``,
the mistakes that the random sequences make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Outcome = tuple[Any, ...]

ENCODINGS = {
    *range(0x0800, 0x0810, 2),
    *range(0x0C00, 0x0C0E, 2),
    *range(0x2000, 0x200E, 2),
    *range(0x2800, 0x2808, 2),
    *range(0x280A, 0x2812, 2),
    *range(0x4000, 0x401C, 2),
    *range(0x4400, 0x4410, 2),
    *range(0x4800, 0x482C, 2),
    *range(0x6000, 0x6010, 2),
    *range(0x6400, 0x640C, 2),
    *range(0x6800, 0x6828, 2),
    *range(0x6C00, 0x6C18, 2),
    *(0x0000, 0x2010, 0x201A, 0x2400, 0x2C00, 0x2C02, 0x401E, 0x482E, 0x4C00),
}
NONE = 0xFFFF_FFFF_FFFF_FFFF
REVISION = 0x68_6F73
BITS = (16, 64, 32, 64)

WRONG: list[tuple[int, int, Outcome]] = [
    (0x4000, 0, ("fail", 7)),  # default1 bits of the pin-based controls
    (0x400A, 5, ("fail", 7)),  # five CR3 targets
    (0x4012, 0, ("fail", 7)),  # default1 bits of the entry controls
    (0x6C00, 0, ("fail", 8)),  # host CR0 without PE, NE, PG
    (0x0C02, 0, ("fail", 8)),  # host CS is null
    (0x6C16, 1 << 50, ("fail", 8)),  # host RIP is not canonical
    (0x6800, 1, ("exit", 33, 0)),  # guest CR0 without NE, PG
    (0x4822, 0x83, ("exit", 33, 0)),  # a 16-bit TSS in IA-32e mode
    (0x6820, 0, ("exit", 33, 0)),  # RFLAGS bit 1
    (0x2800, 0x123, ("exit", 33, 4)),  # link pointer is not aligned
]
"""Field, value, what an entry with it gives; in the order of the manual's checks."""


@dataclass
class Region:
    revision: int = REVISION
    launch: str = "clear"
    operation: tuple[int, int] = (-1, 0)
    fields: dict[int, int] = field(default_factory=dict)


@dataclass
class Cpu:
    id: int
    vmxon: int | None = None
    current: int = NONE
    operations: int = 0
    flags: tuple[int, int] = (0, 0)
    """CF and ZF."""
    pe: bool = True
    vm: bool = False
    l_bit: bool = True
    cpl: int = 0
    vmxe: bool = True
    allowed: bool = True
    """IA32_FEATURE_CONTROL."""
    mov_ss: bool = False

    def host_loaded(self) -> None:
        """What a VM exit leaves: ring 0 of 64-bit mode."""
        self.pe, self.vm, self.l_bit, self.cpl = True, False, True, 0
        self.vmxe, self.mov_ss = True, False


class Model:
    def __init__(self, cpus: int, regions: dict[int, Region]) -> None:
        self.cpus = [Cpu(number) for number in range(cpus)]
        self.regions = regions
        self.active: dict[int, int] = {}

    # --- Conventions (§30.2) ---

    def succeed(self, cpu: Cpu, *value: int) -> Outcome:
        cpu.flags = (0, 0)
        return ("ok", *value)

    def fail_invalid(self, cpu: Cpu) -> Outcome:
        cpu.flags = (1, 0)
        return ("fail", None)

    def fail(self, cpu: Cpu, number: int) -> Outcome:
        if cpu.current == NONE:
            return self.fail_invalid(cpu)
        self.regions[cpu.current].fields[0x4400] = number
        cpu.flags = (0, 1)
        return ("fail", number)

    def no_mode(self, cpu: Cpu) -> bool:
        return not cpu.pe or cpu.vm or not cpu.l_bit

    def refused(self, cpu: Cpu) -> Outcome | None:
        if cpu.vmxon is None or self.no_mode(cpu):
            return ("#UD",)
        return ("#GP",) if cpu.cpl else None

    def bad(self, address: int) -> bool:
        return address % 4096 != 0 or address >= 1 << 40

    def revision(self, address: int) -> int:
        return self.regions[address].revision if address in self.regions else 0xFFFF_FFFF

    # --- Instructions ---

    def vmxon(self, cpu: Cpu, address: int) -> Outcome:
        if self.no_mode(cpu) or (cpu.vmxon is None and not cpu.vmxe):
            return ("#UD",)
        if cpu.vmxon is not None:
            return ("#GP",) if cpu.cpl else self.fail(cpu, 15)
        if cpu.cpl or not cpu.allowed:
            return ("#GP",)
        if self.bad(address) or self.revision(address) != REVISION:
            return self.fail_invalid(cpu)
        if address in self.active or any(other.vmxon == address for other in self.cpus):
            return ("misuse",)
        cpu.vmxon, cpu.current = address, NONE
        cpu.operations += 1
        return self.succeed(cpu)

    def vmxoff(self, cpu: Cpu) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        cpu.vmxon, cpu.current = None, NONE
        return self.succeed(cpu)

    def elsewhere(self, cpu: Cpu, address: int) -> bool:
        """What the manual leaves undefined."""
        in_use = any(other.vmxon == address for other in self.cpus if other is not cpu)
        return in_use or self.active.get(address, cpu.id) != cpu.id

    def vmclear(self, cpu: Cpu, address: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if self.bad(address):
            return self.fail(cpu, 2)
        if address == cpu.vmxon:
            return self.fail(cpu, 3)
        if self.elsewhere(cpu, address):
            return ("misuse",)
        if address in self.regions:
            self.regions[address].launch = "clear"
        self.active.pop(address, None)
        if cpu.current == address:
            cpu.current = NONE
        return self.succeed(cpu)

    def vmptrld(self, cpu: Cpu, address: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if self.bad(address):
            return self.fail(cpu, 9)
        if address == cpu.vmxon:
            return self.fail(cpu, 10)
        if self.elsewhere(cpu, address):
            return ("misuse",)
        if self.revision(address) != REVISION:
            return self.fail(cpu, 11)
        cpu.current = address
        self.active[address] = cpu.id
        return self.succeed(cpu)

    def vmptrst(self, cpu: Cpu) -> Outcome:
        return self.refused(cpu) or self.succeed(cpu, cpu.current)

    def field(self, encoding: int) -> bool:
        high = encoding & 1
        return encoding & ~1 in ENCODINGS and (not high or encoding >> 13 == 1)

    def vmread(self, cpu: Cpu, encoding: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if cpu.current == NONE:
            return self.fail_invalid(cpu)
        if not self.field(encoding):
            return self.fail(cpu, 12)
        value = self.regions[cpu.current].fields.get(encoding & ~1, 0)
        return self.succeed(cpu, value >> 32 if encoding & 1 else value)

    def vmwrite(self, cpu: Cpu, encoding: int, value: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if cpu.current == NONE:
            return self.fail_invalid(cpu)
        if not self.field(encoding):
            return self.fail(cpu, 12)
        if encoding >> 10 & 3 == 1:
            return self.fail(cpu, 13)
        fields = self.regions[cpu.current].fields
        if encoding & 1:
            low = fields.get(encoding & ~1, 0) % (1 << 32)
            fields[encoding & ~1] = value % (1 << 32) << 32 | low
        else:
            fields[encoding] = value % (1 << BITS[encoding >> 13])
        return self.succeed(cpu)

    def vmcall(self, cpu: Cpu) -> Outcome:
        return self.refused(cpu) or self.fail(cpu, 1)

    def invept(self, cpu: Cpu, kind: int, eptp: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if kind not in (1, 2):
            return self.fail(cpu, 28)
        right = eptp & 7 in (0, 6) and eptp >> 3 & 7 == 3 and not eptp >> 7 & 0x1F
        if kind == 1 and (not right or eptp >= 1 << 40):
            return self.fail(cpu, 28)
        return self.succeed(cpu)

    def invvpid(self, cpu: Cpu, kind: int, vpid: int, address: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        canonical = address < 1 << 47 or address >= (1 << 64) - (1 << 47)
        if kind > 3 or vpid >= 1 << 16 or (kind != 2 and vpid == 0):
            return self.fail(cpu, 28)
        if kind == 0 and not canonical:
            return self.fail(cpu, 28)
        return self.succeed(cpu)

    def vmlaunch(self, cpu: Cpu) -> Outcome:
        return self.enter(cpu, "clear", 4)

    def vmresume(self, cpu: Cpu) -> Outcome:
        return self.enter(cpu, "launched", 5)

    def enter(self, cpu: Cpu, wanted: str, otherwise: int) -> Outcome:
        if refused := self.refused(cpu):
            return refused
        if cpu.current == NONE:
            return self.fail_invalid(cpu)
        region = self.regions[cpu.current]
        if error := self.entry_error(cpu, region, wanted, otherwise):
            return self.fail(cpu, error)
        cpu.host_loaded()
        cpu.flags = (0, 0)
        if wrong := self.wrong(region):
            region.fields[0x4402] = wrong[1] | 1 << 31
            region.fields[0x6400] = wrong[2]
            return wrong
        region.launch, region.operation = "launched", (cpu.id, cpu.operations)
        region.fields[0x4402] = 12
        region.fields[0x6400] = 0
        region.fields[0x440C] = 1
        region.fields[0x681E] += 1
        return ("exit", 12, 0)

    def entry_error(self, cpu: Cpu, region: Region, wanted: str, otherwise: int) -> int:
        if cpu.mov_ss:
            return 26
        if region.launch != wanted:
            return otherwise
        if wanted == "launched" and region.operation != (cpu.id, cpu.operations):
            return 6
        wrong = self.wrong(region)
        return int(wrong[1]) if wrong and wrong[0] == "fail" else 0

    def wrong(self, region: Region) -> Outcome | None:
        for encoding, value, outcome in WRONG:
            if region.fields.get(encoding, 0) == value:
                return outcome
        return None
