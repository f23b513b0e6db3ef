"""From a kernel's file to memory that a vCPU can enter: everything but the ACPI tables.

::

    copy    1 MiB and up   the kernel's segments, from file to guest memory
            low RAM        the initrd: as high as the kernel allows, or behind it (multiboot)
    expect  what no file fills but Linux touches while it starts: pages, no contents
    inform  below 640 KiB  command line, start information, memory map, GDT, page tables   (vmm/layout.py)

``copy`` and ``expect`` take nearly all the time and nearly no Python: they may be another thread's
(``monitor/loading.py``).

What no file fills (bss) must be zero. New memory is, and is then not touched; memory that a machine
had before a reset is made so.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hostel.errors import HostError
from hostel.memory import GuestMemory
from hostel.vmm import layout

from .fits import check_segments, cmdline_bytes, initrd_address
from .image import KernelImage, open_kernel
from .source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .entry import EntryState

LINUX_TABLES = 4 << 20
LINUX_FIRST_PAGES = 24 << 20
"""What Debian's kernel touches on its way to user space, measured with 256 MiB to 2 GiB of memory."""
_SEED_SIZE = 32


class KernelLoad:
    """A kernel and what goes with it, checked and open; then ``copy`` and ``inform``. A context manager.

    ``rsdp`` comes from ``acpi.write_tables``. ``seeded``: the guest gets randomness, if its protocol has a
    place for it. ImageError: no kernel, or it does not fit. SpecError: a command line or an initrd that does
    not fit.
    """

    def __init__(
        self,
        memory: GuestMemory,
        kernel: Path | KernelImage,
        *,
        cmdline: str = "",
        initrd: Path | None = None,
        rsdp: int = 0,
        seeded: bool = True,
    ) -> None:
        self._memory = memory
        self._seed = os.urandom(_SEED_SIZE) if seeded else b""
        self._rsdp = rsdp
        self._files = ExitStack()
        try:
            self._kernel = self._open(kernel)
            check_segments(self._kernel, memory.size)
            self._cmdline = cmdline_bytes(self._kernel, cmdline)
            self._initrd = self._open_initrd(initrd) if initrd is not None else None
        except BaseException:
            self.close()
            raise

    def copy(self) -> None:
        """Into memory. On any thread."""
        for segment in self._kernel.segments:
            _zero(self._memory, segment.paddr + segment.filesz, segment.memsz - segment.filesz)
        for segment in self._kernel.segments:
            source = self._kernel.source
            source.copy(segment.offset, segment.filesz, self._memory, segment.paddr)
        if self._initrd is not None:
            source, address = self._initrd
            source.copy(0, source.size, self._memory, address)

    def expect(self) -> Iterator[tuple[int, int]]:
        """What this kernel will touch while it starts, as ranges in about that order: address, size.

        Linux clears its bss; what it then allocates comes from the top of memory (``memblock``: the memory
        map, a 64th of all there is, and tables), and from right behind itself once its page allocator is up.
        Other kernels are not known so well.
        """
        if self._kernel.protocol != "linux":
            return
        for segment in self._kernel.segments:
            yield segment.paddr + segment.filesz, segment.memsz - segment.filesz
        last = self._memory.regions[-1]
        top = min(last.size, self._memory.size // 64 + LINUX_TABLES)
        yield last.gpa + last.size - top, top
        end = self._kernel.end
        yield end, max(0, min(LINUX_FIRST_PAGES, self._memory.regions[0].size - end))

    def inform(self) -> EntryState:
        """Write what the kernel is told; how the first vCPU must enter it (``EntryState.apply``)."""
        from .e820 import memory_map
        from .entry import write_tables
        from .info import Blob, BootInfo

        builder: Any = import_module(f".{self._kernel.protocol}", __package__)
        self._memory.write(layout.CMDLINE_ADDRESS, self._cmdline + b"\0")
        info = BootInfo(
            cmdline=Blob(layout.CMDLINE_ADDRESS, len(self._cmdline)),
            initrd=Blob(self._initrd[1], self._initrd[0].size) if self._initrd else None,
            rsdp=self._rsdp,
            map=memory_map(self._memory.regions),
            seed=self._seed,
        )
        entry: EntryState = builder.build(self._memory, self._kernel, info)
        write_tables(self._memory, entry.mode)
        return entry

    def close(self) -> None:
        """Idempotent."""
        self._files.close()

    def __enter__(self) -> KernelLoad:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, kernel: Path | KernelImage) -> KernelImage:
        if isinstance(kernel, KernelImage):
            return kernel
        return self._files.enter_context(open_kernel(kernel))

    def _open_initrd(self, path: Path) -> tuple[Source, int]:
        """And where it goes."""
        source = self._files.enter_context(Source.open(path, "initrd"))
        return source, initrd_address(self._kernel, source, self._memory.size)


def load_kernel(memory: GuestMemory, kernel: Path | KernelImage, **more: Any) -> EntryState:
    """``KernelLoad`` in one go."""
    with KernelLoad(memory, kernel, **more) as load:
        load.copy()
        return load.inform()


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
