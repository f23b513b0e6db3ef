"""From a #VMEXIT to the VM exit that VMX would make of it, or to none.

SVM's intercepts are coarser than VMX's controls. A handler here gets the guest's state as it was before
the instruction and either says which ``VmExit`` it is, or carries the instruction out on the state and
returns None: the core goes on. ``Exit.inject`` holds an exception that the guest gets instead.
"""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, OpKind, Register, RegisterExt

from hostel.soft.exceptions import DB, GP, PF, SS, UD, WITH_ERROR_CODE, fault
from hostel.soft.physical import PhysicalMemory
from hostel.soft.register_checks import Refused
from hostel.soft.silicon import Controls, Event, EventType, Primary, Reason, Secondary, VmExit
from hostel.soft.state import CR0_PE, CR4_DE, CR4_OSXSAVE, RAX, RCX, RDX, canonical

from . import svm_decode as decode
from . import vmcb
from .breakpoints import load_debug
from .segments import runs_over
from .svm_exit import Exit, Handler
from .svm_io import io
from .svm_registers import load_control_register, read_msr, syscall, sysenter, write_msr

_U32 = 0xFFFF_FFFF
_VMX = {
    Mnemonic.VMCALL: Reason.VMCALL,
    Mnemonic.VMCLEAR: Reason.VMCLEAR,
    Mnemonic.VMLAUNCH: Reason.VMLAUNCH,
    Mnemonic.VMPTRLD: Reason.VMPTRLD,
    Mnemonic.VMPTRST: Reason.VMPTRST,
    Mnemonic.VMREAD: Reason.VMREAD,
    Mnemonic.VMRESUME: Reason.VMRESUME,
    Mnemonic.VMWRITE: Reason.VMWRITE,
    Mnemonic.VMXOFF: Reason.VMXOFF,
    Mnemonic.VMXON: Reason.VMXON,
    Mnemonic.INVEPT: Reason.INVEPT,
    Mnemonic.INVVPID: Reason.INVVPID,
}
_TABLE_INFO = {  # instruction identity, bits 29:28 (SDM vol. 3C tables 27-10, 27-11)
    Mnemonic.SGDT: (Reason.GDTR_IDTR, 0),
    Mnemonic.SIDT: (Reason.GDTR_IDTR, 1),
    Mnemonic.LGDT: (Reason.GDTR_IDTR, 2),
    Mnemonic.LIDT: (Reason.GDTR_IDTR, 3),
    Mnemonic.SLDT: (Reason.LDTR_TR, 0),
    Mnemonic.STR: (Reason.LDTR_TR, 1),
    Mnemonic.LLDT: (Reason.LDTR_TR, 2),
    Mnemonic.LTR: (Reason.LDTR_TR, 3),
}


def plain(reason: Reason) -> Handler:
    return lambda exit, _: exit.exit(reason)


def _invlpg(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    return exit.exit(Reason.INVLPG, decode.linear_address(exit.instruction, exit.state))


def _rdtsc(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    state, controls = exit.state, exit.controls
    ordered = exit.instruction.mnemonic == Mnemonic.RDTSCP
    if ordered and not controls.secondary & Secondary.RDTSCP:
        return exit.fault(UD)
    if controls.primary & Primary.RDTSC:
        return exit.exit(Reason.RDTSCP if ordered else Reason.RDTSC)
    now = exit.tsc
    state.gpr[RAX], state.gpr[RDX] = now & _U32, now >> 32
    if ordered:
        state.gpr[RCX] = state.msrs.get(0xC000_0103, 0) & _U32
    return exit.skip()


def _rdpmc(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    if exit.controls.primary & Primary.RDPMC:
        return exit.exit(Reason.RDPMC)
    return exit.fault(GP, 0)


def _or_nothing(control: Primary, reason: Reason) -> Handler:
    """MONITOR and MWAIT: without the control they are hints, which may do nothing."""

    def handle(exit: Exit, _: PhysicalMemory) -> VmExit | None:
        return exit.exit(reason) if exit.controls.primary & control else exit.skip()

    return handle


def _msr(exit: Exit, physical: PhysicalMemory) -> VmExit | None:
    """SDM vol. 3C §24.6.9: four bitmaps of 1 KiB, reads first."""
    state, controls = exit.state, exit.controls
    number, writes = state.gpr[RCX] & _U32, bool(exit.info1)
    low, high = number < 0x2000, 0xC000_0000 <= number < 0xC000_2000
    intercepts = True
    if controls.primary & Primary.MSR_BITMAPS and (low or high):
        at = controls.msr_bitmap + writes * 2048 + high * 1024 + (number & 0x1FFF) // 8
        intercepts = bool(physical.read(at, 1)[0] >> (number & 7) & 1)
    if intercepts:
        return exit.exit(Reason.WRMSR if writes else Reason.RDMSR)
    try:
        if writes:
            write_msr(state, number, state.gpr[RDX] << 32 & ~_U32 | state.gpr[RAX] & _U32)
        else:
            value = read_msr(state, number, exit.tsc)
            state.gpr[RAX], state.gpr[RDX] = value & _U32, value >> 32
    except Refused:
        return exit.fault(GP, 0)
    return exit.skip()


def _write_cr(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    state, controls, instruction = exit.state, exit.controls, exit.instruction
    register = exit.code & 0xF
    if instruction.mnemonic == Mnemonic.CLTS:
        return _clts(exit)
    if instruction.mnemonic == Mnemonic.LMSW:
        return _lmsw(exit)
    source = decode.number(instruction.op1_register)
    value = state.gpr[source] & ((1 << 64) - 1 if state.bits == 64 else _U32)
    exits, kept = _cr_write_exits(controls, register, value)
    if exits:
        return exit.exit(Reason.CR_ACCESS, register | source << 8)
    real = state.cr4 if register else state.cr0
    return _go_on(exit, register, real & kept | value & ~kept)


def _cr_write_exits(controls: Controls, register: int, value: int) -> tuple[bool, int]:
    """Whether it does, and which bits the hypervisor keeps if not (SDM vol. 3C §25.1.3)."""
    if register == 3:
        stops = controls.primary & Primary.CR3_LOAD and value not in controls.cr3_targets
        return bool(stops), 0
    if register == 8:
        return bool(controls.primary & Primary.CR8_LOAD), 0
    if register == 4:
        return bool((value ^ controls.cr4_shadow) & controls.cr4_mask), controls.cr4_mask
    return bool((value ^ controls.cr0_shadow) & controls.cr0_mask), controls.cr0_mask


def _go_on(exit: Exit, register: int, value: int) -> VmExit | None:
    try:
        load_control_register(exit.state, register, value, exit.pointers)
    except Refused:
        return exit.fault(GP, 0)
    return exit.skip()


def _lmsw(exit: Exit) -> VmExit | None:
    """SDM vol. 3C §25.1.3: of MP, EM and TS each change counts, of PE only the setting."""
    state, controls, instruction = exit.state, exit.controls, exit.instruction
    in_memory = instruction.op0_kind == OpKind.MEMORY
    linear = decode.linear_address(instruction, state) if in_memory else 0
    source = exit.operand()
    changes = (source ^ controls.cr0_shadow) & 0xE | source & ~controls.cr0_shadow & 1
    if changes & controls.cr0_mask:
        return exit.exit(Reason.CR_ACCESS, 3 << 4 | in_memory << 6 | source << 16, linear=linear)
    new = state.cr0 & ~0xE | source & 0xF
    return _go_on(exit, 0, state.cr0 & controls.cr0_mask | new & ~controls.cr0_mask)


def _clts(exit: Exit) -> VmExit | None:
    """SDM vol. 3C §25.1.3: exits only if the guest sees TS set, and does not own it."""
    if exit.controls.cr0_mask & exit.controls.cr0_shadow & 8:
        return exit.exit(Reason.CR_ACCESS, 2 << 4)
    if not exit.controls.cr0_mask & 8:
        exit.state.cr0 &= ~8
    return exit.skip()


def _read_cr(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    state, controls, instruction = exit.state, exit.controls, exit.instruction
    register = exit.code & 0xF
    if instruction.mnemonic == Mnemonic.SMSW:
        return _smsw(exit)
    target = decode.number(instruction.op0_register)
    if register == 3 or (register == 8 and controls.primary & Primary.CR8_STORE):
        return exit.exit(Reason.CR_ACCESS, register | 1 << 4 | target << 8)
    if register == 8:
        value = state.cr8
    elif register == 4:
        value = state.cr4 & ~controls.cr4_mask | controls.cr4_shadow & controls.cr4_mask
    else:
        value = state.cr0 & ~controls.cr0_mask | controls.cr0_shadow & controls.cr0_mask
    state.gpr[target] = value if state.bits == 64 else state.gpr[target] & ~_U32 | value & _U32
    return exit.skip()


def _smsw(exit: Exit) -> VmExit | None:
    state, controls, instruction = exit.state, exit.controls, exit.instruction
    if instruction.op0_kind != OpKind.REGISTER:
        return exit.exit(Reason.CR_ACCESS, 1 << 4)
    target, size = (
        decode.number(instruction.op0_register),
        RegisterExt.size(instruction.op0_register),
    )
    value = state.cr0 & ~controls.cr0_mask | controls.cr0_shadow & controls.cr0_mask
    keep = state.gpr[target] & ~0xFFFF if size == 2 else 0
    state.gpr[target] = keep | value & (0xFFFF if size == 2 else _U32)
    return exit.skip()


def _dr(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    instruction = exit.instruction
    reads = exit.code < vmcb.WRITE_DR
    general = decode.number(instruction.op0_register if reads else instruction.op1_register)
    if exit.controls.primary & Primary.MOV_DR:
        return exit.exit(Reason.MOV_DR, exit.code & 7 | reads << 4 | general << 8)
    return _load_dr(exit, exit.code & 7, exit.state.gpr[general])


def _load_dr(exit: Exit, number: int, value: int) -> VmExit | None:
    """DR6 or DR7, by their own names or as DR4 and DR5."""
    state = exit.state
    if number < 6 and state.cr4 & CR4_DE:
        return exit.fault(UD)
    if state.bits == 64 and value >> 32:
        return exit.fault(GP, 0)
    load_debug(state, number | 2, value & _U32)
    return exit.skip()


def _tables(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    reason, identity = _TABLE_INFO[exit.instruction.mnemonic]
    return exit.exit(reason, exit.instruction.memory_displacement, instruction_info=identity << 28)


def _software_interrupt(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    """Met for INT3 and INTO's sake: they are exceptions to VMX, and INT n is not."""
    instruction, bitmap = exit.instruction, exit.controls.exception_bitmap
    vectors = {Mnemonic.INT3: 3, Mnemonic.INTO: 4}
    vector = vectors.get(instruction.mnemonic)
    length = instruction.len
    if vector is None:
        vector = instruction.immediate8
        exit.inject = Event(vector, EventType.SOFTWARE_INTERRUPT, None, length)
        return None
    event = Event(vector, EventType.SOFTWARE_EXCEPTION, None, length)
    if bitmap >> vector & 1:
        return VmExit(Reason.EXCEPTION_NMI, 0, length, interruption=event)
    exit.inject = event
    return None


def _icebp(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    length = exit.instruction.len
    event = Event(DB, EventType.PRIVILEGED_SOFTWARE_EXCEPTION, None, length)
    if exit.controls.exception_bitmap >> DB & 1:
        return VmExit(Reason.EXCEPTION_NMI, 0, length, interruption=event)
    exit.inject = event
    return None


def _exception(exit: Exit, _: PhysicalMemory) -> VmExit | None:
    vector, controls = exit.code - vmcb.EXCEPTION, exit.controls
    if vector == GP and _is_stack_fault(exit):
        vector = SS
    error = _error_code(exit) if vector in WITH_ERROR_CODE else None
    event = Event(vector, EventType.HARDWARE_EXCEPTION, error)
    exits = bool(controls.exception_bitmap >> vector & 1)
    address = 0
    if vector == PF and runs_over(exit.state):
        return VmExit(Reason.EXTERNAL_INTERRUPT)  # by no fault of the guest: see checked.py
    if vector == PF:
        exits ^= exit.info1 & controls.pf_mask != controls.pf_match
        address = exit.info2
    if vector == UD:
        special = _undefined(exit)
        if special is not None:
            return special
    if exits:
        return VmExit(Reason.EXCEPTION_NMI, address, 0, interruption=event)
    if exit.inject is None:
        exit.inject = event
        if vector == PF:
            exit.state.cr2 = address
    return None


def _error_code(exit: Exit) -> int:
    """Of what came up while something else was delivered, QEMU gives the wrong one (SDM vol. 3A §6.13):
    vector * 16 where a gate of long mode is bad, and EXT never."""
    code, vectoring = exit.info1, exit.vectoring
    if vectoring is None or exit.code == vmcb.EXCEPTION + PF:
        return code
    if code == vectoring.vector * 16 + 2:
        code = vectoring.vector * 8 + 2
    soft = vectoring.type in (EventType.SOFTWARE_INTERRUPT, EventType.SOFTWARE_EXCEPTION)
    return code if soft else code | 1


def _is_stack_fault(exit: Exit) -> bool:
    """An access by SS to an address that is not canonical is #SS(0) (SDM vol. 3A §6.15); QEMU says #GP."""
    if exit.info1 or exit.state.bits != 64 or canonical(exit.linear):
        return False
    instruction = exit.instruction
    return instruction.is_stack_instruction or instruction.memory_segment == Register.SS


def _undefined(exit: Exit) -> VmExit | None:
    """What this SVM processor does not know, and a VMX processor does."""
    instruction, state = exit.instruction, exit.state
    mnemonic = instruction.mnemonic
    if instruction.code == Code.INVALID or not state.cr0 & CR0_PE:
        return None
    if mnemonic in _VMX:
        displacement = instruction.memory_displacement if instruction.memory_displ_size else 0
        return exit.exit(_VMX[mnemonic], displacement)
    if mnemonic == Mnemonic.XSETBV and state.cr4 & CR4_OSXSAVE and state.cpl == 0:
        return exit.exit(Reason.XSETBV)
    return None


def fast_call(exit: Exit) -> Event | None:
    """SYSCALL or SYSENTER; the exception instead, if it is one."""
    try:
        if exit.code == vmcb.SYSENTER:
            sysenter(exit.state)
        elif not syscall(exit.state, exit.instruction.len):
            return fault(UD)
    except Refused:
        return fault(GP)
    return None


HANDLERS: dict[int, Handler] = {
    vmcb.CPUID: plain(Reason.CPUID),
    vmcb.INVD: plain(Reason.INVD),
    vmcb.WBINVD: plain(Reason.WBINVD),
    vmcb.PAUSE: plain(Reason.PAUSE),
    vmcb.RDTSC: _rdtsc,
    vmcb.RDPMC: _rdpmc,
    vmcb.INVLPG: _invlpg,
    vmcb.MONITOR: _or_nothing(Primary.MONITOR, Reason.MONITOR),
    vmcb.MWAIT: _or_nothing(Primary.MWAIT, Reason.MWAIT),
    vmcb.MSR: _msr,
    vmcb.IOIO: io,
    vmcb.SWINT: _software_interrupt,
    vmcb.ICEBP: _icebp,
    **{vmcb.READ_CR + n: _read_cr for n in (0, 3, 4, 8)},
    **{vmcb.WRITE_CR + n: _write_cr for n in (0, 3, 4, 8)},
    **{code: _dr for code in range(vmcb.READ_DR, vmcb.WRITE_DR + 8)},
    **{code: _tables for code in range(vmcb.IDTR_READ, vmcb.TR_WRITE + 1)},
    **{vmcb.EXCEPTION + n: _exception for n in range(32)},
}
