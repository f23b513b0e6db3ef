"""Unicorn's TLB: emptied when it must be, and when it is too small.

::

    CPU_TLB ──> mask │ table    a pair for each kind of access: supervisor, user, supervisor with SMAP off
                 └─ (entries - 1) << 6

Unicorn's TLB has one way and 256 entries. It doubles only as it is flushed, if more than 70 % of it are in
use then. A guest that never flushes would stay with 256 for ever, and each miss is a question to Python.
So it is flushed for the guest's sake once it was missed twice for each entry: of pages asked for at
random 86 % are in use by then, and refilling costs half as much again at worst.
"""

from __future__ import annotations

import ctypes

from .build import CPU_TLB, TLB_ENTRY_BITS, TLB_KINDS

LARGEST = 0x4000
"""Entries in all (64 MiB of pages); beyond, none grows by us: the host pays some 80 bytes for each."""


class Tlb:
    def __init__(self, lib: ctypes.CDLL, cpu: int) -> None:
        self._flush, self._flush_page = lib.tlb_flush_x86_64, lib.tlb_flush_page_x86_64
        self._cpu = cpu
        self._masks = (ctypes.c_uint64 * (2 * TLB_KINDS)).from_address(cpu + CPU_TLB)
        self._misses, self._patience = 0, self._enough()

    @property
    def entries(self) -> int:
        return sum((mask >> TLB_ENTRY_BITS) + 1 for mask in self._masks[::2])

    def _enough(self) -> int:
        """Misses since the last flush after which another one pays; 0: never."""
        return 2 * self.entries if self.entries <= LARGEST else 0

    def missed(self) -> None:
        self._misses += 1
        if self._misses == self._patience:
            self.flush()

    def flush(self) -> None:
        self._flush(self._cpu)
        self._misses, self._patience = 0, self._enough()

    def flush_page(self, address: int) -> None:
        self._flush_page(self._cpu, address)
