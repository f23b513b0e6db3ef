"""A machine's state as a few bytes: guest memory, and what is in each vCPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b

from hostel.hypervisor import Vcpu
from hostel.memory import PAGE, GuestMemory

_BYTES = 16
_ZEROS = bytes(PAGE)


def of_memory(memory: GuestMemory) -> str:
    """Of each page that is not zero, and its place: whether the host keeps a page for zeros is chance."""
    digest = blake2b(digest_size=_BYTES)
    for at, page in _pages(memory):
        digest.update(at.to_bytes(8, "little"))
        digest.update(page)
    return digest.hexdigest()


def _pages(memory: GuestMemory) -> Iterator[tuple[int, bytes]]:
    for region in memory.regions:
        view = memory.view(region.gpa, region.size)
        for start, end in _held(memory.fd, region.offset, region.size):
            for at in range(start, end, PAGE):
                page = bytes(view[at : at + PAGE])
                if page != _ZEROS:
                    yield region.gpa + at, page


def _held(fd: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """What the memory's file holds of a region, as offsets into it."""
    at, end = offset, offset + size
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing any more
            return
        if start >= end:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start - offset, at - offset


def of_vcpu(vcpu: Vcpu) -> str:
    """Registers and local APIC, as the contract shows them."""
    digest = blake2b(digest_size=_BYTES)
    for state in (vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_lapic()):
        digest.update(bytes(state))
    return digest.hexdigest()
