"""The table of mini guests: what each exercises, its parameters, and what it says.

To add one: ``NAME.s`` and ``NAME.txt`` beside this file, and a row here. The text is what it says with the
parameters that stand here; on every host the same.
"""

from __future__ import annotations

import msgspec

from .build import HERE, Mode

LOAD_ADDRESS = 0x10_0000
"""Where an image of mode ``protected`` or ``long`` is, and its entry: 32-bit, flat, paging off."""
SECTOR_ADDRESS = 0x7C00
"""Where a boot sector is, and its entry: real mode, all segments 0."""
RESULT_PAGE = 0x8_0000
RESULT_MAGIC = b"MINIHOST"

MOST = 0x7FFF_FFFF


class Guest(msgspec.Struct, frozen=True):
    name: str
    exercises: str
    parameters: dict[str, int] = {}
    most: dict[str, int] = {}
    """What a parameter may be at most, else ``MOST``. One of 0 or 1 is a switch; no other may be 0."""
    least: dict[str, int] = {}
    mode: Mode = "long"
    irqchip: bool = False
    """It needs LAPIC, IOAPIC, PIC and PIT."""
    memory: int = 64 << 20
    ends: str = "exit"
    """``exit``: by the debug exit port; ``halt``: in a HLT for ever; ``shutdown``: a triple fault."""

    @property
    def cpus(self) -> int:
        return self.parameters.get("cpus", 1)

    @property
    def console(self) -> str:
        """All that it says, with these parameters."""
        return (HERE / f"{self.name}.txt").read_text()


_ALL = (
    Guest("hello", "long mode, and a word on the console"),
    Guest("cpuid", "CPUID: what every x86-64 has"),
    Guest("ports", "IN, OUT and their strings, each width"),
    Guest("mmio", "instructions on what is no memory"),
    Guest("msrs", "RDMSR and WRMSR"),
    Guest("fpu", "x87, SSE and SSE2 in ring 3"),
    Guest(
        "faults", "exceptions through an IDT of its own: error codes, CR2, a stack of its own (IST)"
    ),
    Guest("double", "faults while a fault is delivered"),
    Guest("software", "software interrupts in ring 0"),
    Guest("steps", "a trap after each instruction (TF)"),
    Guest("halt", "HLT with nothing to wake it", ends="halt"),
    Guest("compute", "arithmetic and branches", {"rounds": 10_000}),
    Guest("memory", "streams, a copy, random places", {"kib": 64, "rounds": 1}, {"kib": 56 << 10}),
    Guest(
        "calls",
        "a recursion, and calls through a table",
        {"depth": 14, "rounds": 2000},
        {"depth": 60},
    ),
    Guest(
        "syscall",
        "SYSCALL and SYSRET, or INT 0x80 and IRET",
        {"rounds": 300, "gate": 0},
        {"gate": 1},
    ),
    Guest("rings", "what ring 3 may not do"),
    Guest("churn", "map, use, unmap", {"pages": 16, "rounds": 4}, {"pages": 12_000}),
    Guest("demand", "page faults: not present, protected", {"pages": 48}, {"pages": 12_000}),
    Guest("fork", "address spaces copied on write", {"pages": 8, "copies": 3}, {"pages": 6_000}),
    Guest(
        "switch",
        "CR3 loads between processes",
        {"processes": 4, "rounds": 10, "kernel_global": 0},
        {"processes": 2_000, "kernel_global": 1},
    ),
    Guest("accessed", "accessed and dirty bits"),
    Guest("selfmod", "code that changes itself, by its own address and by another", {"rounds": 50}),
    Guest("large", "a page of 2 MiB beside small ones; a split; reserved bits"),
    Guest("huge", "a page of 1 GiB beside small ones"),
    Guest("guards", "NX, WP, SMEP, SMAP", {"smep": 1, "smap": 1}, {"smep": 1, "smap": 1}),
    Guest("invlpg", "what must be seen after INVLPG, a CR3 load, a change of CR4.PGE"),
    Guest(
        "windows",
        "when an interrupt that waits is taken; NMIs",
        {"x2apic": 1},
        {"x2apic": 1},
        irqchip=True,
    ),
    Guest(
        "ipi",
        "interrupts between processors, priorities",
        {"rounds": 20, "cpus": 2, "x2apic": 1},
        {"cpus": 4, "x2apic": 1},
        {"cpus": 2},
        irqchip=True,
    ),
    Guest(
        "timer",
        "the local APIC's timer, HLT",
        {"ticks": 5, "interval": 1_000_000, "x2apic": 1},
        {"interval": 0xFFFF_FFFF, "x2apic": 1},
        irqchip=True,
    ),
    Guest(
        "pit",
        "the PIT through PIC and IOAPIC",
        {"ticks": 5, "divisor": 2386},
        {"divisor": 0xFFFF},
        irqchip=True,
    ),
    Guest(
        "migrate",
        "threads that move over the guest's processors by IPIs",
        {"threads": 3, "yields": 9, "work": 50, "cpus": 2, "x2apic": 1},
        {"threads": 60, "cpus": 4, "x2apic": 1},
        irqchip=True,
    ),
    Guest("flat", "32-bit: segments, ring 3 and its ports", mode="protected"),
    Guest("segments", "32-bit: checks that emulators leave out", mode="protected"),
    Guest("tasks", "32-bit: hardware task switches", mode="protected"),
    Guest(
        "paged",
        "32-bit: two levels of tables, 4 MiB pages",
        {"pages": 24},
        {"pages": 1_000},
        mode="protected",
    ),
    Guest("pae", "32-bit: PAE, 2 MiB pages, no-execute", mode="protected"),
    Guest("sector", "16-bit: segments, the interrupt table", mode="sector"),
    Guest("modes", "real, protected, real again, long mode", mode="sector"),
    Guest(
        "dma",
        "a device that copies by itself, where there is one",
        {"source": 0x1000, "destination": 0x2000, "length": 16},
        {"source": 1 << 52, "destination": 1 << 52},
    ),
    Guest("triple", "a fault without an IDT: shutdown", ends="shutdown"),
)

GUESTS = {guest.name: guest for guest in _ALL}
