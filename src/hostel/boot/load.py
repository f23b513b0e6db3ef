"""From a kernel's file to memory that a vCPU can enter: everything but the ACPI tables.

::

    1 MiB and up   the kernel's segments, read from the file straight into guest memory
    low RAM        the initrd: as high as the kernel allows, or behind it (multiboot)
    below 640 KiB  command line, start information, memory map, GDT, page tables   (vmm/layout.py)

What no file fills (bss) must be zero. New memory is, and is then not touched; memory that a machine
had before a reset is made so.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hostel.errors import HostError
from hostel.memory import GuestMemory
from hostel.vmm import layout

from . import linux, multiboot, pvh
from .e820 import memory_map
from .entry import EntryState, write_tables
from .fits import check_segments, cmdline_bytes, initrd_address
from .image import KernelImage, open_kernel
from .info import Blob, BootInfo
from .source import Source

_BUILDERS = {"linux": linux.build, "pvh": pvh.build, "multiboot": multiboot.build}


def load_kernel(
    memory: GuestMemory,
    kernel: Path | KernelImage,
    *,
    cmdline: str = "",
    initrd: Path | None = None,
    rsdp: int = 0,
) -> EntryState:
    """Load it, and say how the first vCPU must enter it (``EntryState.apply``).

    ``rsdp`` comes from ``acpi.write_tables``. ImageError: no kernel, or it does not fit. SpecError: a
    command line or an initrd that does not fit.
    """
    if isinstance(kernel, Path):
        with open_kernel(kernel) as image:
            return load_kernel(memory, image, cmdline=cmdline, initrd=initrd, rsdp=rsdp)
    load_segments(memory, kernel)
    info = BootInfo(
        cmdline=_load_cmdline(memory, kernel, cmdline),
        initrd=_load_initrd(memory, kernel, initrd) if initrd is not None else None,
        rsdp=rsdp,
        map=memory_map(memory.regions),
    )
    entry = _BUILDERS[kernel.protocol](memory, kernel, info)
    write_tables(memory, entry.mode)
    return entry


def load_segments(memory: GuestMemory, image: KernelImage) -> None:
    check_segments(image, memory.size)
    for segment in image.segments:
        view = memory.view(segment.paddr, segment.memsz)
        image.source.read_into(segment.offset, view[: segment.filesz])
        _zero(memory, segment.paddr + segment.filesz, segment.memsz - segment.filesz)


def _zero(memory: GuestMemory, address: int, size: int) -> None:
    """Only what the memory's file holds: a hole is zero, and to write to it would cost its pages."""
    region = next(region for region in reversed(memory.regions) if region.gpa <= address)
    shift = region.gpa - region.offset
    end = address + size
    while address < end and (data := _seek_data(memory.fd, address - shift)) is not None:
        start = data + shift
        stop = min(os.lseek(memory.fd, data, os.SEEK_HOLE) + shift, end)
        if start >= end:
            return
        memory.write(start, bytes(stop - start))
        address = stop


def _seek_data(fd: int, offset: int) -> int | None:
    """Where the next bytes are that are no hole. hugetlbfs knows no holes and says: here."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise HostError(f"cannot look into guest memory: {error.strerror}") from None


def _load_cmdline(memory: GuestMemory, image: KernelImage, cmdline: str) -> Blob:
    data = cmdline_bytes(image, cmdline)
    memory.write(layout.CMDLINE_ADDRESS, data + b"\0")
    return Blob(layout.CMDLINE_ADDRESS, len(data))


def _load_initrd(memory: GuestMemory, image: KernelImage, path: Path) -> Blob:
    with Source.open(path, "initrd") as source:
        address = initrd_address(image, source, memory.size)
        source.read_into(0, memory.view(address, source.size))
        return Blob(address, source.size)
