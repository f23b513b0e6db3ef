"""Between a ``CpuState`` and the structures of the monitor's contract, which are KVM's.

The VMCS keeps a segment's access rights in one word (SDM vol. 3C §24.4.1), KVM in a field each.
"""

from __future__ import annotations

from hostel.abi import kvm as abi

from .state import RIGHTS_UNUSABLE, CpuState, Segment, Table

_GENERAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_SEGMENTS = (
    *(("cs", "cs"), ("ds", "ds"), ("es", "es"), ("fs", "fs"), ("gs", "gs"), ("ss", "ss")),
    *(("tr", "tr"), ("ldt", "ldtr")),
)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_RIGHTS = (
    *(("type", 0, 0xF), ("s", 4, 1), ("dpl", 5, 3), ("present", 7, 1), ("avl", 12, 1)),
    *(("l", 13, 1), ("db", 14, 1), ("g", 15, 1), ("unusable", 16, 1)),
)


def regs(state: CpuState) -> abi.Regs:
    general = dict(zip(_GENERAL, state.gpr, strict=True))
    return abi.Regs(rip=state.rip, rflags=state.rflags, **general)


def set_regs(state: CpuState, regs: abi.Regs) -> None:
    state.gpr[:] = (getattr(regs, name) for name in _GENERAL)
    state.rip, state.rflags = regs.rip, regs.rflags


def sregs(state: CpuState, apic_base: int) -> abi.Sregs:
    result = abi.Sregs(apic_base=apic_base)
    for name in _CONTROL:
        setattr(result, name, getattr(state, name))
    for theirs, ours in _SEGMENTS:
        setattr(result, theirs, _segment(getattr(state, ours)))
    for table, register in ((result.gdt, state.gdtr), (result.idt, state.idtr)):
        table.base, table.limit = register.base, register.limit
    return result


def set_sregs(state: CpuState, sregs: abi.Sregs) -> None:
    for name in _CONTROL:
        setattr(state, name, getattr(sregs, name))
    for theirs, ours in _SEGMENTS:
        setattr(state, ours, _from_segment(getattr(sregs, theirs)))
    state.gdtr = Table(sregs.gdt.base, sregs.gdt.limit)
    state.idtr = Table(sregs.idt.base, sregs.idt.limit)


def _segment(segment: Segment) -> abi.Segment:
    rights = {name: segment.rights >> at & mask for name, at, mask in _RIGHTS}
    return abi.Segment(base=segment.base, limit=segment.limit, selector=segment.selector, **rights)


def _from_segment(segment: abi.Segment) -> Segment:
    """A segment that is not present cannot be used, whatever else is said of it."""
    rights = sum((getattr(segment, name) & mask) << at for name, at, mask in _RIGHTS)
    if not segment.present:
        rights |= RIGHTS_UNUSABLE
    return Segment(segment.selector, segment.base, segment.limit, rights)
