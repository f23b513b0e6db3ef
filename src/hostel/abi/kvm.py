"""KVM's interface for x86: request numbers here; structures and constants from the files beside it.

Everybody says ``from hostel.abi import kvm as abi`` and finds all of it in this one place.

Rules: a class is named like the header's struct (``kvm_vcpu_events`` is ``VcpuEvents``), its fields
like the header's fields, in the header's order; a request or constant is named like the header's
without ``KVM_``. ``tests/abi`` compares every size, offset and number with the headers by a compiled
probe that is generated from these files, so a new line is checked without further work.

A flexible array at a structure's end is left out, as it is in the size that a request number carries
(``KVM_SET_CPUID2``, ``KVM_SET_MSRS``, ``KVM_SET_GSI_ROUTING``).
"""

# ruff: noqa: F403, F405 — showing everything is this file's purpose

from ctypes import Structure, c_uint64, sizeof

from .kvm_numbers import *
from .kvm_vcpu import *
from .kvm_vm import *

_Layout = type[Structure] | type[c_uint64] | None


def _request(direction: int, number: int, layout: _Layout) -> int:
    """<asm-generic/ioctl.h>; 0xAE is KVM's letter."""
    return direction << 30 | (sizeof(layout) if layout else 0) << 16 | 0xAE << 8 | number


def _io(number: int) -> int:
    return _request(0, number, None)


def _iow(number: int, layout: _Layout) -> int:
    return _request(1, number, layout)


def _ior(number: int, layout: _Layout) -> int:
    return _request(2, number, layout)


def _iowr(number: int, layout: _Layout) -> int:
    return _request(3, number, layout)


# fmt: off
# /dev/kvm
GET_API_VERSION            = _io(0x00)
CREATE_VM                  = _io(0x01)
GET_MSR_INDEX_LIST         = _iowr(0x02, MsrList)
CHECK_EXTENSION            = _io(0x03)  # a VM too
GET_VCPU_MMAP_SIZE         = _io(0x04)
GET_SUPPORTED_CPUID        = _iowr(0x05, Cpuid2)
GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, MsrList)

# A VM
CREATE_VCPU                = _io(0x41)
GET_DIRTY_LOG              = _iow(0x42, DirtyLog)
SET_USER_MEMORY_REGION     = _iow(0x46, UserspaceMemoryRegion)
SET_TSS_ADDR               = _io(0x47)
SET_IDENTITY_MAP_ADDR      = _iow(0x48, c_uint64)
CREATE_IRQCHIP             = _io(0x60)
IRQ_LINE                   = _iow(0x61, IrqLevel)
GET_IRQCHIP                = _iowr(0x62, Irqchip)
SET_IRQCHIP                = _ior(0x63, Irqchip)  # the direction is the header's mistake, and ABI
SET_GSI_ROUTING            = _iow(0x6A, IrqRouting)
IRQFD                      = _iow(0x76, Irqfd)
CREATE_PIT2                = _iow(0x77, PitConfig)
IOEVENTFD                  = _iow(0x79, Ioeventfd)
SET_CLOCK                  = _iow(0x7B, ClockData)
GET_CLOCK                  = _ior(0x7C, ClockData)
GET_PIT2                   = _ior(0x9F, PitState2)
SET_PIT2                   = _iow(0xA0, PitState2)
SIGNAL_MSI                 = _iow(0xA5, Msi)
CLEAR_DIRTY_LOG            = _iowr(0xC0, ClearDirtyLog)
X86_SET_MSR_FILTER         = _iow(0xC6, MsrFilter)

# A vCPU
RUN                        = _io(0x80)
GET_REGS                   = _ior(0x81, Regs)
SET_REGS                   = _iow(0x82, Regs)
GET_SREGS                  = _ior(0x83, Sregs)
SET_SREGS                  = _iow(0x84, Sregs)
TRANSLATE                  = _iowr(0x85, Translation)
INTERRUPT                  = _iow(0x86, Interrupt)
GET_MSRS                   = _iowr(0x88, Msrs)
SET_MSRS                   = _iow(0x89, Msrs)
GET_FPU                    = _ior(0x8C, Fpu)
SET_FPU                    = _iow(0x8D, Fpu)
GET_LAPIC                  = _ior(0x8E, LapicState)
SET_LAPIC                  = _iow(0x8F, LapicState)
SET_CPUID2                 = _iow(0x90, Cpuid2)
GET_CPUID2                 = _iowr(0x91, Cpuid2)
GET_MP_STATE               = _ior(0x98, MpState)
SET_MP_STATE               = _iow(0x99, MpState)
NMI                        = _io(0x9A)
SET_GUEST_DEBUG            = _iow(0x9B, GuestDebug)
GET_VCPU_EVENTS            = _ior(0x9F, VcpuEvents)
SET_VCPU_EVENTS            = _iow(0xA0, VcpuEvents)
GET_DEBUGREGS              = _ior(0xA1, Debugregs)
SET_DEBUGREGS              = _iow(0xA2, Debugregs)
SET_TSC_KHZ                = _io(0xA2)
GET_TSC_KHZ                = _io(0xA3)
ENABLE_CAP                 = _iow(0xA3, EnableCap)  # a VM too
GET_XSAVE                  = _ior(0xA4, Xsave)
SET_XSAVE                  = _iow(0xA5, Xsave)
GET_XCRS                   = _ior(0xA6, Xcrs)
SET_XCRS                   = _iow(0xA7, Xcrs)
KVMCLOCK_CTRL              = _io(0xAD)
GET_STATS_FD               = _io(0xCE)  # a VM too
GET_XSAVE2                 = _ior(0xCF, Xsave)
