"""The guest's memory as software walks it: to explain what the core's own walk met, or where it made none."""

from __future__ import annotations

from hostel.soft.paging.nested import FINAL, LINEAR_VALID, EptMemory, EptPage, EptWalker
from hostel.soft.paging.walk import Asked, walk
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Access, Controls, Secondary
from hostel.soft.state import CpuState

_EPT = int(Secondary.EPT)
_SUPERVISOR = Asked(Access.READ, False, True)


class GuestView:
    """At one linear address."""

    def __init__(
        self, physical: PhysicalMemory, state: CpuState, controls: Controls, linear: int
    ) -> None:
        self._physical, self._state, self._controls = physical, state, controls
        self._linear = linear
        self._walker = EptWalker(physical, controls.ept_pointer, linear)

    def nested_page(self, gpa: int, ask: Asked, *, writes: bool) -> EptPage:
        """The EPT's page of ``gpa``, which QEMU has met on its walk and found no NPT entry for.

        First all is walked as VMX would: its faults come first, in its order, with its qualification. QEMU
        wants each guest table to be writable, so ``writes`` may be more than what the access asks for.
        """
        final = self._final(ask, self._linear)
        access = Access.WRITE if writes else ask.access
        page = self._walker.translate(gpa, access, LINEAR_VALID | (FINAL if final == gpa else 0))
        self._physical.view(page.address & -PAGE, PAGE)
        return page

    def _final(self, ask: Asked, linear: int) -> int:
        """The GPA that a linear address leads to, and may be accessed at."""
        page = walk(EptMemory(self._walker), self._state, linear, ask)
        self._walker.translate(page.address, ask.access, LINEAR_VALID | FINAL)
        return page.address

    def read(self, size: int) -> bytes:
        """As a supervisor, across pages."""
        data = b""
        while len(data) < size:
            at = self._linear + len(data)
            data += self._physical.read(
                self._hpa(at), min(size - len(data), PAGE - (at & PAGE - 1))
            )
        return data

    def _hpa(self, linear: int) -> int:
        if self._controls.secondary & _EPT:
            gpa = self._final(_SUPERVISOR, linear)
            return self._walker.translate(gpa, Access.READ, LINEAR_VALID | FINAL).address
        return walk(self._physical, self._state, linear, _SUPERVISOR).address
