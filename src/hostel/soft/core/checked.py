"""The core by intercept, and beside it one by translation for what QEMU's SVM does not look at.

::

    enter ── segments that have to be checked, or breakpoints armed? ──┬─ no ──> svm.py
                                                                       └─ yes ─> translate.py, until it exits

In 16- and 32-bit protected mode a segment that is not flat has limits and a type, and DR7 may arm
breakpoints: the core by intercept knows neither. No intercept tells when a guest loads such a segment or
DR7, so it is seen where Python looks at the state anyway: at the next VM entry, after an exit or the end of
a slice. From there on the other core runs, which is exact. Code behind 4 GiB of a segment that begins below
(it goes on at 0) is fetched from there by QEMU: a page fault that exits is the end
of its turn.

Each keeps translations and translated code for itself: whoever did not run last forgets all of it.
"""

from __future__ import annotations

import threading

from hostel.soft.paging.mmu import PagingMmu
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Controls, Event, Reason, VmExit
from hostel.soft.state import CR0_PE, CpuState

from .breakpoints import ENABLED
from .flags import HF_CS32, HF_PE
from .segments import ORDER, runs_over, tight
from .svm import SvmCore
from .translate import TranslatingCore

_HEAD = 4
"""Of the FPU's state as ``svm.py`` has it: bytes before what ``translate.py`` has."""


def needs_checks(state: CpuState) -> bool:
    """Of limits, of types, or of breakpoints."""
    if state.dr7 & ENABLED:
        return True
    if not state.cr0 & CR0_PE or state.bits == 64:
        return False
    if runs_over(state):
        return True
    parts: list[int] = []
    for name in ORDER:
        segment = getattr(state, name)
        parts += segment.limit, segment.rights << 8 if segment.usable else 0
    return bool(tight(HF_PE | (HF_CS32 if state.bits == 32 else 0), tuple(parts)))


class CheckedCore:
    """Implements ``silicon.Core``."""

    def __init__(self, physical: PhysicalMemory) -> None:
        self._physical = physical
        self._fast = SvmCore(physical)
        self.statistics = self._fast.statistics
        """One for both: time goes on wherever the guest runs."""
        self._exact: TranslatingCore | None = None
        self._exact_ran_last = False
        self._kicked = threading.Event()

    def enter(self, state: CpuState, controls: Controls, event: Event | None = None) -> VmExit:
        if not needs_checks(state):
            self._back()
            return self._fast.enter(state, controls, event)
        exact = self._over()
        if self._kicked.is_set():
            exact.interrupt()
        exit = exact.enter(state, controls, event)
        if exit.reason is Reason.EXTERNAL_INTERRUPT:
            self._kicked.clear()
        self._fast.load_fpu(self._fast.save_fpu()[:_HEAD] + exact.save_fpu())
        return exit

    def _over(self) -> TranslatingCore:
        """To the exact one."""
        exact = self._exact
        if exact is None:
            mmu = PagingMmu(self._physical)
            exact = self._exact = TranslatingCore(self._physical, mmu, self._fast.statistics)
        if not self._exact_ran_last:
            self._exact_ran_last = True
            exact.mmu = PagingMmu(self._physical)
            exact.flush()
            exact.forget_blocks()
        exact.load_fpu(self._fast.save_fpu()[_HEAD:])
        return exact

    def _back(self) -> None:
        if self._exact_ran_last:
            self._exact_ran_last = False
            self._fast.forget()

    def interrupt(self) -> None:
        self._kicked.set()
        self._fast.interrupt()
        if self._exact is not None:
            self._exact.interrupt()

    def flush(self, address: int | None = None) -> None:
        self._fast.flush(address)
        if self._exact is not None:
            self._exact.mmu = PagingMmu(self._physical)
            self._exact.flush()

    def wrote(self, hpa: int, size: int) -> None:
        self._fast.wrote(hpa, size)
        if self._exact is not None:
            self._exact.wrote(hpa, size)

    def save_fpu(self) -> bytes:
        return self._fast.save_fpu()

    def load_fpu(self, data: bytes) -> None:
        self._fast.load_fpu(data)

    def close(self) -> None:
        if self._exact is not None:
            self._exact.close()
        self._fast.close()
