"""Where TLB misses are answered: by the ``Mmu``, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.errors import HostError, MemoryFault
from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access, EptFault, PageFault, Translation
from hostel.soft.state import CR4_SMAP, RFLAGS_AC

from .coherence import Coherence
from .env import EFLAGS
from .flags import HF_CS64

if TYPE_CHECKING:
    from .translate import TranslatingCore

_READ, _WRITE, _EXECUTE = 1, 2, 4


class NotCanonical(Exception):
    """No linear address of 48 bits (SDM vol. 1 §3.3.7.1)."""


Refusal = PageFault | EptFault | NotCanonical


class Translations:
    def __init__(self, core: TranslatingCore) -> None:
        self._core = core
        self.refused: tuple[Refusal, Access] | None = None
        """What stopped the engine, with the address of a page only."""
        self.at_limit = False
        """The engine wanted to fetch what it has no instructions left to execute."""
        self._writable: dict[int, set[int]] = {}
        """Frames, and the pages through which the engine may write them."""
        self.coherence = Coherence(core.physical, self)
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
        if core.engine.env.hflags & HF_CS64 and page >> 47 not in (0, 0x1_FFFF):
            self.refused = NotCanonical(), access  # of a fetch: it is the last instruction's fault
            return None
        if access is Access.FETCH and core.engine.context.budget <= 0:
            self.at_limit = True
            return None
        try:
            found = self.ask(self.linear(page), access, self._is_user(page))
        except (PageFault, EptFault) as refused:
            self.refused = refused, access
            return None
        self._check(found.frame)
        return found.frame, self._rights(page, access, found)

    def linear(self, address: int) -> int:
        """32 bits wide outside of 64-bit mode (SDM vol. 1 §3.3.7); the engine lets CS.base + EIP, and what
        crosses 4 GiB, run over. Descriptor tables lie at 64 bits in compatibility mode too."""
        wide = self._core.engine.env.hflags & HF_CS64
        if wide or (self.implicit and self._is_table(address & -PAGE)):
            return address
        return address & 0xFFFF_FFFF

    def _check(self, frame: int) -> None:
        """Unicorn would go on behind a store to where no memory is, to the end of that block and the next."""
        try:
            self._core.physical.view(frame, PAGE)
        except MemoryFault:
            raise HostError(f"a translation leads to {frame:#x}, where no memory is") from None

    def _rights(self, page: int, access: Access, found: Translation) -> int:
        """What of a page the engine may do without asking again.

        The engine watches for stores to code through mappings that it may also execute, and through no
        other. So a frame that code was fetched from is mapped so wherever it may be; and where it may not,
        the first store drops that code.
        """
        fetched, frame = self._core.view.fetched, found.frame
        rights = (_READ if found.readable else 0) | (_WRITE if found.writable else 0)
        if access is Access.FETCH:
            if frame not in fetched:
                self.coherence.fetching(frame)
            self._core.view.fetch(page, frame)
            self._core.view.fetch(self.linear(page), frame)  # where Python looks
        if frame in fetched:
            if found.executable:
                self._core.view.fetch(page, frame)  # the engine will not ask again to fetch here
                rights |= _EXECUTE
            elif access is Access.WRITE:
                self.lose_code(frame)
            else:
                rights &= ~_WRITE
        if rights & _WRITE:
            self.coherence.writing(frame)
            self._writable.setdefault(frame, set()).add(page)
        return rights

    def flush(self) -> None:
        self._writable.clear()

    # --- A party of ``Coherence`` ---

    @property
    def code_frames(self) -> set[int]:
        return self._core.view.fetched

    def drop_blocks(self, hpa: int, size: int) -> None:
        self._core.engine.drop_blocks(hpa, size)

    def lose_code(self, frame: int) -> None:
        view = self._core.view
        self.drop_blocks(frame, PAGE)
        view.fetched.discard(frame)
        for page in [page for page, held in view.frames.items() if held == frame]:
            self._core.engine.flush(page * PAGE)
            del view.frames[page]

    def lose_writable(self, frame: int) -> None:
        for page in self._writable.pop(frame, ()):
            self._core.engine.flush(page)

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
