"""The state of unicorn's CPU where it lies: ``CPUX86State``, and its exchange with a ``CpuState``.

::

    0x000 regs[16] │ 0x80 eip │ 0x88 eflags │ cc_* │ 0xac df │ 0xb0 hflags
    0x0b8 six segments, LDT, TR, GDT, IDT │ 0x1a8 cr[9] │ 0x250 efer
    0x25c x87, SSE … │ 0x1508 error_code … │ 0x1518 dr[8] │ 0x1578 old_exception

While blocks run the arithmetic flags lie in ``cc_*``, as the last operation left them; when the engine starts
it takes them out of ``eflags``, and puts them back when it stops. ``hflags`` repeats what translated code
depends on, and has to agree with the rest.
"""

from __future__ import annotations

import ctypes
from struct import Struct

from hostel.soft.state import (
    BLOCKED_BY_MOV_SS,
    BLOCKED_BY_NMI,
    BLOCKED_BY_STI,
    CR0_PE,
    CR4_OSFXSR,
    CR4_SMAP,
    EFER_LMA,
    RFLAGS_ONE,
    CpuState,
    Segment,
)

from . import segments
from .breakpoints import ENABLED
from .build import CPU_ENV
from .flags import (
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_CS64,
    HF_INHIBIT,
    HF_LMA,
    HF_OSFXSR,
    HF_PE,
    HF_SMAP,
    HF_SS32,
    HF_TS_SHIFT,
    TIGHT,
    TIGHT_CS,
)

EIP, EFLAGS, HFLAGS, SEGMENTS = 0x80, 0x88, 0xB0, 0xB8
CR, EFER, FPU, FPU_END, TSC_AUX, XCR0 = 0x1A8, 0x250, 0x25C, 0x12C0, 0x1320, 0x1328
ERROR_CODE, IS_INT, DR, OLD_EXCEPTION, FEATURES, SIZE = (
    0x1508,
    0x150C,
    0x1518,
    0x1578,
    0x1600,
    0x1B60,
)

_GPR = Struct("<16Q")
_SEGMENTS = Struct("<" + "I4xQII" * 10)
_SEGMENTS_END = SEGMENTS + _SEGMENTS.size
_RIGHTS = 0xF0FF
_PRESENT, _UNUSABLE = 0x80, 0x1_0000
_BUSY = 2
"""Of a TSS: LTR sets it in the table (SDM vol. 2A, LTR), and unicorn only there."""
_DB, _LONG = 1 << 14, 1 << 13


class Env:
    """A view of the live state of one instance."""

    SEGMENTS_AT = SEGMENTS

    def __init__(self, cpu: int) -> None:
        self.address = cpu + CPU_ENV
        raw = memoryview((ctypes.c_uint8 * SIZE).from_address(self.address)).cast("B")
        self.bytes = raw
        self.u64 = raw.cast("Q")
        self.u32 = raw.cast("I")
        self.i32 = raw.cast("i")
        self._segments = b""
        self.watching = False
        """Breakpoints are armed: each instruction is looked at."""

    @property
    def rip(self) -> int:
        return self.u64[EIP // 8]

    @property
    def hflags(self) -> int:
        return self.u32[HFLAGS // 4]

    @property
    def cpl(self) -> int:
        return self.u32[HFLAGS // 4] & HF_CPL

    @property
    def linear_rip(self) -> int:
        """CS.base + RIP: 0-based in 64-bit mode, 32 bits wide elsewhere."""
        linear = self.u64[(SEGMENTS + 32) // 8] + self.u64[EIP // 8]
        return linear & (2**64 - 1 if self.u32[HFLAGS // 4] & HF_CS64 else 0xFFFF_FFFF)

    @property
    def code_segment(self) -> tuple[int, int, int]:
        """Selector, limit, rights."""
        at = (SEGMENTS + 24) // 4
        return self.u32[at], self.u32[at + 4], self.u32[at + 5]

    def set_rip(self, value: int) -> None:
        self.u64[EIP // 8] = value

    def note_segments(self) -> None:
        """Segment registers may have changed: which are tight now?"""
        hflags = self.u32[HFLAGS // 4] & ~TIGHT
        if not hflags & HF_CS64:
            hflags |= segments.tight(hflags, segments.PARTS.unpack_from(self.bytes, SEGMENTS))
        if self.watching:
            hflags |= TIGHT_CS
        self.u32[HFLAGS // 4] = hflags

    @property
    def bits(self) -> int:
        return bits_of(self.u32[HFLAGS // 4])

    @property
    def error_code(self) -> int:
        return self.u32[ERROR_CODE // 4]

    # --- Exchange ---

    def load(self, state: CpuState) -> None:
        _GPR.pack_into(self.bytes, 0, *state.gpr)
        u64 = self.u64
        u64[EIP // 8], u64[EFLAGS // 8] = state.rip, state.rflags | RFLAGS_ONE
        self.u32[HFLAGS // 4] = hflags_of(state)
        self._load_segments(state)
        self.watching = bool(state.dr7 & ENABLED)
        self.note_segments()
        u64[CR // 8], u64[CR // 8 + 3], u64[CR // 8 + 4] = state.cr0, state.cr3, state.cr4
        u64[EFER // 8], u64[XCR0 // 8] = state.efer, state.xcr0
        u64[DR // 8 + 6], u64[DR // 8 + 7] = state.dr6, 0x400  # breakpoints are ours

    def _load_segments(self, state: CpuState) -> None:
        fields: list[int] = []
        for segment in _registers(state):
            rights = segment.rights
            shown = 0 if rights & _UNUSABLE else rights & _RIGHTS
            if rights & _UNUSABLE:
                shown = rights & 0x60  # the DPL of an unusable SS is the CPL
            fields += (segment.selector, segment.base, segment.limit, shown << 8)
        gdtr, idtr = state.gdtr, state.idtr
        fields += (0, gdtr.base, gdtr.limit, 0, 0, idtr.base, idtr.limit, 0)
        _SEGMENTS.pack_into(self.bytes, SEGMENTS, *fields)
        self._segments = bytes(self.bytes[SEGMENTS:_SEGMENTS_END])

    def save(self, state: CpuState) -> None:
        """What the guest may have changed by itself. Control registers and MSRs it cannot: we do that."""
        raw, u64 = self.bytes, self.u64
        state.gpr[:] = _GPR.unpack_from(raw, 0)
        state.rip = u64[EIP // 8]
        state.rflags = u64[EFLAGS // 8] | RFLAGS_ONE
        if raw[SEGMENTS:_SEGMENTS_END] != self._segments:
            self._save_segments(state)
        inhibited = self.u32[HFLAGS // 4] & HF_INHIBIT
        blocked = state.interruptibility
        if not inhibited:
            blocked &= BLOCKED_BY_NMI
        elif not blocked & BLOCKED_BY_STI:
            blocked |= BLOCKED_BY_MOV_SS
        state.interruptibility = blocked

    def _save_segments(self, state: CpuState) -> None:
        self._segments = bytes(self.bytes[SEGMENTS:_SEGMENTS_END])
        fields = _SEGMENTS.unpack(self._segments)
        for at, segment in enumerate(_registers(state)):
            segment.selector, segment.base, segment.limit, shown = fields[4 * at : 4 * at + 4]
            rights = shown >> 8 & _RIGHTS
            segment.rights = rights if rights & _PRESENT else rights & 0x60 | _UNUSABLE
        state.tr.rights |= _BUSY
        state.gdtr.base, state.gdtr.limit = fields[33], fields[34]
        state.idtr.base, state.idtr.limit = fields[37], fields[38]


def _registers(state: CpuState) -> tuple[Segment, ...]:
    return (
        state.es, state.cs, state.ss, state.ds, state.fs, state.gs, state.ldtr, state.tr,
    )  # fmt: skip


def hflags_of(state: CpuState) -> int:
    """What translated code depends on."""
    cs, ss = state.cs.rights, state.ss.rights
    value = (state.cr0 >> 1 & 7) << HF_TS_SHIFT
    if state.cr0 & CR0_PE:
        value |= HF_PE | ss >> 5 & 3
    if state.efer & EFER_LMA:
        value |= HF_LMA
    if value & HF_LMA and cs & _LONG:
        value |= HF_CS64 | HF_CS32 | HF_SS32
    else:
        value |= (HF_CS32 if cs & _DB else 0) | (HF_SS32 if ss & _DB else 0)
        based = state.ds.base | state.es.base | state.ss.base
        if not value & HF_PE or not value & HF_CS32 or based:
            value |= HF_ADDSEG
    if state.cr4 & CR4_OSFXSR:
        value |= HF_OSFXSR
    if state.cr4 & CR4_SMAP:
        value |= HF_SMAP
    if state.interruptibility & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS):
        value |= HF_INHIBIT
    return value


def segmented(hflags: int) -> int:
    """Of these flags, those by which instructions are looked at."""
    return hflags & (TIGHT_CS if hflags & HF_CS64 else HF_PE | TIGHT)


def bits_of(hflags: int) -> int:
    """How the processor reads instructions."""
    if hflags & HF_CS64:
        return 64
    return 32 if hflags & HF_CS32 else 16
