"""The state in which the first vCPU enters a kernel.

::

    mode        paging                      code segment   for
    long        identity, first 4 GiB       64-bit         linux      (boot.rst, "64-bit boot protocol")
    protected   off                         32-bit         pvh, multiboot
    real        off                         16-bit         sector

The segments are flat and, but for real mode, come from a GDT in guest memory: selector 0x10 code, 0x18 data
(Linux's __BOOT_CS and __BOOT_DS), 0x20 a TSS. Interrupts are off. The other vCPUs wait for their start-up
message, and need nothing from here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Literal

import msgspec

from hostel.abi import kvm as abi
from hostel.hypervisor import Vcpu
from hostel.memory import GuestMemory
from hostel.vmm import layout

Mode = Literal["long", "protected", "real"]

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20

_CR0_PE = 1 << 0
_CR0_ET = 1 << 4
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
_RFLAGS_FIXED = 1 << 1

# Segment types (SDM vol. 3A tables 3-1 and 3-2); "accessed", as if they had been loaded.
_CODE = 0xB
_DATA = 0x3
_TSS_BUSY = 0xB

# Page-table entries (SDM vol. 3A §4.5).
_PRESENT_WRITE = 0x3
_LARGE = 0x80
_PAGE = 4096
_MAPPED_GIB = 4


class EntryState(msgspec.Struct, frozen=True):
    """What ``load_kernel`` hands to whoever sets up the first vCPU. All but these registers are 0."""

    mode: Mode
    rip: int
    registers: Mapping[str, int] = msgspec.field(default_factory=dict)
    """By ``kvm_regs`` field name."""

    def apply(self, vcpu: Vcpu) -> None:
        """Give a vCPU that has just been created or reset this state."""
        vcpu.set_sregs(initial_sregs(self, vcpu.get_sregs()))
        vcpu.set_regs(initial_regs(self))


def initial_regs(entry: EntryState) -> abi.Regs:
    return abi.Regs(rip=entry.rip, rflags=_RFLAGS_FIXED, **entry.registers)


def initial_sregs(entry: EntryState, sregs: abi.Sregs) -> abi.Sregs:
    """``sregs`` as they are after a reset, changed in place: what is the APIC's stays."""
    if entry.mode == "real":
        return _real_sregs(sregs)
    long = entry.mode == "long"
    sregs.cs = _segment(CODE_SELECTOR, _CODE, long=long)
    data = _segment(DATA_SELECTOR, _DATA)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = abi.Segment(limit=0x67, selector=TSS_SELECTOR, type=_TSS_BUSY, present=1)
    sregs.gdt.base, sregs.gdt.limit = layout.GDT_ADDRESS, len(_gdt(entry.mode)) - 1
    sregs.idt.base = sregs.idt.limit = 0
    sregs.cr0 = _CR0_PE | _CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    if long:
        sregs.cr0 |= _CR0_PG
        sregs.cr3 = layout.BOOT_PAGE_TABLES
        sregs.cr4 = _CR4_PAE
        sregs.efer = _EFER_LME | _EFER_LMA
    return sregs


def _real_sregs(sregs: abi.Sregs) -> abi.Sregs:
    """As after a reset, but for the segments, which begin at 0, all of them."""
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.selector = segment.base = 0
    return sregs


def write_tables(memory: GuestMemory, mode: Mode) -> None:
    """The GDT, and for long mode the page tables, that this state points to. Real mode has none."""
    if mode == "real":
        return
    memory.write(layout.GDT_ADDRESS, _gdt(mode))
    if mode == "long":
        memory.write(layout.BOOT_PAGE_TABLES, _identity_map(layout.BOOT_PAGE_TABLES))


def _segment(selector: int, type: int, *, long: bool = False) -> abi.Segment:
    """A flat one. A code segment is either 64-bit or 32-bit."""
    return abi.Segment(
        limit=0xFFFF_FFFF, selector=selector, type=type, present=1, s=1, g=1, l=long, db=not long
    )


def _gdt(mode: Mode) -> bytes:
    """Null, unused, code, data, TSS (16 bytes in long mode); SDM vol. 3A figure 3-8."""
    code = 0x00AF_9B00_0000_FFFF if mode == "long" else 0x00CF_9B00_0000_FFFF
    data, tss = 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067
    return struct.pack("<6Q", 0, 0, code, data, tss, 0)


def _identity_map(base: int) -> bytes:
    """The first 4 GiB in pages of 2 MiB: every CPU has these, not every one those of 1 GiB."""
    pdpt, first_pd = base + _PAGE, base + 2 * _PAGE
    pml4 = struct.pack("<Q", pdpt | _PRESENT_WRITE).ljust(_PAGE, b"\0")
    directories = [first_pd + index * _PAGE | _PRESENT_WRITE for index in range(_MAPPED_GIB)]
    pages = range(_PRESENT_WRITE | _LARGE, _MAPPED_GIB << 30, 2 << 20)
    return b"".join(
        (
            pml4,
            struct.pack(f"<{_MAPPED_GIB}Q", *directories).ljust(_PAGE, b"\0"),
            struct.pack(f"<{len(pages)}Q", *pages),
        )
    )
