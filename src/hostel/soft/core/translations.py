"""Where TLB misses are answered: by the ``Mmu``, by the window of an emulated instruction, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access, EptFault, PageFault, Translation
from hostel.soft.state import CR4_SMAP, RFLAGS_AC

from .env import EFLAGS

if TYPE_CHECKING:
    from .translate import TranslatingCore

_READ, _WRITE, _EXECUTE = 1, 2, 4


class Translations:
    def __init__(self, core: TranslatingCore) -> None:
        self._core = core
        self.refused: tuple[PageFault | EptFault, Access] | None = None
        """What stopped the engine, with the address of a page only."""
        self.at_limit = False
        """The engine wanted to fetch what it has no instructions left to execute."""
        self.implicit = False
        """The instruction being executed reads descriptor tables, as a supervisor."""

    def ask(self, address: int, access: Access, user: bool) -> Translation:
        """For accesses of the core's own; outside long mode addresses are 32 bits wide."""
        core = self._core
        if not core.state.long_mode:
            address &= 0xFFFF_FFFF
        core.statistics.fills += 1
        return core.mmu.translate(core.state, core.controls, address, access, user)

    def fill(self, page: int, kind: int) -> tuple[int, int] | None:
        """A TLB miss of the engine: (frame, rights), or None to stop at the instruction."""
        core, view, access = self._core, self._core.view, Access(kind)
        if view.making:
            return view.frames.get(page // PAGE, 0), _READ | _EXECUTE
        if access is Access.FETCH and core.engine.context.budget <= 0:
            self.at_limit = True
            return None
        device = core.window.frame(page)
        if device is not None and access is not Access.FETCH:
            return device, _READ | _WRITE
        try:
            found = self.ask(page, access, self._is_user(page))
        except (PageFault, EptFault) as refused:
            self.refused = refused, access
            return None
        rights = (_READ if found.readable else 0) | (_WRITE if found.writable else 0)
        if access is Access.FETCH:
            # Only a fetch gets the right to execute: a page that has it is slow to write to.
            view.fetch(page, found.frame)
            rights |= _EXECUTE if found.executable else 0
        return found.frame, rights

    def _is_user(self, page: int) -> bool:
        env, state = self._core.engine.env, self._core.state
        if state.cr4 & CR4_SMAP:
            state.rflags = state.rflags & ~RFLAGS_AC | env.u64[EFLAGS // 8] & RFLAGS_AC
        return env.cpl == 3 and not (self.implicit and self._is_table(page))

    def _is_table(self, page: int) -> bool:
        state = self._core.state
        return any(
            table.base < page + PAGE and page <= table.base + table.limit
            for table in (state.gdtr, state.ldtr, state.idtr, state.tr)
        )
