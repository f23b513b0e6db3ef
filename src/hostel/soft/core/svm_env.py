"""Between ``CpuState`` and the live state of unicorn's processor (CPUX86State).

QEMU keeps a digest of the mode in ``hflags``, on which each translated block depends. It is computed here
from the state as a whole, never patched. While it runs, QEMU keeps the arithmetic flags as an operation and
its operands, and DF beside them; it takes them apart as it starts, and puts EFLAGS together as it stops.
"""

from __future__ import annotations

import ctypes
from struct import Struct

from hostel.soft.state import (
    BLOCKED_BY_MOV_SS,
    BLOCKED_BY_NMI,
    BLOCKED_BY_STI,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_OSFXSR,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    MSR_CSTAR,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC_AUX,
    RFLAGS_ONE,
    RFLAGS_VM,
    RIGHTS_TSS32,
    CpuState,
    Segment,
    Table,
)

from .svm_host import Processor

_MAIN = Struct("<16Q 5Q I i I I" + "I 4x Q I I" * 10 + "9Q")
_EFER, _FPU, _MSRS, _TSC_AUX, _DR = 0x250, 0x258, 0x12C0, 0x1320, 0x1518
_MSR_GROUP = Struct("<I 4x Q Q Q Q Q Q Q Q")
_DEBUG = Struct("<8Q")
_U64 = Struct("<Q")
_EXCEPTION, _EXCEPTION_AT = Struct("<I I Q"), 0x1508
_FPU_SIZE = _MSRS - _FPU
_FPU_CONTROL, _FPU_TAGS, _MXCSR = Struct("<H"), Struct("<8s"), Struct("<I")

_HF_INHIBIT, _HF_GUEST = 1 << 3, 1 << 21
_HF_CODE64 = 0x8030
"""CS32, SS32 and CS64: what a 64-bit code segment implies."""
_HF2_GIF, _HF2_NMI, _HF2_NPT = 1, 4, 1 << 6
_UNUSABLE = 1 << 16
_BUSY = 2
"""Of a TSS: LTR sets it in the table (SDM vol. 2A, LTR), and unicorn only there."""
_CR0_TRANSLATES = CR0_PG | CR0_WP | CR0_PE
_CR4_TRANSLATES = CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_LA57
_EFER_TRANSLATES = EFER_NXE | EFER_LMA
_SEGMENTS = "es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"


def hidden_flags(state: CpuState) -> int:
    """QEMU's digest of the mode; its bits are those of its ``HF_*_SHIFT``."""
    cr0, cr4 = state.cr0, state.cr4
    virtual = bool(state.rflags & RFLAGS_VM)
    flags = _HF_GUEST | (cr0 & CR0_PE) << 7 | (cr0 << 8 & 0xE00)
    flags |= bool(cr4 & CR4_OSFXSR) << 22 | bool(cr4 & CR4_SMAP) << 23
    if cr0 & CR0_PE:
        flags |= 3 if virtual else state.ss.dpl
    if state.interruptibility & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS):
        flags |= _HF_INHIBIT
    if state.efer & EFER_LMA:
        flags |= 1 << 14
        if state.cs.rights & 1 << 13:
            return flags | _HF_CODE64
    code32 = state.cs.rights >> 14 & 1
    flags |= code32 << 4 | (state.ss.rights >> 14 & 1) << 5
    based = state.ds.base | state.es.base | state.ss.base
    if not cr0 & CR0_PE or virtual or not code32 or based:
        flags |= 1 << 6
    return flags


def translation_key(state: CpuState) -> tuple[int, int, int, int]:
    """What a cached translation depends on, but for the tables' contents."""
    return (
        state.cr0 & _CR0_TRANSLATES,
        state.cr3,
        state.cr4 & _CR4_TRANSLATES,
        state.efer & _EFER_TRANSLATES,
    )


def _segments(state: CpuState) -> tuple[int, ...]:
    """The eight segments, GDTR and IDTR, as QEMU keeps them."""
    values: list[int] = []
    for segment in (
        *(state.es, state.cs, state.ss, state.ds),
        *(state.fs, state.gs, state.ldtr, state.tr),
    ):
        rights = segment.rights
        flags = 0 if rights & _UNUSABLE else (rights & 0xF0FF) << 8
        values += segment.selector, segment.base, segment.limit, flags
    values[11] |= (state.ss.rights & 0x60) << 8  # CPL, also where SS is unusable
    values[31] &= ~(
        _BUSY << 8
    )  # unicorn aborts where it finds a busy TSS, or none (get_rsp_from_tss)
    if not values[31]:
        values[30:32] = 0, RIGHTS_TSS32 - _BUSY << 8
    gdtr, idtr = state.gdtr, state.idtr
    values += 0, gdtr.base, gdtr.limit, 0, 0, idtr.base, idtr.limit, 0
    return tuple(values)


def _set_segments(state: CpuState, values: tuple[int, ...]) -> None:
    for number, name in enumerate(_SEGMENTS):
        segment: Segment = getattr(state, name)
        segment.selector, segment.base, segment.limit, flags = values[4 * number : 4 * number + 4]
        rights = flags >> 8 & 0xF0FF
        segment.rights = rights if rights & 0x80 else rights | _UNUSABLE
    state.tr.rights |= _BUSY
    gdtr: Table = state.gdtr
    idtr: Table = state.idtr
    _, gdtr.base, gdtr.limit, _, _, idtr.base, idtr.limit, _ = values[32:40]


class Environment:
    """A view of the live state."""

    def __init__(self, processor: Processor) -> None:
        self._segments: tuple[int, ...] = ()
        size = _DR + 64
        self._view = memoryview((ctypes.c_ubyte * size).from_address(processor.env)).cast("B")
        self._view[_FPU : _FPU + _FPU_SIZE] = bytes(_FPU_SIZE)
        _FPU_CONTROL.pack_into(self._view, 0x262, 0x37F)
        _FPU_TAGS.pack_into(self._view, 0x264, b"\1" * 8)
        _MXCSR.pack_into(self._view, 0x330, 0x1F80)
        self._view[_TSC_AUX : _TSC_AUX + 8] = bytes(8)

    def load(self, state: CpuState, nested: bool) -> None:
        """VM entry's half."""
        view = self._view
        self._segments = segments = _segments(state)
        hidden2 = _HF2_GIF | nested * _HF2_NPT
        if state.interruptibility & BLOCKED_BY_NMI:
            hidden2 |= _HF2_NMI
        _MAIN.pack_into(
            view,
            0,
            *state.gpr,
            state.rip,
            state.rflags | RFLAGS_ONE,
            0,
            0,
            0,
            0,
            0,
            hidden_flags(state),
            hidden2,
            *segments,
            state.cr0,
            0,
            state.cr2,
            state.cr3,
            state.cr4,
            0,
            0,
            0,
            state.cr8,
        )
        _U64.pack_into(view, _EFER, state.efer)
        get = state.msrs.get
        _MSR_GROUP.pack_into(
            view,
            _MSRS,
            get(MSR_SYSENTER_CS, 0) & 0xFFFFFFFF,
            get(MSR_SYSENTER_ESP, 0),
            get(MSR_SYSENTER_EIP, 0),
            get(MSR_STAR, 0),
            0,
            get(MSR_LSTAR, 0),
            get(MSR_CSTAR, 0),
            get(MSR_SFMASK, 0),
            get(MSR_KERNEL_GS_BASE, 0),
        )
        _DEBUG.pack_into(view, _DR, *state.dr, 0, 0, state.dr6, state.dr7)
        _U64.pack_into(view, _TSC_AUX, get(MSR_TSC_AUX, 0))

    def save(self, state: CpuState) -> None:
        """VM exit's half. MSRs cannot have changed but by us; KERNEL_GS_BASE changes with SWAPGS."""
        view = self._view
        values = _MAIN.unpack_from(view, 0)
        state.gpr[:] = values[:16]
        state.rip = values[16]
        state.rflags = values[17]
        blocked = BLOCKED_BY_STI if values[23] & _HF_INHIBIT else 0
        state.interruptibility = blocked | (BLOCKED_BY_NMI if values[24] & _HF2_NMI else 0)
        if values[25:65] != self._segments:
            _set_segments(state, values[25:65])
        at = 65
        state.cr0, _, state.cr2, state.cr3, state.cr4 = values[at : at + 5]
        state.efer = _U64.unpack_from(view, _EFER)[0]
        kernel_gs = _MSR_GROUP.unpack_from(view, _MSRS)[8]
        if kernel_gs or MSR_KERNEL_GS_BASE in state.msrs:
            state.msrs[MSR_KERNEL_GS_BASE] = kernel_gs
        debug = _DEBUG.unpack_from(view, _DR)
        state.dr[:] = debug[:4]
        state.dr6, state.dr7 = debug[6:]

    # --- Pieces of it ---

    def set_exception(self, error: int, software: bool, next_rip: int) -> None:
        """What ``x86_cpu_do_interrupt`` reads beside the vector."""
        _EXCEPTION.pack_into(self._view, _EXCEPTION_AT, error & 0xFFFF_FFFF, software, next_rip)

    def block_nmi(self) -> None:
        self._view[0xB4] |= _HF2_NMI

    def fpu(self) -> bytes:
        return bytes(self._view[_FPU : _FPU + _FPU_SIZE])

    def set_fpu(self, data: bytes) -> None:
        self._view[_FPU : _FPU + _FPU_SIZE] = data
