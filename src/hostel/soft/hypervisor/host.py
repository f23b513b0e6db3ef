"""The physical machine that the hypervisor runs on: memory, pCPUs in VMX operation, who is loaded where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.errors import HostError
from hostel.soft.paging.mmu import PagingMmu
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Core
from hostel.soft.state import CR4_VMXE
from hostel.soft.vmx.capabilities import REVISION
from hostel.soft.vmx.operation import Package
from hostel.spec import Trap

from . import msrs

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

HOST_TSS = 0x18
LAST_VPID = 0xFFFF


class Host:
    """A context manager. Close the machines on it first."""

    def __init__(self, pcpus: int = 1, *, trap: Trap = "translate", frames: int = 16384) -> None:
        self.trap = trap
        self.physical = PhysicalMemory(frames)
        self.package = Package(self.physical)
        self.loaded: dict[int, SoftVcpu] = {}
        """Whose registers are in each pCPU."""
        self.msr_bitmap = self.physical.allocate()
        self.physical.write(self.msr_bitmap, msrs.bitmap())
        self._last_vpid = 0
        self.fresh_fpu = b""
        """As a core has it that has run nothing: what a new vCPU finds."""
        self.pcpus: list[PhysicalCpu] = []
        try:
            for number in range(pcpus):
                self.pcpus.append(self._make_pcpu(number))
        except BaseException:
            self.close()
            raise

    def _make_pcpu(self, number: int) -> PhysicalCpu:
        mmu = PagingMmu(self.physical)
        core = self._make_core(mmu)
        self.fresh_fpu = core.save_fpu()
        pcpu = PhysicalCpu(number, self.package, core, mmu)
        pcpu.state.tr.selector = HOST_TSS  # LTR: a VM exit has to load one (SDM vol. 3C §26.2.3)
        pcpu.state.cr4 |= CR4_VMXE  # SDM vol. 3C §23.7: else VMXON is #UD
        pcpu.vmxon(self._region())
        return pcpu

    def _make_core(self, mmu: PagingMmu) -> Core:
        if self.trap == "intercept":
            from hostel.soft.core.checked import CheckedCore

            return CheckedCore(self.physical)
        from hostel.soft.core.translate import TranslatingCore

        return TranslatingCore(self.physical, mmu)

    def _region(self) -> int:
        """A frame that says which VMCS layout it is for (SDM vol. 3C §24.2)."""
        frame = self.physical.allocate()
        self.physical.write_u32(frame, REVISION)
        return frame

    def make_vmcs(self) -> int:
        return self._region()

    def free_vmcs(self, hpa: int) -> None:
        self.physical.free(hpa)

    def next_vpid(self) -> int:
        """Each vCPU has one of its own as long as the host runs: no other's translations are ever its."""
        if self._last_vpid == LAST_VPID:
            raise HostError("all 65535 VPIDs are given: make a new host")
        self._last_vpid += 1
        return self._last_vpid

    def close(self) -> None:
        for pcpu in self.pcpus:
            pcpu.vmxoff()
            pcpu.core.close()
        self.pcpus = []
        self.physical.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
