"""KVM's structures for x86 that every machine is started with; see ``kvm.py``."""

# No "from __future__ import annotations": the layouts are built from the annotations themselves.

from ctypes import Array, Structure, c_char, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated

from .kvm_types import layout, s32, u8, u16, u32, u64

# --- A VM --------------------------------------------------------------------------------------


@layout
class CpuidEntry2(Structure):
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@layout
class Cpuid2(Structure):
    nent: u32
    padding: u32


@layout
class UserspaceMemoryRegion(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@layout
class PitConfig(Structure):
    flags: u32
    pad: Annotated[Array[c_uint32], c_uint32 * 15]


@layout
class IrqRouting(Structure):
    nr: u32
    flags: u32


@layout
class IrqLevel(Structure):
    irq: u32
    level: u32


@layout
class Irqfd(Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 16]


@layout
class Ioeventfd(Structure):
    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 36]


# --- A vCPU ------------------------------------------------------------------------------------


@layout
class Regs(Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@layout
class Segment(Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741 — the header's name
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@layout
class Dtable(Structure):
    base: u64
    limit: u16
    padding: Annotated[Array[c_uint16], c_uint16 * 3]


@layout
class Sregs(Structure):
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class LapicState(Structure):
    regs: Annotated[Array[c_char], c_char * 0x400]


@layout
class Msrs(Structure):
    nmsrs: u32
    pad: u32
