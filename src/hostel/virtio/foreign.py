"""The memory of a machine in another process, as a vhost-user monitor shows it.

Unlike ``GuestMemory`` it is several files, or several parts of one, each mapped for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostel.errors import MemoryFault
from hostel.memory import Region, map_shared


class ForeignMemory:
    """The RAM of a machine in another process, region by region (vhost-user)."""

    def __init__(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """``Region.offset`` is that in the file ``fds`` names; ``hva`` the other process's address."""
        self.regions = tuple(regions)
        self.size = sum(region.size for region in regions)
        self._views: list[tuple[int, int, memoryview]] = []
        for region, fd in zip(regions, fds, strict=True):
            whole = map_shared(fd, region.offset + region.size)
            self._views.append((region.gpa, region.gpa + region.size, whole[region.offset :]))
        self._views.sort(key=lambda one: one[0] - one[1])  # most hits first

    def view(self, gpa: int, size: int) -> memoryview:
        """Writable, zero-copy."""
        for start, end, view in self._views:
            if start <= gpa and gpa + size <= end:
                return view[gpa - start : gpa - start + size]
        raise MemoryFault(f"guest address {gpa:#x}, {size} bytes, is outside guest memory")

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def gpa_of(self, hva: int) -> int:
        """The guest's address of what the other process knows as ``hva``."""
        for region in self.regions:
            if region.hva <= hva < region.hva + region.size:
                return region.gpa + hva - region.hva
        raise MemoryFault(f"{hva:#x} is not in the machine's memory")
