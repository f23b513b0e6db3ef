"""One virtual machine of the software hypervisor: its memory map, its chips, its vCPUs, its clock.

The clock is the pCPUs' time, in nanoseconds: a guest instruction is one. It stands still while the monitor
answers an exit, and is moved on while all vCPUs are idle (``tick``).

Not thread-safe: whoever runs a vCPU, or touches the chips, holds the machine's turn (``vm.py``).
"""

from __future__ import annotations

from hostel.memory import Region
from hostel.soft.eventfds import Ioeventfds
from hostel.soft.irqchip import Irqchip
from hostel.soft.paging.guest_map import GuestMap
from hostel.soft.paging.virtualizer import MemoryVirtualizer
from hostel.spec import Paging

from .host import Host
from .vcpu import SoftVcpu


class SoftMachine:
    """``close`` gives its frames back; the host lives on."""

    def __init__(self, host: Host, *, paging: Paging = "ept") -> None:
        self.host = host
        self.now = 0
        """Nanoseconds since it was made."""
        self.attention = False
        """Set to make a running vCPU come out soon; whoever set it clears it."""
        self.has_chips = True
        """Whether PICs, IOAPIC, PIT and the LAPICs' pages are there; LAPICs without them do nothing."""
        self.guest_map = GuestMap(host.physical)
        self.paging = self._virtualizer(paging)
        self.irqchip = Irqchip(lambda: self.now)
        self.ioeventfds = Ioeventfds()
        self.vcpus: list[SoftVcpu] = []
        self._slots: dict[int, int] = {}

    def _virtualizer(self, paging: Paging) -> MemoryVirtualizer:
        physical, guest_map = self.host.physical, self.guest_map
        if paging == "shadow":
            from hostel.soft.paging.shadow import ShadowPaging

            return ShadowPaging(physical, guest_map)
        from hostel.soft.paging.ept import EptPaging

        return EptPaging(physical, guest_map)

    def add_vcpu(self, id: int) -> SoftVcpu:
        self.vcpus.append(vcpu := SoftVcpu(self, id))
        return vcpu

    def map(self, slot: int, region: Region, *, read_only: bool = False) -> None:
        """Mapping a slot anew replaces it."""
        self.unmap(slot)
        span = self.host.physical.attach_region(region)
        self.guest_map.add(region.gpa, region.size, span.hpa, read_only=read_only)
        self._slots[slot] = region.gpa

    def unmap(self, slot: int) -> None:
        if (gpa := self._slots.pop(slot, None)) is not None:
            self.guest_map.remove(gpa)

    # --- Time ---

    def tick(self, time: int) -> None:
        """A pCPU's time has come to this: fire what is due. Of several pCPUs the one ahead counts."""
        self.now = max(self.now, time)
        deadline = self.irqchip.deadline
        if deadline is not None and deadline <= self.now:
            self.irqchip.fire(self.now)

    def limit(self, now: int, end: int) -> int:
        """For how many instructions a vCPU may run: to the end of its slice, or to the next timer."""
        deadline = self.irqchip.deadline
        return max(1, (end if deadline is None else min(end, deadline)) - now)

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus = []
        self.paging.close()
