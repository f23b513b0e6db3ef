"""The table of sensitive instructions: who acts for which.

What always exits, what exits under a control, and the order against faults of privilege: SDM vol. 3C §25.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP, UD
from hostel.soft.silicon import Access, Primary, Reason, Secondary
from hostel.soft.state import CR4_OSXSAVE

from . import control, ports, transfers
from .events import Fault
from .operands import effective_address, operand_address
from .outcome import Outcome, Result, leave, need_ring0

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from .translate import TranslatingCore

Handler = Callable[["TranslatingCore", "Instruction"], Result]


def _invlpg(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    need_ring0(state)
    offset = effective_address(state, instruction)
    base = 0
    if state.bits != 64:
        base = operand_address(state, instruction, 1, Access.READ) - offset
    address = offset + base
    if core.controls.primary & Primary.INVLPG:
        return leave(Reason.INVLPG, instruction, address)
    core.mmu.invalidate(core.controls, address)
    core.flush(address)
    return Outcome.DONE


def _wbinvd(core: TranslatingCore, instruction: Instruction) -> Result:
    need_ring0(core.state)
    if core.controls.secondary & Secondary.WBINVD:
        return leave(Reason.WBINVD, instruction)
    return Outcome.DONE


def _xsetbv(core: TranslatingCore, instruction: Instruction) -> Result:
    if not core.state.cr4 & CR4_OSXSAVE:
        raise Fault(UD)
    need_ring0(core.state)
    return leave(Reason.XSETBV, instruction)


def _rdpmc(core: TranslatingCore, instruction: Instruction) -> Result:
    if core.state.cpl and not core.state.cr4 & 1 << 8:
        raise Fault(GP, 0)
    if core.controls.primary & Primary.RDPMC:
        return leave(Reason.RDPMC, instruction)
    raise Fault(GP, 0)  # there is no counter


def _always(reason: Reason, *, ring0: bool = False) -> Handler:
    def handler(core: TranslatingCore, instruction: Instruction) -> Result:
        if ring0:
            need_ring0(core.state)
        return leave(reason, instruction)

    return handler


def _under(control_bit: Primary, reason: Reason, *, ring0: bool = False) -> Handler:
    """Exits under a control; else it does nothing that a guest could see."""

    def handler(core: TranslatingCore, instruction: Instruction) -> Result:
        if ring0:
            need_ring0(core.state)
        if core.controls.primary & control_bit:
            return leave(reason, instruction)
        return Outcome.DONE

    return handler


def _undefined(_core: TranslatingCore, _instruction: Instruction) -> Result:
    raise Fault(UD)


_BY_NAME: dict[str, Handler] = {
    "CPUID": _always(Reason.CPUID),
    "INVD": _always(Reason.INVD, ring0=True),
    "VMCALL": _always(Reason.VMCALL),
    "VMCLEAR": _always(Reason.VMCLEAR),
    "VMLAUNCH": _always(Reason.VMLAUNCH),
    "VMPTRLD": _always(Reason.VMPTRLD),
    "VMPTRST": _always(Reason.VMPTRST),
    "VMREAD": _always(Reason.VMREAD),
    "VMRESUME": _always(Reason.VMRESUME),
    "VMWRITE": _always(Reason.VMWRITE),
    "VMXOFF": _always(Reason.VMXOFF),
    "VMXON": _always(Reason.VMXON),
    "INVEPT": _always(Reason.INVEPT),
    "INVVPID": _always(Reason.INVVPID),
    "VMFUNC": _undefined,
    "INVALID": _undefined,
    "PAUSE": _under(Primary.PAUSE, Reason.PAUSE),
    "MONITOR": _under(Primary.MONITOR, Reason.MONITOR, ring0=True),
    "MWAIT": _under(Primary.MWAIT, Reason.MWAIT, ring0=True),
    "WBINVD": _wbinvd,
    "XSETBV": _xsetbv,
    "INVLPG": _invlpg,
    "RDPMC": _rdpmc,
    "RDTSC": control.read_time,
    "RDTSCP": control.read_time,
    "RDMSR": control.read_msr,
    "WRMSR": control.write_msr,
    "CLTS": control.clear_task_switched,
    "LMSW": control.load_machine_status,
    "SMSW": control.store_machine_status,
    "HLT": transfers.halt,
    "STI": transfers.set_interrupts,
    "SYSCALL": transfers.syscall,
    "SYSRET": transfers.sysret,
    "SYSRETQ": transfers.sysret,
    "SYSENTER": transfers.sysenter,
    "SYSEXIT": transfers.sysexit,
    "SYSEXITQ": transfers.sysexit,
    "SWAPGS": transfers.swap_gs,
    "INT": transfers.software_interrupt,
    "INT1": transfers.interrupt1,
}
_GROUPS: tuple[tuple[str, Handler], ...] = (
    ("IN OUT INSB INSW INSD OUTSB OUTSW OUTSD", ports.access),
    ("LGDT LIDT SGDT SIDT LLDT LTR SLDT STR", transfers.descriptor_table),
    ("IRET IRETD IRETQ", transfers.interrupt_return),
    ("POPF POPFD POPFQ", transfers.as_it_stands),
    ("LDS LES LFS LGS LSS LAR LSL VERR VERW RETF", transfers.with_descriptors),
)
_BY_CODE: tuple[tuple[str, Handler], ...] = (
    ("MOV_R32_CR MOV_R64_CR", control.move_from_control),
    ("MOV_CR_R32 MOV_CR_R64", control.move_to_control),
    ("MOV_R32_DR MOV_R64_DR MOV_DR_R32 MOV_DR_R64", control.move_debug),
    ("JMP_PTR1616 JMP_PTR1632 JMP_M1616 JMP_M1632 JMP_M1664", transfers.far_transfer),
    ("CALL_PTR1616 CALL_PTR1632 CALL_M1616 CALL_M1632 CALL_M1664", transfers.far_transfer),
    ("MOV_SREG_RM16 MOV_SREG_R32M16 MOV_SREG_R64M16", transfers.with_descriptors),
    ("POPW_DS POPD_DS POPW_ES POPD_ES POPW_SS POPD_SS", transfers.with_descriptors),
    ("POPW_FS POPD_FS POPQ_FS POPW_GS POPD_GS POPQ_GS", transfers.with_descriptors),
)


STATELESS = frozenset(
    (transfers.as_it_stands, transfers.with_descriptors, transfers.interrupt_return)
)
"""Those that need no ``CpuState``: the engine's need not be copied to it."""


class Handlers:
    """The table by iced-x86's numbers, made when the decoder is there."""

    def __init__(self) -> None:
        from iced_x86 import Code, Mnemonic

        self._mnemonics = {getattr(Mnemonic, name): act for name, act in _BY_NAME.items()}
        for names, act in _GROUPS:
            self._mnemonics.update({getattr(Mnemonic, name): act for name in names.split()})
        self._codes = {
            getattr(Code, name): act for names, act in _BY_CODE for name in names.split()
        }

    def of(self, instruction: Instruction) -> Handler:
        """What is not sensitive runs as it stands."""
        found = self._codes.get(instruction.code) or self._mnemonics.get(instruction.mnemonic)
        return found or transfers.as_it_stands
