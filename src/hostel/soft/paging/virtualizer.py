"""Memory virtualization as the hypervisor's exit handlers see it: shadow or EPT behind one interface.

::

    MemoryVirtualizer   one a machine: EptPaging(physical, guest_map) or ShadowPaging(physical, guest_map)
      └─ vcpu()         VcpuPaging, one a vCPU: told of every paging event, says what to do

How a hypervisor uses it:

- Before the first entry: put ``setup`` into the VMCS's controls (OR it with what else is wanted), then
  ``real = paging.load(Registers(…))`` and write ``real`` into the guest-state area.
- A MOV to CR0, CR3 or CR4, or a WRMSR of EFER that exits: check it as the manual has it, then
  ``real = paging.load(new)`` with what the *guest* wants to have there, write ``real`` into the
  guest-state area and the wanted values into the read shadows. ``paging.guest(state)`` is what the guest
  believes: a MOV from CR3 and a RDMSR of EFER that exit are answered from it.
- #PF, EPT violation, INVLPG: call the method of that name and obey the ``Verdict``.
- Before *every* entry: ``paging.take_flush()``, and execute what it says with INVVPID or INVEPT.
  Another vCPU's handler may have asked for it (with hardware: an IPI).
- After emulating a write to guest memory: ``paging.wrote(gpa, size)``.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

from hostel.soft.silicon import Access
from hostel.soft.state import CR0_PG, EFER_LMA, EFER_LME, CpuState

from .guest_map import GuestMap


class Registers(msgspec.Struct, frozen=True):
    """The registers that decide how linear addresses are translated."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    def settled(self) -> Registers:
        """EFER.LMA is not the software's to set: it is LME once paging is on (SDM vol. 3A §4.1.1)."""
        active = self.efer & EFER_LME and self.cr0 & CR0_PG
        efer = self.efer | EFER_LMA if active else self.efer & ~EFER_LMA
        return self if efer == self.efer else Registers(self.cr0, self.cr3, self.cr4, efer)


class Setup(msgspec.Struct, frozen=True):
    """What this way of virtualizing memory needs to intercept: bits of the VMCS's controls."""

    primary: int = 0
    secondary: int = 0
    exception_bitmap: int = 0
    cr0_mask: int = 0
    """Bits that the hypervisor owns: a guest's write to one that differs from the shadow exits."""
    cr4_mask: int = 0
    ept_pointer: int = 0
    """The EPTP; of an NPT the plain address of its root (nCR3)."""


class Do(Enum):
    RETRY = "retry"
    """It is mended: enter again at the same instruction."""
    REFLECT = "reflect"
    """It is the guest's own fault: inject #PF with ``Verdict.code``, CR2 = the linear address."""
    EMULATE = "emulate"
    """No entry can do it: emulate this one instruction. Its access is to ``Verdict.gpa``, which is no
    memory (MMIO), or memory that may not be written as the instruction does (ROM, a page that only
    CR0.WP=0 lets a supervisor write). Every access by ``translate``, then by the guest map."""


class Verdict(NamedTuple):
    do: Do
    gpa: int = 0
    code: int = 0


RETRY = Verdict(Do.RETRY)


class Scope(Enum):
    """What to forget, as INVVPID and INVEPT have it (SDM vol. 3C §30.3)."""

    ADDRESSES = "addresses"
    """INVVPID type 0, for each of ``Flush.addresses``."""
    RETAIN_GLOBALS = "retain globals"
    """INVVPID type 3."""
    CONTEXT = "context"
    """INVVPID type 1."""
    EPT = "ept"
    """INVEPT type 1, for this machine's EPT pointer."""


class Flush(NamedTuple):
    scope: Scope
    addresses: tuple[int, ...] = ()
    """Also with ``RETAIN_GLOBALS``: global pages that changed."""


class FlushQueue:
    """What one vCPU's TLB has to forget before its next entry: never less than was asked for."""

    LIMIT = 16
    """More addresses than these are no cheaper than all."""

    def __init__(self) -> None:
        self._scope: Scope | None = None
        self._addresses: dict[int, None] = {}

    def address(self, address: int) -> None:
        if self._scope in (Scope.CONTEXT, Scope.EPT):
            return
        self._addresses[address] = None
        if len(self._addresses) > self.LIMIT:
            self.all(Scope.CONTEXT)

    def all(self, scope: Scope) -> None:
        if self._scope is None or _STRENGTH.index(scope) > _STRENGTH.index(self._scope):
            self._scope = scope
        if self._scope is not Scope.RETAIN_GLOBALS:
            self._addresses.clear()

    def take(self) -> Flush | None:
        scope, addresses = self._scope, tuple(self._addresses)
        self._scope = None
        self._addresses.clear()
        if scope is None:
            return Flush(Scope.ADDRESSES, addresses) if addresses else None
        return Flush(scope, addresses)


_STRENGTH = (Scope.RETAIN_GLOBALS, Scope.CONTEXT, Scope.EPT)


class PagingStatistics(msgspec.Struct):
    """Counted for one machine since it was made."""

    cr3_loads: int = 0
    """Loads of CR3 that exit, and of what else bears on paging (CR0, CR4, EFER)."""
    invlpgs: int = 0
    page_faults: int = 0
    """#PF exits (shadow)."""
    reflected: int = 0
    """of these the guest's own."""
    violations: int = 0
    """EPT violations."""
    emulated: int = 0
    """Verdicts EMULATE."""
    fills: int = 0
    """Leaf entries made, in a shadow or an EPT."""
    syncs: int = 0
    """Guest tables that were compared again with their shadows."""
    table_writes: int = 0
    """Write-protected guest tables that were written: they are out of sync until the next flush."""
    zapped: int = 0
    """Entries taken away because what they were made from changed."""
    recycled: int = 0
    """Shadows thrown away for another."""
    shadows: int = 0
    """Address spaces that have a shadow now."""
    frames: int = 0
    """Page-table memory now: frames of 4 KiB."""


class VcpuPaging(Protocol):
    setup: Setup

    def guest(self, state: CpuState) -> Registers:
        """What the guest believes is in its registers. ``state``: as the last exit saved it."""

    def load(self, wanted: Registers) -> Registers:
        """The guest loads these: CR0, CR3, CR4, EFER. Returns what goes into the guest-state area."""

    def on_page_fault(self, state: CpuState, address: int, code: int) -> Verdict: ...
    def on_ept_violation(
        self, state: CpuState, gpa: int, qualification: int, linear: int
    ) -> Verdict: ...
    def on_invlpg(self, address: int) -> None: ...

    def translate(self, state: CpuState, address: int, access: Access, user: bool) -> int:
        """The GPA of a linear address, for an emulated access: ``PageFault`` if the guest's tables
        forbid it. Sets accessed and dirty bits as the access itself would."""

    def wrote(self, gpa: int, size: int) -> None:
        """Guest memory was written for the guest: if there is a table, its shadows are out of date."""

    def take_flush(self) -> Flush | None: ...
    def close(self) -> None:
        """The vCPU is gone."""


class MemoryVirtualizer(Protocol):
    guest_map: GuestMap
    statistics: PagingStatistics

    def vcpu(self) -> VcpuPaging: ...
    def close(self) -> None:
        """Give all frames back."""
