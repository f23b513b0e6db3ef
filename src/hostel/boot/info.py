"""What every boot protocol tells a kernel, before it is put into that protocol's structures."""

from __future__ import annotations

from dataclasses import dataclass

from .e820 import E820


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that lie in guest memory."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class BootInfo:
    cmdline: Blob
    """Its NUL not counted."""
    initrd: Blob | None
    rsdp: int
    """0 if there are no ACPI tables."""
    map: tuple[E820, ...]
