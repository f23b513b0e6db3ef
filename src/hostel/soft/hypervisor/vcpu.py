"""A vCPU: its VMCS and the life of it, in the steps of the manual (SDM vol. 3C §31.5, §31.6).

::

    VMXON              each pCPU, once                                       host.py
    VMCLEAR, VMPTRLD   bind the VMCS to a pCPU                               load
    VMWRITE …          what to intercept, the host's state, the guest's      setup.py, guest_state.py
    VMLAUNCH           the first entry after VMCLEAR ──┐
    VM exit            why? one handler a reason     ◄─┤                     exits.py
    VMRESUME           every further one             ──┘
    VMCLEAR            unbind: to another pCPU, or for good                  unload
    VMXOFF             each pCPU, at the end

Belongs to who holds the machine's turn; nothing here locks. Between ``load`` and ``unload`` what VMX does
not switch (general registers but RSP, CR2, DR0–3, the FPU …) is in the pCPU as long as no other vCPU is
loaded there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from hostel.hypervisor import Exit, MmioExit, PioExit, ShutdownExit
from hostel.soft.cpuid import Cpuid
from hostel.soft.exceptions import PF, TripleFault, combine, fault
from hostel.soft.paging.virtualizer import Registers, Scope
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.silicon import Event, PageFault, Reason, VmExit
from hostel.soft.state import BLOCKED_BY_MOV_SS, BLOCKED_BY_STI, RFLAGS_IF, RSP, CpuState
from hostel.soft.vmx.capabilities import EntryControl
from hostel.soft.vmx.fields import Field

from . import control_registers, exits, guest_state, inject, setup
from .inject import Activity

if TYPE_CHECKING:
    from .machine import SoftMachine

_U64 = (1 << 64) - 1
_INVVPID_ADDRESS, _INVVPID_CONTEXT, _INVVPID_RETAIN_GLOBALS, _INVEPT_CONTEXT = 0, 1, 3, 1


class SoftVcpu:
    """Made by ``SoftMachine.add_vcpu``. ``close`` gives its VMCS back."""

    def __init__(self, machine: SoftMachine, id: int) -> None:
        self.machine = machine
        self.id = id
        self.lapic = machine.irqchip.add(id)
        self.paging = machine.paging.vcpu()
        self.cpuid = Cpuid([])
        self.activity = Activity.WAITS_FOR_SIPI if id else Activity.RUNNING
        self.halted_open = False
        """Whether it halted with interrupts enabled."""
        self.pauses = False
        """It came out because it spins: another vCPU had better run."""
        self.exits: Counter[Reason] = Counter()
        self.migrations = 0
        self.instructions = 0
        self.vpid = machine.host.next_vpid()
        self.vmcs = machine.host.make_vmcs()
        self.pcpu: PhysicalCpu | None = None
        """Where the VMCS is active."""
        self._was_on: PhysicalCpu | None = None
        self.state = CpuState()
        """What VMX does not switch; while this vCPU is loaded, the pCPU's own."""
        self.event: Event | None = None
        """To be injected at the next entry."""
        self.primary = 0
        """The primary controls as they are in the VMCS."""
        self.launched = False
        self._fpu = machine.host.fresh_fpu
        self._has_vmcs = False
        self._finish: Callable[[bytes], Exit | None] | None = None
        self._answer = memoryview(b"")
        self._view = CpuState()
        self._view_is_good = False

    # --- Binding to a pCPU ---

    def load(self, pcpu: PhysicalCpu) -> None:
        """Make this vCPU's VMCS the pCPU's current one, and its registers the pCPU's."""
        loaded = self.machine.host.loaded
        if loaded.get(pcpu.id) is self:
            return
        if self.pcpu is not None and self.pcpu is not pcpu:
            self.unload()
            self.migrations += 1
        if (other := loaded.get(pcpu.id)) is not None:
            other._save_registers()
        if self.pcpu is None:
            pcpu.vmclear(self.vmcs)
            self.launched = False
        pcpu.vmptrld(self.vmcs)
        if pcpu is not self._was_on:
            # What this pCPU still holds of it, it has itself made invalid elsewhere (SDM vol. 3C §28.3.3.3).
            pcpu.invvpid(_INVVPID_CONTEXT, self.vpid)
        self.pcpu = self._was_on = pcpu
        loaded[pcpu.id] = self
        self._load_registers(pcpu)
        if not self._has_vmcs:
            self._has_vmcs = True
            setup.write_controls(self)
            self.import_state(CpuState(msrs=dict(self.state.msrs)))

    def unload(self) -> None:
        """VMCLEAR: from here on any pCPU may load it."""
        pcpu = self.pcpu
        if pcpu is None:
            return
        loaded = self.machine.host.loaded
        if loaded.get(pcpu.id) is self:
            self._save_registers()
            del loaded[pcpu.id]
        pcpu.vmclear(self.vmcs)
        self.pcpu = None

    def _save_registers(self) -> None:
        assert self.pcpu is not None
        self._fpu = self.pcpu.core.save_fpu()
        self.state = CpuState()
        _copy_unswitched(self.pcpu.state, self.state)

    def _load_registers(self, pcpu: PhysicalCpu) -> None:
        _copy_unswitched(self.state, pcpu.state)
        self.state = pcpu.state
        pcpu.core.load_fpu(self._fpu)

    def close(self) -> None:
        self.unload()
        self.paging.close()
        self.machine.host.free_vmcs(self.vmcs)

    # --- Fields and registers ---

    def read(self, field: int) -> int:
        assert self.pcpu is not None
        return self.pcpu.vmread(field)

    def write(self, field: int, value: int) -> None:
        assert self.pcpu is not None
        self.pcpu.vmwrite(field, value)

    def register(self, number: int) -> int:
        return self.read(Field.GUEST_RSP) if number == RSP else self.state.gpr[number]

    def set_register(self, number: int, value: int) -> None:
        if number == RSP:
            self.write(Field.GUEST_RSP, value & _U64)
        else:
            self.state.gpr[number] = value & _U64

    @property
    def cr8(self) -> int:
        """The local APIC's TPR by another name (SDM vol. 3A §10.8.6.1)."""
        return self.lapic.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.lapic.tpr = value << 4

    def translation_state(self) -> CpuState:
        """What the walkers need of the last exit's state. Valid until the next entry."""
        if not self._view_is_good:
            guest_state.load_translation(self._view, self.read)
            self._view_is_good = True
        return self._view

    def forget_translation_state(self) -> None:
        """A handler has changed it."""
        self._view_is_good = False

    def full_state(self) -> CpuState:
        """The processor's real state at the last exit."""
        state = CpuState()
        _copy_unswitched(self.state, state)
        guest_state.load(state, self.read)
        return state

    def export_state(self) -> CpuState:
        """As the guest believes it is."""
        state = self.full_state()
        believed = control_registers.guest(self)
        state.cr0, state.cr3, state.cr4 = believed.cr0, believed.cr3, believed.cr4
        state.efer, state.cr8 = believed.efer, self.cr8
        return state

    def import_state(self, state: CpuState) -> None:
        """As the guest shall believe it is."""
        _copy_unswitched(state, self.state)
        guest_state.store(state, self.write)
        self._view_is_good = False
        self.cr8 = state.cr8
        wanted = Registers(state.cr0, state.cr3, state.cr4, state.efer)
        control_registers.load(self, wanted)

    def set_long_mode(self, long: bool) -> None:
        """The "IA-32e mode guest" entry control follows EFER.LMA (SDM vol. 3C §26.2.1.3)."""
        controls = self.read(Field.ENTRY_CONTROLS)
        wanted = controls & ~EntryControl.GUEST_64 | (EntryControl.GUEST_64 if long else 0)
        if wanted != controls:
            self.write(Field.ENTRY_CONTROLS, wanted)

    # --- What handlers do ---

    def skip(self, exit: VmExit) -> None:
        """Behind the instruction."""
        rip = self.read(Field.GUEST_RIP) + exit.length
        if rip >> 32 and not self.in_long_mode():
            rip &= 0xFFFF_FFFF
        self.write(Field.GUEST_RIP, rip & _U64)
        self.end_shadow()

    def end_shadow(self) -> None:
        """Of STI or MOV SS: an instruction was carried out (SDM vol. 3C §24.4.2)."""
        blocked = self.read(Field.GUEST_INTERRUPTIBILITY)
        if blocked & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS):
            cleared = blocked & ~(BLOCKED_BY_STI | BLOCKED_BY_MOV_SS)
            self.write(Field.GUEST_INTERRUPTIBILITY, cleared)

    def in_long_mode(self) -> bool:
        return bool(self.read(Field.ENTRY_CONTROLS) & EntryControl.GUEST_64)

    def inject(self, event: Event) -> None:
        """An exception, which may meet the event that was being delivered."""
        self.event = combine(self.event, event)

    def inject_page_fault(self, error: PageFault) -> None:
        self.state.cr2 = error.address
        self.inject(fault(PF, error.code))

    def halt(self) -> None:
        self.activity = Activity.HALTED
        self.halted_open = bool(self.read(Field.GUEST_RFLAGS) & RFLAGS_IF)

    def ask_pio(
        self, port: int, size: int, count: int, finish: Callable[[bytes], Exit | None]
    ) -> Exit:
        """A read for the monitor to answer. ``finish`` gets the answer before the next entry."""
        self._answer, self._finish = memoryview(bytearray(size * count)), finish
        return PioExit(port, size, count, False, self._answer)

    def ask_mmio(self, gpa: int, size: int, finish: Callable[[bytes], Exit | None]) -> Exit:
        self._answer, self._finish = memoryview(bytearray(size)), finish
        return MmioExit(gpa, False, self._answer)

    def then(self, finish: Callable[[bytes], Exit | None]) -> None:
        """To be called before the next entry: there is more to do for this instruction."""
        self._answer, self._finish = memoryview(b""), finish

    # --- Running ---

    @property
    def idle(self) -> bool:
        """Halted, or waiting to be started, with nothing to wake it."""
        return inject.idle(self)

    def run(self, pcpu: PhysicalCpu, budget: int) -> Exit | None:
        """Enter the guest until something is the monitor's to answer (an ``Exit``), the vCPU is idle, the
        machine wants attention, or ``budget`` guest instructions are over (None)."""
        self.load(pcpu)
        machine, end = self.machine, pcpu.tsc + budget
        self.pauses = False
        try:
            while True:
                if (exit := self._complete()) is not None:
                    return exit
                machine.tick(pcpu.tsc)
                if pcpu.tsc >= end or self.pauses or machine.attention or not inject.wake(self):
                    return None
                if (exit := self._enter(pcpu, machine.limit(pcpu.tsc, end))) is not None:
                    return exit
        except TripleFault:
            return ShutdownExit()

    def _complete(self) -> Exit | None:
        """Give the monitor's answer to the instruction that asked."""
        while (finish := self._finish) is not None:
            self._finish = None
            if (exit := finish(bytes(self._answer))) is not None:
                return exit
        return None

    def _enter(self, pcpu: PhysicalCpu, limit: int) -> Exit | None:
        """VMLAUNCH or VMRESUME, to the next VM exit and its handler."""
        inject.before_entry(self)
        self._flush(pcpu)
        self._view_is_good = False
        pcpu.vmwrite(Field.PREEMPTION_TIMER, min(limit, 0xFFFF_FFFF))
        before = pcpu.core.statistics.instructions
        if self.launched:
            exit = pcpu.vmresume()
        else:
            exit = pcpu.vmlaunch()
            self.launched = True
        self.instructions += pcpu.core.statistics.instructions - before
        self.exits[exit.reason] += 1
        self.event = exit.vectoring
        """Its delivery was broken off: it comes again (SDM vol. 3C §31.7.1.2), unless a fault replaces it."""
        return exits.dispatch(self, exit)

    def _flush(self, pcpu: PhysicalCpu) -> None:
        """What the paging room wants forgotten, of this vCPU's tags."""
        while (flush := self.paging.take_flush()) is not None:
            for address in flush.addresses:
                pcpu.invvpid(_INVVPID_ADDRESS, self.vpid, address)
            match flush.scope:
                case Scope.RETAIN_GLOBALS:
                    pcpu.invvpid(_INVVPID_RETAIN_GLOBALS, self.vpid, 0)
                case Scope.CONTEXT:
                    pcpu.invvpid(_INVVPID_CONTEXT, self.vpid, 0)
                case Scope.EPT:
                    pcpu.invept(_INVEPT_CONTEXT, self.paging.setup.ept_pointer)


def _copy_unswitched(source: CpuState, target: CpuState) -> None:
    """What neither VM entry nor VM exit touches (SDM vol. 3C §26.3.2), and software has to."""
    target.gpr, target.dr, target.msrs = source.gpr[:], source.dr[:], dict(source.msrs)
    target.cr2, target.cr8, target.xcr0, target.dr6 = (
        source.cr2,
        source.cr8,
        source.xcr0,
        source.dr6,
    )
