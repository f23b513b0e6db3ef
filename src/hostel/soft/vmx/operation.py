"""VMX operation of a processor in root mode: the instructions that do not enter a guest (SDM vol. 3C ch. 30).

Each makes the manual's checks in the manual's order, sets RFLAGS as VMsucceed or VMfail do, and takes
``ROOT_TIME``. What manipulates translations or enters a guest is the child's: ``../pcpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from hostel.soft.exceptions import GP, UD
from hostel.soft.physical import PhysicalMemory
from hostel.soft.state import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MSR_TSC,
    RFLAGS_VM,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    CpuState,
    Segment,
)
from hostel.soft.vmx import msrs
from hostel.soft.vmx.capabilities import (
    CR0_FIXED0,
    CR0_FIXED1,
    CR4_FIXED0,
    CR4_FIXED1,
    FEATURE_LOCKED,
    FEATURE_VMX,
    MSR_FEATURE_CONTROL,
    NO_VMCS,
    REVISION,
    fits,
)
from hostel.soft.vmx.check_host import fixed
from hostel.soft.vmx.events import Mode, TraceEvent, VmxStatistics
from hostel.soft.vmx.fields import ACCESS, Kind
from hostel.soft.vmx.results import CpuFault, VmError, VmFail, VmxMisuse
from hostel.soft.vmx.vmcs import Vmcs, region

ROOT_TIME = 40
"""What an instruction of the hypervisor's takes, in guest instructions: VMX's are microcode."""

CODE_64 = 1 << 13
_CF, _ZF = 1, 1 << 6
_RESULT_FLAGS = _CF | 1 << 2 | 1 << 4 | _ZF | 1 << 7 | 1 << 11
"""CF, PF, AF, ZF, SF, OF: VMsucceed clears them all (§30.2)."""


class Package:
    """What physical processors share: memory, and which VMCS is active on which of them.

    No real processor knows the latter: that is why using a VMCS on two of them corrupts it.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.active: dict[int, Vmcs] = {}
        self.vmxon: dict[int, int] = {}
        """VMXON regions in use, and by whom."""


class VmxOperation:
    def __init__(self, id: int, package: Package) -> None:
        self.id = id
        self.package = package
        self.memory = package.memory
        self.state = state_at_boot()
        """What is in the registers now."""
        self.mode = Mode.OFF
        self.feature_control = FEATURE_LOCKED | FEATURE_VMX
        """IA32_FEATURE_CONTROL, as firmware leaves it."""
        self.tsc = 0
        self.current: Vmcs | None = None
        self.vmxon_pointer: int | None = None
        self.statistics = VmxStatistics()
        self.trace: Callable[[TraceEvent], None] | None = None
        self._operation = 0
        """How many times VMXON succeeded."""

    # --- Entering and leaving VMX operation ---

    def vmxon(self, hpa: int) -> None:
        name = "VMXON"
        if self.mode is Mode.OFF:
            self._admit_vmxon()
            self._take_vmxon_region(hpa)
            self._succeed(name, hpa)
            self.mode = Mode.ROOT
            return
        self._admit(name)
        self._fail(name, VmError.VMXON_IN_ROOT)

    def _admit_vmxon(self) -> None:
        state = self.state
        self._check_mode("VMXON")
        if not state.cr4 & CR4_VMXE:
            self._fault("VMXON", UD, "CR4.VMXE is 0")
        if state.cpl:
            self._fault("VMXON", GP, "CPL is not 0")
        if not fixed(state.cr0, CR0_FIXED0, CR0_FIXED1) or not fixed(
            state.cr4, CR4_FIXED0, CR4_FIXED1
        ):
            self._fault("VMXON", GP, "CR0 or CR4 has a value that VMX operation does not allow")
        if self.feature_control & (FEATURE_LOCKED | FEATURE_VMX) != FEATURE_LOCKED | FEATURE_VMX:
            self._fault("VMXON", GP, "IA32_FEATURE_CONTROL does not allow VMX")

    def _take_vmxon_region(self, hpa: int) -> None:
        if hpa & 0xFFF or not fits(hpa) or self._revision(hpa) != REVISION:
            self._fail("VMXON", None, why="the VMXON region's address or revision")
        if hpa in self.package.vmxon or hpa in self.package.active:
            raise VmxMisuse(f"VMXON: {hpa:#x} is a VMCS, or another processor's VMXON region")
        self.package.vmxon[hpa] = self.id
        self.vmxon_pointer = hpa
        self.current = None
        self._operation += 1

    def vmxoff(self) -> None:
        self._admit("VMXOFF")
        self._succeed("VMXOFF")
        if self.vmxon_pointer is not None:
            del self.package.vmxon[self.vmxon_pointer]
        self.mode, self.vmxon_pointer, self.current = Mode.OFF, None, None

    # --- VMCS pointers ---

    def vmclear(self, hpa: int) -> None:
        name = "VMCLEAR"
        self._admit(name)
        self._check_pointer(name, hpa, VmError.VMCLEAR_ADDRESS, VmError.VMCLEAR_VMXON_POINTER)
        vmcs = self._mine(name, hpa)
        if vmcs is not None:
            vmcs.set_clear()
            vmcs.owner = None
            self.package.active.pop(hpa, None)
            if vmcs is self.current:
                self.current = None
        self._succeed(name, hpa)

    def vmptrld(self, hpa: int) -> None:
        name = "VMPTRLD"
        self._admit(name)
        self._check_pointer(name, hpa, VmError.VMPTRLD_ADDRESS, VmError.VMPTRLD_VMXON_POINTER)
        vmcs = self._mine(name, hpa)
        if vmcs is None or vmcs.revision != REVISION:
            self._fail(name, VmError.VMPTRLD_REVISION)
        vmcs.owner = self.id
        self.package.active[hpa] = vmcs
        self.current = vmcs
        self._succeed(name, hpa)

    def vmptrst(self) -> int:
        self._admit("VMPTRST")
        hpa = NO_VMCS if self.current is None else self.current.hpa
        self._succeed("VMPTRST", hpa)
        return hpa

    def _check_pointer(self, name: str, hpa: int, bad: VmError, vmxon: VmError) -> None:
        if hpa & 0xFFF or not fits(hpa):
            self._fail(name, bad)
        if hpa == self.vmxon_pointer:
            self._fail(name, vmxon)

    def _mine(self, name: str, hpa: int) -> Vmcs | None:
        """The VMCS at ``hpa``, unless it is another processor's; None where there is no memory."""
        vmcs = self.package.active.get(hpa)
        if vmcs is None:
            if hpa in self.package.vmxon:
                raise VmxMisuse(f"{name}: {hpa:#x} is another processor's VMXON region")
            view = region(self.memory, hpa)
            return None if view is None else Vmcs(hpa, view)
        if vmcs.owner != self.id:
            raise VmxMisuse(
                f"{name}: the VMCS at {hpa:#x} is active on pCPU {vmcs.owner}: VMCLEAR it there first"
            )
        return vmcs

    def _revision(self, hpa: int) -> int:
        view = region(self.memory, hpa)
        return -1 if view is None else Vmcs(hpa, view).revision

    # --- Fields ---

    def vmread(self, field: int) -> int:
        vmcs = self._current("VMREAD")
        if field not in ACCESS:
            self._fail("VMREAD", VmError.UNSUPPORTED_FIELD, field)
        value = vmcs.read(field)
        self._succeed("VMREAD", field, value)
        return value

    def vmwrite(self, field: int, value: int) -> None:
        """What does not fit into the field's width is cut off (§30.3, VMWRITE)."""
        vmcs = self._current("VMWRITE")
        if field not in ACCESS:
            self._fail("VMWRITE", VmError.UNSUPPORTED_FIELD, field)
        if field >> 10 & 3 == Kind.EXIT:
            self._fail("VMWRITE", VmError.READ_ONLY_FIELD, field)
        vmcs.write(field, value)
        self._succeed("VMWRITE", field, value)

    # --- Others ---

    def vmcall(self) -> None:
        """In root mode it calls an SMM monitor, which we lack: always an error."""
        self._admit("VMCALL")
        self._fail("VMCALL", VmError.VMCALL_IN_ROOT)

    def rdmsr(self, number: int) -> int:
        value = self._msr(number)
        if value is None:
            self._fault("RDMSR", GP, f"no MSR {number:#x}")
        self._retire("RDMSR", (number, value), "")
        return value

    def _msr(self, number: int) -> int | None:
        if number == MSR_TSC:
            return self.tsc
        if number == MSR_FEATURE_CONTROL:
            return self.feature_control
        return msrs.read_msr(self.state, number)

    def wrmsr(self, number: int, value: int) -> None:
        if not msrs.write_msr(self.state, number, value):
            self._fault("WRMSR", GP, f"MSR {number:#x} cannot be {value:#x}")
        self._retire("WRMSR", (number, value), "")

    # --- How an instruction ends (§30.2) ---

    def _current(self, name: str) -> Vmcs:
        self._admit(name)
        vmcs = self.current
        if vmcs is None:
            self._fail(name, None)
        return vmcs

    def _admit(self, name: str) -> None:
        """The checks that all VMX instructions but VMXON begin with."""
        if self.mode is not Mode.ROOT:
            if self.mode is Mode.NON_ROOT:
                raise VmxMisuse(f"{name}: pCPU {self.id} is in non-root mode: the guest runs")
            self._fault(name, UD, "the processor is not in VMX operation")
        self._check_mode(name)
        if self.state.ss.dpl:  # which is the CPL, in protected mode
            self._fault(name, GP, "CPL is not 0")

    def _check_mode(self, name: str) -> None:
        state = self.state
        if not state.cr0 & CR0_PE or state.rflags & RFLAGS_VM:
            self._fault(name, UD, "not in protected mode")
        if state.efer & EFER_LMA and not state.cs.rights & CODE_64:
            self._fault(name, UD, "compatibility mode")

    def _succeed(self, name: str, *operands: int) -> None:
        self.state.rflags &= ~_RESULT_FLAGS
        self._retire(name, operands, "VMsucceed")

    def _fail(self, name: str, error: VmError | None, *operands: int, why: str = "") -> NoReturn:
        """VMfail(error): invalid if there is no current VMCS to take the number."""
        state, vmcs = self.state, self.current
        state.rflags &= ~_RESULT_FLAGS
        if vmcs is None or error is None:
            error = None
            state.rflags |= _CF
        else:
            vmcs.set_instruction_error(error)
            state.rflags |= _ZF
        fail = VmFail(name, error, why)
        self.statistics.failures += 1
        self._retire(name, operands, str(fail))
        raise fail

    def _fault(self, name: str, vector: int, why: str) -> NoReturn:
        fault = CpuFault(name, vector, why)
        self._retire(name, (), str(fault))
        raise fault

    def _retire(self, name: str, operands: tuple[int, ...], result: str) -> None:
        self.tsc += ROOT_TIME
        self.statistics.instructions += 1
        if self.trace is not None:
            self.trace(TraceEvent(self.tsc, self.id, self.mode, name, operands, result))


def state_at_boot() -> CpuState:
    """As an operating system would find it: ring 0 of 64-bit mode, paging on, nothing of VMX."""
    flat = Segment(selector=0x10, base=0, limit=0xFFFF_FFFF, rights=RIGHTS_DATA32)
    return CpuState(
        cr0=CR0_PE | CR0_NE | CR0_PG | CR0_ET,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA | EFER_NXE,
        cs=Segment(selector=8, base=0, limit=0xFFFF_FFFF, rights=RIGHTS_CODE64),
        ss=flat,
        ds=flat,
        es=flat,
    )
