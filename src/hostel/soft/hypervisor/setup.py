"""The VMCS of a new vCPU: what to intercept, where the exit goes (SDM vol. 3C §31.5, steps 5 to 8; §31.7).

What the guest must not do by itself exits; what only it can see does not. A control register's reserved
bits are set as the capability MSRs say (§31.5.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.silicon import Pin, Primary, Secondary
from hostel.soft.vmx.capabilities import (
    MSR_VMX_SECONDARY,
    MSR_VMX_TRUE_ENTRY,
    MSR_VMX_TRUE_EXIT,
    MSR_VMX_TRUE_PIN,
    MSR_VMX_TRUE_PRIMARY,
    NO_VMCS,
    EntryControl,
    ExitControl,
)
from hostel.soft.vmx.fields import Field

from .control_registers import CR0_GUEST_OWNS, CR4_GUEST_OWNS

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

PIN = Pin.EXTERNAL_INTERRUPT | Pin.NMI | Pin.VIRTUAL_NMI | Pin.PREEMPTION_TIMER
PRIMARY = (
    Primary.TSC_OFFSETTING
    | Primary.HLT
    | Primary.MWAIT
    | Primary.RDPMC
    | Primary.CR8_LOAD
    | Primary.CR8_STORE
    | Primary.UNCONDITIONAL_IO
    | Primary.MSR_BITMAPS
    | Primary.MONITOR
    | Primary.SECONDARY
)
SECONDARY = Secondary.VPID | Secondary.RDTSCP | Secondary.WBINVD
EXIT = (
    ExitControl.SAVE_DEBUG
    | ExitControl.HOST_64
    | ExitControl.ACKNOWLEDGE_INTERRUPT
    | ExitControl.SAVE_EFER
    | ExitControl.LOAD_EFER
)
ENTRY = EntryControl.LOAD_DEBUG | EntryControl.LOAD_EFER


def allowed(pcpu: PhysicalCpu, msr: int, wanted: int) -> int:
    """``wanted``, and what must be 1 (SDM vol. 3D §A.2). What may not be 1 is the entry check's to refuse."""
    return wanted | pcpu.rdmsr(msr) & 0xFFFF_FFFF


def write_controls(vcpu: SoftVcpu) -> None:
    """All but the guest's state, by VMWRITE, into the current VMCS."""
    pcpu = vcpu.pcpu
    assert pcpu is not None
    paging, write = vcpu.paging.setup, vcpu.write
    several = (
        Primary.PAUSE if len(vcpu.machine.vcpus) > 1 else 0
    )  # one waits for another: let that run
    vcpu.primary = allowed(pcpu, MSR_VMX_TRUE_PRIMARY, PRIMARY | paging.primary | several)
    write(Field.PIN_CONTROLS, allowed(pcpu, MSR_VMX_TRUE_PIN, PIN))
    write(Field.PRIMARY_CONTROLS, vcpu.primary)
    write(Field.SECONDARY_CONTROLS, allowed(pcpu, MSR_VMX_SECONDARY, _secondary(paging.secondary)))
    write(Field.EXIT_CONTROLS, allowed(pcpu, MSR_VMX_TRUE_EXIT, EXIT))
    write(Field.ENTRY_CONTROLS, allowed(pcpu, MSR_VMX_TRUE_ENTRY, ENTRY))
    write(Field.EXCEPTION_BITMAP, paging.exception_bitmap)
    write(Field.PAGE_FAULT_MASK, 0)
    write(Field.PAGE_FAULT_MATCH, 0)
    write(Field.CR0_MASK, 0xFFFF_FFFF & ~CR0_GUEST_OWNS | paging.cr0_mask)
    write(Field.CR4_MASK, 0xFFFF_FFFF & ~CR4_GUEST_OWNS | paging.cr4_mask)
    write(Field.MSR_BITMAP, vcpu.machine.host.msr_bitmap)
    write(Field.EPT_POINTER, paging.ept_pointer)
    write(Field.VPID, vcpu.vpid)
    write(Field.VMCS_LINK_POINTER, NO_VMCS)
    _write_host(vcpu, pcpu)


def _secondary(paging: int) -> int:
    """A guest may run in real mode; with EPT also without paging of its own (SDM vol. 3C §26.3.1.1)."""
    real_mode = (
        Secondary.UNRESTRICTED_GUEST if paging & Secondary.EPT else Secondary.PAGED_REAL_MODE
    )
    return SECONDARY | paging | real_mode


def _write_host(vcpu: SoftVcpu, pcpu: PhysicalCpu) -> None:
    """Where a VM exit comes back to: the hypervisor as it runs now. RIP and RSP are Python's own matter."""
    write, state = vcpu.write, pcpu.state
    write(Field.HOST_CR0, state.cr0)
    write(Field.HOST_CR3, state.cr3)
    write(Field.HOST_CR4, state.cr4)
    write(Field.HOST_EFER, state.efer)
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        selector = getattr(state, name).selector & ~7
        write(Field[f"HOST_{name.upper()}_SELECTOR"], selector)
    write(Field.HOST_FS_BASE, state.fs.base)
    write(Field.HOST_GS_BASE, state.gs.base)
    write(Field.HOST_TR_BASE, state.tr.base)
    write(Field.HOST_GDTR_BASE, state.gdtr.base)
    write(Field.HOST_IDTR_BASE, state.idtr.base)
    write(Field.HOST_RIP, state.rip)
