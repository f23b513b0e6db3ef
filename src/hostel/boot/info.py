"""What every boot protocol tells a kernel, before it is put into that protocol's structures."""

from __future__ import annotations

import msgspec

from .e820 import E820


class Blob(msgspec.Struct, frozen=True):
    """Bytes that lie in guest memory."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


class BootInfo(msgspec.Struct, frozen=True):
    cmdline: Blob
    """Its NUL not counted."""
    initrd: Blob | None
    rsdp: int
    """0 if there are no ACPI tables."""
    map: tuple[E820, ...]
    seed: bytes
    """Randomness for the guest's generator; empty: none, so that the guest is the same each time."""
