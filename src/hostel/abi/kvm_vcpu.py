"""KVM's structures for x86 that belong to a vCPU, and its shared page; see ``kvm.py``."""

# No "from __future__ import annotations": the layouts are built from the annotations themselves.

from ctypes import Array, Structure, Union, c_char, c_uint8, c_uint32, c_uint64
from typing import Annotated

from .kvm_start import Regs, Sregs
from .kvm_types import layout, u8, u16, u32, u64

# --- vCPU state --------------------------------------------------------------------------------


@layout
class Fpu(Structure):
    fpr: Annotated[Array[Array[c_uint8]], c_uint8 * 16 * 8]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[Array[Array[c_uint8]], c_uint8 * 16 * 16]
    mxcsr: u32
    pad2: u32


@layout
class Xsave(Structure):
    region: Annotated[Array[c_uint32], c_uint32 * 1024]


@layout
class Xcr(Structure):
    xcr: u32
    reserved: u32
    value: u64


@layout
class Xcrs(Structure):
    nr_xcrs: u32
    flags: u32
    xcrs: Annotated[Array[Xcr], Xcr * 16]
    padding: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class MpState(Structure):
    mp_state: u32


@layout
class MsrEntry(Structure):
    index: u32
    reserved: u32
    data: u64


@layout
class _EventException(Structure):
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@layout
class _EventInterrupt(Structure):
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@layout
class _EventNmi(Structure):
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@layout
class _EventSmi(Structure):
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@layout
class _EventTripleFault(Structure):
    pending: u8


@layout
class VcpuEvents(Structure):
    exception: _EventException
    interrupt: _EventInterrupt
    nmi: _EventNmi
    sipi_vector: u32
    flags: u32
    smi: _EventSmi
    triple_fault: _EventTripleFault
    reserved: Annotated[Array[c_uint8], c_uint8 * 26]
    exception_has_payload: u8
    exception_payload: u64


@layout
class Debugregs(Structure):
    db: Annotated[Array[c_uint64], c_uint64 * 4]
    dr6: u64
    dr7: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], c_uint64 * 9]


@layout
class GuestDebugArch(Structure):
    debugreg: Annotated[Array[c_uint64], c_uint64 * 8]


@layout
class GuestDebug(Structure):
    control: u32
    pad: u32
    arch: GuestDebugArch


@layout
class Translation(Structure):
    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 5]


@layout
class Interrupt(Structure):
    irq: u32


# --- The page shared with a running vCPU (api.rst §5) --------------------------------------------


@layout
class _Hw(Structure):
    hardware_exit_reason: u64


@layout
class _FailEntry(Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@layout
class _Exception(Structure):
    exception: u32
    error_code: u32


@layout
class _Io(Structure):
    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@layout
class DebugExitArch(Structure):
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@layout
class _Debug(Structure):
    arch: DebugExitArch


@layout
class _Mmio(Structure):
    phys_addr: u64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: u32
    is_write: u8


@layout
class _Hypercall(Structure):
    nr: u64
    args: Annotated[Array[c_uint64], c_uint64 * 6]
    ret: u64
    longmode: u32
    pad: u32


@layout
class _TprAccess(Structure):
    rip: u64
    is_write: u32
    pad: u32


@layout
class _Internal(Structure):
    suberror: u32
    ndata: u32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class _EmulationFailure(Structure):
    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Annotated[Array[c_uint8], c_uint8 * 15]


@layout
class _SystemEvent(Structure):
    type: u32
    ndata: u32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class _Eoi(Structure):
    vector: u8


@layout
class _Msr(Structure):
    error: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 7]
    reason: u32
    index: u32
    data: u64


@layout
class _Notify(Structure):
    flags: u32


@layout
class _RunExit(Union):
    hw: _Hw
    fail_entry: _FailEntry
    ex: _Exception
    io: _Io
    debug: _Debug
    mmio: _Mmio
    hypercall: _Hypercall
    tpr_access: _TprAccess
    internal: _Internal
    emulation_failure: _EmulationFailure
    system_event: _SystemEvent
    eoi: _Eoi
    msr: _Msr
    notify: _Notify
    padding: Annotated[Array[c_char], c_char * 256]


@layout
class SyncRegs(Structure):
    regs: Regs
    sregs: Sregs
    events: VcpuEvents


@layout
class _RunSync(Union):
    regs: SyncRegs
    padding: Annotated[Array[c_char], c_char * 2048]


@layout
class Run(Structure):
    _anonymous_ = ("exit",)
    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[Array[c_uint8], c_uint8 * 6]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: _RunExit
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: _RunSync
