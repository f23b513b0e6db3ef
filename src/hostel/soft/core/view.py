"""The split view of code: what is fetched, and what of it was replaced.

*In time, not in space.* A block is scanned when it first runs. If an instruction in it is sensitive, the
block is translated again with an INT3 in that place, and memory is put back at once: what is fetched
differs from what is read only while the translator looks. So reads of code see the original, each block
has a reading of its own (bytes may be code in two ways), and the translator tracks stores to code as ever.
"""

from __future__ import annotations

from hostel.errors import HostError
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import CoreStatistics

from .counter import Block
from .engine import Engine
from .env import bits_of, segmented
from .scan import Scanner

INT3 = b"\xcc"


class SplitView:
    def __init__(
        self, physical: PhysicalMemory, scanner: Scanner, statistics: CoreStatistics
    ) -> None:
        self._physical = physical
        self._scanner = scanner
        self.frames: dict[int, int] = {}
        """Pages that code was fetched from: page number, and frame."""
        self.fetched: set[int] = set()
        """Frames that blocks may have been translated from."""
        self.making = False
        """The translator looks at memory with INT3s in it."""
        self._statistics = statistics
        self._made: set[int] = set()
        self._request: tuple[Block, int] | None = None

    def fetch(self, address: int, frame: int) -> None:
        self.frames[address // PAGE] = frame
        self.fetched.add(frame)

    def code(self, address: int, size: int) -> bytes:
        """Bytes of code as they are in memory, from the frames that they were fetched from."""
        offset = address % PAGE
        frame = self.frames.get(address // PAGE)
        if frame is None:
            return b""
        count = min(size, PAGE - offset)
        part = self._physical.read(frame + offset, count)
        return part if count == size else part + self.code(address + count, size - count)

    def meet(self, block: Block) -> bool:
        """A block runs for the first time: has it to be made anew?"""
        if block.length == 1 or block.address in self._made:
            return False
        self._statistics.blocks_scanned += 1
        code = self.code(block.pc, block.size)
        if len(code) != block.size:
            raise HostError(f"a block at {block.pc:#x} comes from a page that was not fetched")
        flags = block.flags
        found = self._scanner.first_sensitive(
            code, bits_of(flags), flags & 3 == 3, segmented(flags)
        )
        if found is None:
            return False
        self._request = block, found
        return True

    def make(self, engine: Engine) -> None:
        """The block again, with an INT3 where its first sensitive instruction begins."""
        if self._request is None:
            return
        (block, offset), self._request = self._request, None
        at = block.pc + offset
        byte = self._physical.view(self.frames[at // PAGE] + at % PAGE, 1)
        original = bytes(byte)
        self.making = True
        try:
            byte[:] = INT3
            self._made.add(engine.retranslate(block))
        finally:
            byte[:] = original
            self.making = False

    def forget_blocks(self) -> None:
        self._made.clear()
        self.fetched.clear()
        self.fetched.update(self.frames.values())
