"""KVM's requests that a machine can do without while it starts, and their structures; see ``kvm.py``."""

# ruff: noqa: F403, F405 — showing everything is this file's purpose

from .kvm_types import ior, iow, iowr
from .kvm_vcpu import *
from .kvm_vm import *

# fmt: off
# /dev/kvm
GET_MSR_INDEX_LIST         = iowr(0x02, MsrList)
GET_MSR_FEATURE_INDEX_LIST = iowr(0x0A, MsrList)

# A VM
GET_DIRTY_LOG              = iow(0x42, DirtyLog)
GET_IRQCHIP                = iowr(0x62, Irqchip)
SET_IRQCHIP                = ior(0x63, Irqchip)  # the direction is the header's mistake, and ABI
SET_CLOCK                  = iow(0x7B, ClockData)
GET_CLOCK                  = ior(0x7C, ClockData)
GET_PIT2                   = ior(0x9F, PitState2)
SET_PIT2                   = iow(0xA0, PitState2)
SIGNAL_MSI                 = iow(0xA5, Msi)
CLEAR_DIRTY_LOG            = iowr(0xC0, ClearDirtyLog)
X86_SET_MSR_FILTER         = iow(0xC6, MsrFilter)

# A vCPU
TRANSLATE                  = iowr(0x85, Translation)
INTERRUPT                  = iow(0x86, Interrupt)
GET_FPU                    = ior(0x8C, Fpu)
SET_FPU                    = iow(0x8D, Fpu)
GET_MP_STATE               = ior(0x98, MpState)
SET_MP_STATE               = iow(0x99, MpState)
SET_GUEST_DEBUG            = iow(0x9B, GuestDebug)
GET_VCPU_EVENTS            = ior(0x9F, VcpuEvents)
SET_VCPU_EVENTS            = iow(0xA0, VcpuEvents)
GET_DEBUGREGS              = ior(0xA1, Debugregs)
SET_DEBUGREGS              = iow(0xA2, Debugregs)
ENABLE_CAP                 = iow(0xA3, EnableCap)  # a VM too
GET_XSAVE                  = ior(0xA4, Xsave)
SET_XSAVE                  = iow(0xA5, Xsave)
GET_XCRS                   = ior(0xA6, Xcrs)
SET_XCRS                   = iow(0xA7, Xcrs)
GET_XSAVE2                 = ior(0xCF, Xsave)
