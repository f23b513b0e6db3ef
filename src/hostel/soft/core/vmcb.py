"""The VMCB (APM vol. 2 appendix B): what an SVM processor is told of a guest, and tells of an exit.

::

    0x000  control area     intercepts, permission maps, nested paging, event injection, exit information
    0x400  state-save area  (this core loads and saves the guest's state itself: see docs/soft-core-svm.md)

``write`` turns VMX controls into intercepts. SVM is coarser: it has no masks for control registers, no
bitmap exits for #PF error codes, and so on. What SVM intercepts and VMX would not, the core carries out
itself and goes on (``svm_exits.py``).
"""

from __future__ import annotations

import ctypes
from struct import Struct

from hostel.soft.silicon import Controls, Primary, Secondary
from hostel.soft.state import CpuState

# Exit codes (APM vol. 2 appendix C). The intercept bit of a code from 0x60 on is the code less 0x60.
READ_CR, WRITE_CR, READ_DR, WRITE_DR, EXCEPTION = 0x00, 0x10, 0x20, 0x30, 0x40
EXCEPTIONS = range(EXCEPTION, EXCEPTION + 32)
VINTR, IDTR_READ, IDTR_WRITE, GDTR_WRITE, TR_WRITE = 0x64, 0x66, 0x6A, 0x6B, 0x6D
RDTSC, RDPMC, CPUID, IRET, SWINT, INVD, PAUSE, HLT = (
    0x6E,
    0x6F,
    0x72,
    0x74,
    0x75,
    0x76,
    0x77,
    0x78,
)
INVLPG, IOIO, MSR, SHUTDOWN, ICEBP, WBINVD, MONITOR, MWAIT = (
    0x79,
    0x7B,
    0x7C,
    0x7F,
    0x88,
    0x89,
    0x8A,
    0x8B,
)
NPF, SYSCALL, SYSENTER, TASK = 0x400, 0x4F0, 0x4F1, 0x4F2
"""The last three are ours: two instructions that unicorn hands to a hook; a task switch has changed CR3."""

_BP, _OF, _UD, _TS, _NP, _SS, _GP, _PF = 3, 4, 6, 10, 11, 12, 13, 14
_CHECKED_EXCEPTIONS = 1 << _UD | 1 << _TS | 1 << _NP | 1 << _SS | 1 << _GP
"""#UD: it may be an instruction of VMX. The others: met in a delivery, QEMU's error code is wrong."""
_ALWAYS = (
    *(RDTSC, CPUID, INVD, HLT, IOIO, MSR, SHUTDOWN, ICEBP, MONITOR, MWAIT, RDPMC),
    *(IDTR_WRITE, GDTR_WRITE, TR_WRITE),
)
_BY_PRIMARY = (
    (Primary.INVLPG, INVLPG),
    (Primary.PAUSE, PAUSE),
    (Primary.INTERRUPT_WINDOW, VINTR),
    (Primary.NMI_WINDOW, IRET),
)
_BY_SECONDARY = ((Secondary.WBINVD, WBINVD),)

# The live registers behind the control area, in CPUX86State.
_ENV_OLD_EXCEPTION = 0x1578
_ENV_CONTROL = Struct("<Q Q Q 4H I 4x Q I B")
"""vm_vmcb, tsc_offset, intercept; CR and DR reads and writes; exceptions; nested CR3, mode, TPR."""
_ENV_CONTROL_AT = 0x1580
_ENV_INTERCEPT = 0x1590
_ENV_ERROR = 0x1508
_NESTED_MODE = 7
"""Of the host's tables: PAE, long mode, NX."""

_INTERCEPTS = Struct("<4H I Q")
_EXIT_INFO_2, _NESTED_CONTROL, _EVENT, _NESTED_CR3 = 0x80, 0x90, 0xA8, 0xB0
_MSRPM = 0x48
_U64, _PAIR = Struct("<Q"), Struct("<II")
VALID, HAS_ERROR = 1 << 31, 1 << 11


def bits(codes: tuple[int, ...]) -> int:
    return sum(1 << code - 0x60 for code in codes)


_ALWAYS_BITS = bits(_ALWAYS)
_TABLES_BITS = bits(tuple(range(IDTR_READ, TR_WRITE + 1)))


class Vmcb:
    """One page of the core's own memory, and the registers that VMRUN would load from it."""

    def __init__(self, page: memoryview, hpa: int, env: int, msrpm: int) -> None:
        self._page, self._hpa = page, hpa
        self._live = memoryview((ctypes.c_ubyte * 64).from_address(env + _ENV_CONTROL_AT)).cast("B")
        self._old = ctypes.c_int32.from_address(env + _ENV_OLD_EXCEPTION)
        self._error = ctypes.c_int32.from_address(env + _ENV_ERROR)
        _U64.pack_into(page, _MSRPM, msrpm)
        self._key: tuple[int, ...] = ()

    def write(self, controls: Controls, state: CpuState, nested: int) -> None:
        """The control area, and what VMRUN makes of it. ``nested``: the nested root, or 0."""
        self._old.value = -1
        key = (
            controls.primary,
            controls.secondary,
            controls.exception_bitmap,
            controls.pf_mask | controls.pf_match,
            controls.cr0_mask & (controls.cr0_shadow ^ state.cr0),
            controls.cr4_mask & (controls.cr4_shadow ^ state.cr4),
            nested,
        )
        if key != self._key:
            self._key = key
            self._write()

    def _write(self) -> None:
        primary, secondary, bitmap, pf, cr0, cr4, nested = self._key
        intercept = _ALWAYS_BITS
        intercept |= sum(1 << code - 0x60 for control, code in _BY_PRIMARY if primary & control)
        intercept |= sum(1 << code - 0x60 for control, code in _BY_SECONDARY if secondary & control)
        if secondary & Secondary.DESCRIPTOR_TABLE:
            intercept |= _TABLES_BITS
        exceptions = bitmap | _CHECKED_EXCEPTIONS | (1 << _PF if pf else 0)
        if exceptions & (1 << _BP | 1 << _OF):
            intercept |= 1 << SWINT - 0x60
        reads = 1 << 8 | bool(cr0) | bool(cr4) << 4 | bool(primary & Primary.CR3_STORE) << 3
        writes = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 8  # QEMU checks none of these values
        debug = (0xFF, 0xFF) if primary & Primary.MOV_DR else (0, 0xF0)  # DR6 and DR7: nor these
        _INTERCEPTS.pack_into(self._page, 0, reads, writes, *debug, exceptions, intercept)
        _U64.pack_into(self._page, _NESTED_CONTROL, bool(nested))
        _U64.pack_into(self._page, _NESTED_CR3, nested)
        _ENV_CONTROL.pack_into(
            self._live,
            0,
            self._hpa,
            0,
            intercept,
            reads,
            writes,
            *debug,
            exceptions,
            nested,
            _NESTED_MODE,
            0,
        )

    @property
    def exit_info_1(self) -> int:
        """QEMU keeps 32 bits of it: whether an NPF was met in a guest table walk (bit 33) is lost."""
        return self._error.value & 0xFFFF_FFFF

    @property
    def exit_info_2(self) -> int:
        value: int = _U64.unpack_from(self._page, _EXIT_INFO_2)[0]
        return value

    def in_delivery(self, vector: int) -> None:
        """An exception is about to be delivered: a second one on top of it may be a double fault."""
        self._old.value = vector

    def take_vectoring(self) -> tuple[int, int]:
        """The event whose delivery was cut short, and its error code (EXITINTINFO); 0 if none."""
        info, error = _PAIR.unpack_from(self._page, _EVENT)
        _PAIR.pack_into(self._page, _EVENT, 0, 0)
        return (info if info & VALID else 0), error

    def let(self, code: int) -> None:
        """Do not intercept this until the next ``write``."""
        at = _ENV_INTERCEPT - _ENV_CONTROL_AT
        self._key = ()
        intercept = _U64.unpack_from(self._live, at)[0]
        _U64.pack_into(self._live, at, intercept & ~(1 << code - 0x60))
