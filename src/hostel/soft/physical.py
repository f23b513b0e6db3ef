"""Host-physical memory (HPA): what the simulated machine's memory bus reaches.

::

    HPA 0 ......... frames of our own: VMCS regions, EPT, shadow tables, bitmaps (a 4 KiB frame each)
    4 GiB ......... RAM of the first machine, 1 GiB-aligned; then of the next …

All of it is real memory of this process: a table in a frame can be read as bytes, by Python and by a
core that walks tables by itself. The cores map every ``Span`` at its HPA.

An address that is in no span raises ``MemoryFault``: who walks tables that a guest made checks it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from ctypes import c_char
from struct import Struct

import msgspec

from hostel.errors import HostError, MemoryFault
from hostel.memory import GuestMemory, Region

PAGE = 4096
RAM_BASE = 4 << 30
_GIB = 1 << 30
_U32, _U64 = Struct("<I"), Struct("<Q")


class Span(msgspec.Struct, frozen=True):
    """Bytes that a core maps: ``size`` of them at ``hpa``, here at ``hva``."""

    hpa: int
    size: int
    hva: int


class PhysicalMemory:
    """A context manager; close it after the cores that map it."""

    def __init__(self, frames: int = 16384) -> None:
        self._pool = GuestMemory(frames * PAGE)
        self.spans: list[Span] = []
        self.on_span: list[Callable[[Span], None]] = []
        """Called with each new span: a core maps it."""
        self._starts: list[int] = []
        self._views: list[tuple[int, memoryview]] = []
        self._free = list(range((frames - 1) * PAGE, 0, -PAGE))
        """Frame 0 is never given: a root of 0 is a mistake that should show."""
        self._next = RAM_BASE
        self._add(Span(0, frames * PAGE, self._pool.hva(0)), self._pool.view(0, frames * PAGE))

    def attach(self, memory: GuestMemory) -> list[Span]:
        """Give a machine's RAM its place: one span a region, each at an HPA of its own."""
        spans = []
        for region in memory.regions:
            span = Span(self._next, region.size, region.hva)
            self._next += -(-region.size // _GIB) * _GIB
            self._add(span, memory.view(region.gpa, region.size))
            spans.append(span)
        return spans

    def attach_region(self, region: Region) -> Span:
        """The same for bytes that are mapped already, whose owner keeps them so for as long as we are."""
        span = Span(self._next, region.size, region.hva)
        self._next += -(-region.size // _GIB) * _GIB
        array = (c_char * region.size).from_address(region.hva)
        self._add(span, memoryview(array).cast("B"))
        return span

    def _add(self, span: Span, view: memoryview) -> None:
        self._starts.append(span.hpa)
        self._views.append((span.hpa, view))
        self.spans.append(span)
        for tell in self.on_span:
            tell(span)

    # --- Frames ---

    @property
    def frames_used(self) -> int:
        return self.spans[0].size // PAGE - 1 - len(self._free)

    def allocate(self) -> int:
        """The HPA of a zeroed frame."""
        if not self._free:
            raise HostError(
                "the software hypervisor is out of frames for its tables",
                cure="give PhysicalMemory more frames",
            )
        frame = self._free.pop()
        self.view(frame, PAGE)[:] = bytes(PAGE)
        return frame

    def free(self, frame: int) -> None:
        self._free.append(frame)

    # --- Access ---

    def view(self, hpa: int, size: int) -> memoryview:
        """Writable, zero-copy; within one span."""
        at = bisect_right(self._starts, hpa) - 1
        if at >= 0:
            base, view = self._views[at]
            if hpa - base + size <= len(view):
                return view[hpa - base : hpa - base + size]
        raise MemoryFault(f"host-physical address {hpa:#x}, {size} bytes, is not memory")

    def read(self, hpa: int, size: int) -> bytes:
        return bytes(self.view(hpa, size))

    def write(self, hpa: int, data: bytes) -> None:
        self.view(hpa, len(data))[:] = data

    def read_u32(self, hpa: int) -> int:
        value: int = _U32.unpack(self.view(hpa, 4))[0]
        return value

    def read_u64(self, hpa: int) -> int:
        """Walks are made of these: a view less than ``view`` makes."""
        at = bisect_right(self._starts, hpa) - 1
        if at >= 0:
            base, view = self._views[at]
            if hpa - base + 8 <= len(view):
                value: int = _U64.unpack_from(view, hpa - base)[0]
                return value
        raise MemoryFault(f"host-physical address {hpa:#x}, 8 bytes, is not memory")

    def write_u32(self, hpa: int, value: int) -> None:
        _U32.pack_into(self.view(hpa, 4), 0, value)

    def write_u64(self, hpa: int, value: int) -> None:
        _U64.pack_into(self.view(hpa, 8), 0, value)

    def close(self) -> None:
        self._views.clear()
        self._starts.clear()
        self._pool.close()

    def __enter__(self) -> PhysicalMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
