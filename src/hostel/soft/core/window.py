"""Pages that are not memory: a window of host-physical addresses whose accesses are answered by callbacks.

While one instruction is emulated, the pages that the hypervisor names lead here. The engine then does what
it would do with a device: it executes the instruction, any instruction, and asks for each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hostel.errors import HostError
from hostel.soft.physical import PAGE

from .engine import Engine

BASE = 1 << 39
"""HPA where no memory is."""
_PAGES = 16
"""More than one instruction can touch."""
Reader = Callable[[int, int], int]
Writer = Callable[[int, int, int], None]


class Window:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._places: dict[int, int] = {}
        self._physical: list[int] = []
        self._answers: tuple[Reader, Writer] | None = None
        engine.map_io(BASE, _PAGES * PAGE, self._read, self._write)

    def frame(self, page: int) -> int | None:
        """Where a linear page leads, if it is one of them."""
        return self._places.get(page)

    @contextmanager
    def opened(self, pages: Mapping[int, int], reader: Reader, writer: Writer) -> Iterator[None]:
        self._places = {page: BASE + PAGE * at for at, page in enumerate(list(pages)[:_PAGES])}
        self._physical = list(pages.values())
        self._answers = reader, writer
        try:
            yield
        finally:
            for page in self._places:
                self._engine.flush(page)
            self._places, self._answers = {}, None

    def _answer(self, offset: int) -> tuple[int, Reader, Writer]:
        if self._answers is None:
            raise HostError("the core reached its window outside of an emulated instruction")
        return self._physical[offset // PAGE] + offset % PAGE, *self._answers

    def _read(self, offset: int, size: int) -> int:
        gpa, reader, _ = self._answer(offset)
        return reader(gpa, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        gpa, _, writer = self._answer(offset)
        writer(gpa, size, value)
