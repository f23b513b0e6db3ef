"""The same under another name: VMX (SDM vol. 3C) and SVM (APM vol. 2 ch. 15, appendices B and C), as data.

Both have a guest state, a host state, a list of what exits, nested paging, and an instruction that enters.
They differ in who does the work: VMX checks, loads and saves nearly all by itself, through fields that only
VMREAD and VMWRITE reach; SVM moves the least, through a page of plain memory, and leaves the rest to
VMLOAD, VMSAVE and the hypervisor.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.soft.silicon import Pin, Primary, Reason, Secondary

from .fields import Field


class Pair(NamedTuple):
    vmx: str
    svm: str
    note: str = ""


class SvmExit(NamedTuple):
    code: int
    """EXITCODE (APM vol. 2 appendix C). An intercept's place in the VMCB follows from it."""
    name: str
    note: str = ""


class Place(NamedTuple):
    """A field of the VMCB (APM vol. 2 appendix B)."""

    offset: int
    """In bytes, in the page; the state-save area begins at 0x400."""
    name: str
    note: str = ""


SAVE = 0x400

TERMS = (
    Pair("root mode, non-root mode", "host mode, guest mode"),
    Pair("VM entry", "VMRUN"),
    Pair("VM exit", "#VMEXIT"),
    Pair("VMCS, one current a processor", "VMCB, the page whose address is in RAX"),
    Pair("launch state: clear, launched", "(none)", "the clean bits say what may be cached"),
    Pair("host-state area of the VMCS", "the page at MSR VM_HSAVE_PA"),
    Pair("EPT", "nested paging, NPT", "a table of its own format; the ordinary format"),
    Pair(
        "EPT violation, misconfiguration",
        "#VMEXIT(NPF)",
        "one exit; the error code tells them apart",
    ),
    Pair("VPID", "ASID", "0 is the host in both"),
    Pair(
        "guest/host mask and read shadow of CR0, CR4", "(none)", "an intercept takes every access"
    ),
    Pair("page-fault error-code mask and match", "(none)", "an intercept takes every #PF"),
    Pair("VMX-preemption timer", "(none)", "the host's own timer interrupt"),
    Pair("interrupt-window exiting", "V_IRQ with the VINTR intercept"),
    Pair("NMI-window exiting", "the IRET intercept, then one step"),
    Pair("unrestricted guest", "paged real mode", "APM vol. 2 §15.19"),
    Pair("VM-exit MSR-load list and its like", "VMLOAD, VMSAVE", "and the hypervisor's own WRMSR"),
)

INSTRUCTIONS = (
    Pair("VMXON, VMXOFF", "EFER.SVME = 1, 0", "a bit, and no region"),
    Pair("VMPTRLD", "(none)", "VMRUN is given the address"),
    Pair("VMCLEAR", "(none)", "a VMCB is always in memory; moving it needs clean bits cleared"),
    Pair("VMPTRST", "(none)"),
    Pair("VMREAD, VMWRITE", "MOV", "the VMCB is plain memory"),
    Pair("VMLAUNCH, VMRESUME", "VMRUN"),
    Pair("VMCALL", "VMMCALL"),
    Pair("INVVPID", "INVLPGA, TLB_CONTROL"),
    Pair("INVEPT", "TLB_CONTROL"),
    Pair(
        "(part of entry and exit)", "VMLOAD, VMSAVE", "FS, GS, TR, LDTR, SYSCALL and SYSENTER MSRs"
    ),
    Pair("(part of entry and exit)", "STGI, CLGI", "the global interrupt flag"),
)

EXITS: dict[Reason, SvmExit] = {
    Reason.EXCEPTION_NMI: SvmExit(0x40, "EXCP0–EXCP31", "0x40 + vector; an NMI is 0x61"),
    Reason.EXTERNAL_INTERRUPT: SvmExit(0x60, "INTR"),
    Reason.TRIPLE_FAULT: SvmExit(0x7F, "SHUTDOWN"),
    Reason.INIT: SvmExit(0x63, "INIT"),
    Reason.INTERRUPT_WINDOW: SvmExit(0x64, "VINTR"),
    Reason.NMI_WINDOW: SvmExit(0x74, "IRET", "before the IRET, not after it"),
    Reason.TASK_SWITCH: SvmExit(0x7D, "TASK_SWITCH"),
    Reason.CPUID: SvmExit(0x72, "CPUID"),
    Reason.HLT: SvmExit(0x78, "HLT"),
    Reason.INVD: SvmExit(0x76, "INVD"),
    Reason.INVLPG: SvmExit(0x79, "INVLPG"),
    Reason.RDPMC: SvmExit(0x6F, "RDPMC"),
    Reason.RDTSC: SvmExit(0x6E, "RDTSC"),
    Reason.RSM: SvmExit(0x73, "RSM"),
    Reason.VMCALL: SvmExit(0x81, "VMMCALL"),
    Reason.VMLAUNCH: SvmExit(0x80, "VMRUN"),
    Reason.VMRESUME: SvmExit(0x80, "VMRUN"),
    Reason.CR_ACCESS: SvmExit(0x00, "CRn_READ, CRn_WRITE", "n, 0x10 + n"),
    Reason.MOV_DR: SvmExit(0x20, "DRn_READ, DRn_WRITE", "0x20 + n, 0x30 + n"),
    Reason.IO: SvmExit(0x7B, "IOIO"),
    Reason.RDMSR: SvmExit(0x7C, "MSR", "EXITINFO1 is 0"),
    Reason.WRMSR: SvmExit(0x7C, "MSR", "EXITINFO1 is 1"),
    Reason.ENTRY_GUEST_STATE: SvmExit(-1, "INVALID"),
    Reason.MWAIT: SvmExit(0x8B, "MWAIT"),
    Reason.MONITOR: SvmExit(0x8A, "MONITOR"),
    Reason.PAUSE: SvmExit(0x77, "PAUSE"),
    Reason.GDTR_IDTR: SvmExit(0x66, "IDTR_READ … GDTR_WRITE", "0x66, 0x67, 0x6a, 0x6b"),
    Reason.LDTR_TR: SvmExit(0x68, "LDTR_READ … TR_WRITE", "0x68, 0x69, 0x6c, 0x6d"),
    Reason.EPT_VIOLATION: SvmExit(0x400, "NPF"),
    Reason.EPT_MISCONFIGURATION: SvmExit(0x400, "NPF", "EXITINFO1 bit 3: reserved bits"),
    Reason.RDTSCP: SvmExit(0x87, "RDTSCP"),
    Reason.WBINVD: SvmExit(0x89, "WBINVD"),
    Reason.XSETBV: SvmExit(0x8D, "XSETBV"),
}
"""The reasons that are not here have no counterpart."""

CONTROLS: tuple[tuple[Pin | Primary | Secondary, str], ...] = (
    (Pin.EXTERNAL_INTERRUPT, "intercept INTR; V_INTR_MASKING"),
    (Pin.NMI, "intercept NMI"),
    (Pin.VIRTUAL_NMI, "V_NMI_ENABLE"),
    (Primary.INTERRUPT_WINDOW, "V_IRQ, intercept VINTR"),
    (Primary.TSC_OFFSETTING, "TSC_OFFSET, always"),
    (Primary.HLT, "intercept HLT"),
    (Primary.INVLPG, "intercept INVLPG"),
    (Primary.MWAIT, "intercept MWAIT"),
    (Primary.RDPMC, "intercept RDPMC"),
    (Primary.RDTSC, "intercept RDTSC"),
    (Primary.CR3_LOAD, "intercept CR3 writes"),
    (Primary.CR3_STORE, "intercept CR3 reads"),
    (Primary.CR8_LOAD, "intercept CR8 writes"),
    (Primary.CR8_STORE, "intercept CR8 reads"),
    (Primary.NMI_WINDOW, "intercept IRET"),
    (Primary.MOV_DR, "intercept DR reads and writes"),
    (Primary.UNCONDITIONAL_IO, "intercept IOIO, a map of ones"),
    (Primary.IO_BITMAPS, "intercept IOIO, IOPM_BASE_PA"),
    (Primary.MSR_BITMAPS, "intercept MSR, MSRPM_BASE_PA: two bits an MSR"),
    (Primary.MONITOR, "intercept MONITOR"),
    (Primary.PAUSE, "intercept PAUSE"),
    (Secondary.EPT, "NP_ENABLE"),
    (Secondary.DESCRIPTOR_TABLE, "intercept IDTR, GDTR, LDTR, TR reads and writes"),
    (Secondary.RDTSCP, "(always); intercept RDTSCP"),
    (Secondary.VPID, "GUEST_ASID, always"),
    (Secondary.WBINVD, "intercept WBINVD"),
    (Secondary.UNRESTRICTED_GUEST, "paged real mode, always"),
    (Secondary.PAGED_REAL_MODE, "the same: ours, Intel has it not"),
)

_SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
_BY_VMLOAD = "by VMLOAD and VMSAVE"


def _segment(name: str, at: int, note: str = "") -> dict[Field, Place]:
    parts = (("SELECTOR", 0), ("RIGHTS", 2), ("LIMIT", 4), ("BASE", 8))
    return {
        Field[f"GUEST_{name}_{part}"]: Place(SAVE + at + offset, f"{name}.{part.lower()}", note)
        for part, offset in parts
        if f"GUEST_{name}_{part}" in Field.__members__
    }


def _save(field: Field, at: int, name: str, note: str = "") -> dict[Field, Place]:
    return {field: Place(SAVE + at, name, note)}


FIELDS: dict[Field, Place] = {
    Field.EXCEPTION_BITMAP: Place(0x08, "exception intercepts"),
    Field.PRIMARY_CONTROLS: Place(0x0C, "instruction intercepts"),
    Field.IO_BITMAP_A: Place(0x40, "IOPM_BASE_PA", "A and B are one map, with a third page"),
    Field.MSR_BITMAP: Place(0x48, "MSRPM_BASE_PA"),
    Field.TSC_OFFSET: Place(0x50, "TSC_OFFSET"),
    Field.VPID: Place(0x58, "GUEST_ASID"),
    Field.GUEST_INTERRUPTIBILITY: Place(0x68, "INTERRUPT_SHADOW", "one bit for STI and MOV SS"),
    Field.EXIT_REASON: Place(0x70, "EXITCODE"),
    Field.EXIT_QUALIFICATION: Place(0x78, "EXITINFO1"),
    Field.GUEST_PHYSICAL_ADDRESS: Place(0x80, "EXITINFO2", "of an NPF; CR2 of a #PF"),
    Field.IDT_VECTORING_INFO: Place(0x88, "EXITINTINFO"),
    Field.IDT_VECTORING_ERROR: Place(0x8C, "EXITINTINFO, high half"),
    Field.SECONDARY_CONTROLS: Place(0x90, "NP_ENABLE"),
    Field.ENTRY_INTERRUPTION_INFO: Place(0xA8, "EVENTINJ"),
    Field.ENTRY_EXCEPTION_ERROR: Place(0xAC, "EVENTINJ, high half"),
    Field.EPT_POINTER: Place(0xB0, "N_CR3"),
    Field.EXIT_INSTRUCTION_LENGTH: Place(0xC8, "nRIP", "the address behind, with decode assists"),
    **{
        field: place
        for at, name in enumerate(_SEGMENTS)
        for field, place in _segment(name, 16 * at, _BY_VMLOAD if at > 3 else "").items()
    },
    **_segment("GDTR", 0x60),
    **_segment("LDTR", 0x70, _BY_VMLOAD),
    **_segment("IDTR", 0x80),
    **_segment("TR", 0x90, _BY_VMLOAD),
    **_save(Field.GUEST_EFER, 0xD0, "EFER"),
    **_save(Field.GUEST_CR4, 0x148, "CR4"),
    **_save(Field.GUEST_CR3, 0x150, "CR3"),
    **_save(Field.GUEST_CR0, 0x158, "CR0"),
    **_save(Field.GUEST_DR7, 0x160, "DR7", "and DR6, at 0x568"),
    **_save(Field.GUEST_RFLAGS, 0x170, "RFLAGS"),
    **_save(Field.GUEST_RIP, 0x178, "RIP"),
    **_save(Field.GUEST_RSP, 0x1D8, "RSP", "and RAX, at 0x5f8"),
    **_save(Field.GUEST_SYSENTER_CS, 0x228, "SYSENTER_CS", _BY_VMLOAD),
    **_save(Field.GUEST_SYSENTER_ESP, 0x230, "SYSENTER_ESP", _BY_VMLOAD),
    **_save(Field.GUEST_SYSENTER_EIP, 0x238, "SYSENTER_EIP", _BY_VMLOAD),
    **_save(Field.GUEST_PAT, 0x268, "G_PAT", "under nested paging"),
    **_save(Field.GUEST_DEBUGCTL, 0x270, "DBGCTL"),
}
"""The fields that are not here have no counterpart."""


def intercept_place(code: int) -> tuple[int, int] | None:
    """The byte offset of the 32-bit word in the VMCB, and the bit, that intercepts an exit code."""
    if 0 <= code < 0x40:
        return 4 * (code >> 5), code & 31
    if code < 0xA0:
        return 8 + 4 * (code - 0x40 >> 5), code & 31
    return None
