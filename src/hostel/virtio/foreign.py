"""The memory of a machine in another process, as a vhost-user VMM shows it.

Unlike ``GuestMemory`` it is any number of files and parts of them, and may be shown anew while rings
run: a view that was taken stays the bytes that it was, of a mapping that lives as long as its views.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from hostel.errors import HostError, MemoryFault
from hostel.memory import Region, map_shared


class ForeignMemory:
    """The RAM of a machine in another process, region by region (``memory.Memory``)."""

    regions: tuple[Region, ...]

    def __init__(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        self.show(regions, fds)

    def show(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """These from now on. ``Region.offset`` is that in its file, ``hva`` the other process's address.

        ``fds``, one for each region, stay the caller's.
        """
        files: dict[tuple[int, int], memoryview] = {}
        spans = []
        for region, fd in zip(regions, fds, strict=True):
            found = os.fstat(fd)
            if region.offset + region.size > found.st_size:
                raise HostError("a region of guest memory behind the end of its file")
            identity = found.st_dev, found.st_ino
            if identity not in files:  # whole: huge pages are not mapped by parts
                files[identity] = map_shared(fd, found.st_size)
            view = files[identity][region.offset : region.offset + region.size]
            spans.append((region.gpa, region.gpa + region.size, view))
        spans.sort(key=lambda one: one[0] - one[1])  # most hits first
        self.regions, self._spans = tuple(regions), spans

    def view(self, gpa: int, size: int) -> memoryview:
        """Writable, zero-copy."""
        for start, end, view in self._spans:
            if start <= gpa <= gpa + size <= end:
                return view[gpa - start : gpa - start + size]
        raise MemoryFault(f"guest address {gpa:#x}, {size} bytes, is outside guest memory")

    def views(self, gpas: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        return list(map(self.view, gpas, sizes))

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def gpa_of(self, hva: int) -> int:
        """The guest's address of what the other process knows as ``hva``."""
        for region in self.regions:
            if region.hva <= hva < region.hva + region.size:
                return region.gpa + hva - region.hva
        raise MemoryFault(f"{hva:#x} is not in the machine's memory")
