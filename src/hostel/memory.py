"""Guest memory: one memfd, mapped once, seen through bounds-checked views.

::

    GPA 0 ........ low_end | hole for PCI and MMIO | 4 GiB ........ 4 GiB + rest
        └── region 0 ──────┘                       └── region 1 ──────────────┘
    one memfd, offsets 0 .. size, mapped at one 2 MiB-aligned HVA

Being one memfd, the same memory can be handed whole to a vhost kernel worker (by HVA) or to a
vhost-user process (by file descriptor and offset): a ``Region`` carries all three names of its bytes.

Every access from Python goes through ``view``: an address from the guest that is not wholly inside
one region raises ``MemoryFault`` and touches nothing.

What the guest gives up goes back to the host by ``discard``: holes in the file, so that the pages leave
every mapping of it, a vhost-user process's too. Nothing that hostel attaches pins guest memory; a device
that did (passthrough) would keep the old pages, and then nothing may be discarded.

Lifetime: a view keeps the mapping alive, so ``close`` is safe while views are about: it ends all
access through this object and closes the file descriptor; the pages go with the last view.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import weakref
from collections.abc import Iterable, Sequence
from operator import add
from struct import Struct
from types import TracebackType
from typing import Protocol

import msgspec

from .errors import HostError, MachineStopped, MemoryFault, SpecError

PAGE = 4096
HUGE_PAGE = 2 << 20

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MADV_HUGEPAGE, _MADV_DONTDUMP, _MADV_POPULATE_WRITE = 14, 16, 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MAP_FAILED = 2**64 - 1
_FSOPEN, _FSCONFIG, _FSMOUNT = (
    430,
    431,
    432,
)  # fsopen(2) and family, Linux 5.2; libc has no wrappers
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6

# A native-size little-endian field is one load or store in CPython, never bytes one by one: a ring
# index that the guest is changing is read whole (virtio 1.2 §2.7.13.3 relies on it). So is an item of a
# cast view stored; ``pack_into`` is not used for that: it clears the bytes first, which another thread sees.
_U16, _U32, _U64 = Struct("<H"), Struct("<I"), Struct("<Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_size_t
_libc.mmap.argtypes = (
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Region(msgspec.Struct, frozen=True):
    """Bytes of guest memory under their three names: guest address, our address, file offset."""

    gpa: int
    size: int
    hva: int
    offset: int


class Memory(Protocol):
    """What a data plane needs of it, in the machine's own process or another."""

    def view(self, gpa: int, size: int) -> memoryview: ...
    def views(self, gpas: Sequence[int], sizes: Sequence[int]) -> list[memoryview]: ...
    def read(self, gpa: int, size: int) -> bytes: ...


class GuestMemory:
    """The RAM of one machine. A context manager; ``close`` may be called twice."""

    def __init__(
        self,
        size: int,
        *,
        low_end: int = 0xC000_0000,
        high_start: int = 1 << 32,
        hugepages: bool = False,
    ) -> None:
        page = HUGE_PAGE if hugepages else PAGE
        if size <= 0 or size % page:
            raise SpecError(f"memory must be a positive multiple of {page} bytes, not {size}")
        self.size = size
        self.page = page
        """The smallest piece of it that the host can take back."""
        self.fd = _create_file(size, hugepages)
        try:
            hva = _map_aligned(self.fd, size, hugepages)
        except HostError:
            os.close(self.fd)
            raise
        self.regions = _regions(size, hva, low_end, high_start)
        self._bytes = _view_of_mapping(hva, size)
        self._low_size = self.regions[0].size
        self._high = high_start
        self._high_size = size - self._low_size

    def view(self, gpa: int, size: int) -> memoryview:
        """Writable, zero-copy."""
        if size >= 0 <= gpa and gpa + size <= self._low_size:  # nearly always: spare a call
            return self._bytes[gpa : gpa + size]
        start = self._offset(gpa, size)
        return self._bytes[start : start + size]

    def views(self, gpas: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        """Of each, and there is one; the numbers are not negative. No bytecode for each: NICs ask often."""
        ends = list(map(add, gpas, sizes))
        if max(ends) <= self._low_size:
            return list(map(self._bytes.__getitem__, map(slice, gpas, ends)))
        return list(map(self.view, gpas, sizes))

    def read(self, gpa: int, size: int) -> bytes:
        start = self._offset(gpa, size)
        return bytes(self._bytes[start : start + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        start = self._offset(gpa, size)
        self._bytes[start : start + size] = data

    def receive(self, gpa: int, size: int, fd: int, offset: int) -> None:
        """Copy bytes of a file; ``OSError``, EOFError if it has them not.

        From file to file: through our mapping each page would be a fault, and while the kernel makes a
        huge page for one, no other thread of ours can map memory, which Python does all the time.
        """
        view, start = self.view(gpa, size), self._offset(gpa, size)
        done = 0
        while done < size:
            try:
                os.lseek(self.fd, start + done, os.SEEK_SET)
                count = os.sendfile(self.fd, fd, offset + done, size - done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                count = os.preadv(fd, [view[done:]], offset + done)  # hugetlbfs, or no splice there
            if not count:
                raise EOFError
            done += count

    def read_u16(self, gpa: int) -> int:
        value: int = _U16.unpack_from(self._bytes, self._offset(gpa, 2))[0]
        return value

    def read_u32(self, gpa: int) -> int:
        value: int = _U32.unpack_from(self._bytes, self._offset(gpa, 4))[0]
        return value

    def read_u64(self, gpa: int) -> int:
        value: int = _U64.unpack_from(self._bytes, self._offset(gpa, 8))[0]
        return value

    def write_u16(self, gpa: int, value: int) -> None:
        self.view(gpa, 2).cast("H")[0] = value

    def write_u32(self, gpa: int, value: int) -> None:
        self.view(gpa, 4).cast("I")[0] = value

    def write_u64(self, gpa: int, value: int) -> None:
        self.view(gpa, 8).cast("Q")[0] = value

    def hva(self, gpa: int, size: int = 1) -> int:
        """Our own address of these bytes, for the kernel: a vhost ring, an iovec."""
        return self.regions[0].hva + self._offset(gpa, size)

    @property
    def allocated(self) -> int:
        """Bytes of the host's memory behind it: what was touched and not discarded."""
        return os.fstat(self.fd).st_blocks * 512

    def populate(self, gpa: int, size: int) -> bool:
        """Have the host make these pages now, and not when the guest touches them. What they hold stays.

        False where it does not: a kernel before 5.14, or no memory left. Then the guest's touch makes them.
        """
        view = self.view(gpa, size)  # keeps the mapping while we are in the kernel
        start = ctypes.addressof(ctypes.c_char.from_buffer(view)) if size else 0
        first = start // PAGE * PAGE
        return not _libc.madvise(first, start + size - first, _MADV_POPULATE_WRITE)

    def discard(self, buffers: Iterable[memoryview]) -> int:
        """Give these views' bytes back to the host, as far as they are whole pages; how many that were.

        They read as zeros afterwards. In ranges as long as they come: each is a call into the kernel, and
        an invalidation of all the guest's mappings there.
        """
        if self.fd < 0:
            raise MachineStopped("guest memory is closed")
        base, given = self.regions[0].hva, 0
        spans = sorted(_whole_pages(buffer, base, self.page) for buffer in buffers)
        for start, end in _joined(spans):
            mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            if _libc.fallocate(self.fd, mode, start, end - start):
                raise HostError(f"cannot give guest memory back: {_last_error().strerror}")
            given += end - start
        return given

    def close(self) -> None:
        """End all access. Views taken before stay readable and keep the pages until they go."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self._bytes = memoryview(b"")
        self._low_size = self._high_size = -1

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _offset(self, gpa: int, size: int) -> int:
        """Where in the file these bytes begin; ``MemoryFault`` unless one region holds them all."""
        if size >= 0 <= gpa:
            if gpa + size <= self._low_size:
                return gpa
            above = gpa - self._high
            if above >= 0 and above + size <= self._high_size:
                return self._low_size + above
        if self.fd < 0:
            raise MachineStopped("guest memory is closed")
        raise MemoryFault(f"guest address {gpa:#x}, {size} bytes, is outside guest memory")


def map_shared(fd: int, size: int) -> memoryview:
    """Map a file that is shared with the kernel; the mapping goes with its last view.

    Unlike ``mmap.mmap`` this neither duplicates the file descriptor nor refuses to be let go.
    """
    hva = _libc.mmap(0, size, _PROT_READ_WRITE, _MAP_SHARED, fd, 0)
    if hva == _MAP_FAILED:
        raise HostError(f"cannot map {size} bytes: {_last_error().strerror}")
    return _view_of_mapping(hva, size)


def _whole_pages(buffer: memoryview, base: int, page: int) -> tuple[int, int]:
    """From and to which byte of the file; empty where the view holds no whole page."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - base
    end = (start + buffer.nbytes) // page * page
    return -(-start // page) * page, end


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, those that touch or overlap as one; the empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _view_of_mapping(hva: int, size: int) -> memoryview:
    array = (ctypes.c_char * size).from_address(hva)
    weakref.finalize(array, _libc.munmap, hva, size).atexit = False
    return memoryview(array).cast("B")


def _regions(size: int, hva: int, low_end: int, high_start: int) -> tuple[Region, ...]:
    low = Region(0, min(size, low_end), hva, 0)
    if size <= low_end:
        return (low,)
    return (low, Region(high_start, size - low_end, hva + low_end, low_end))


def _create_file(size: int, hugepages: bool) -> int:
    if not hugepages and (fd := _create_huge_tmpfs_file(size)) is not None:
        return fd
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    try:
        fd = os.memfd_create("hostel-guest-memory", flags)
    except OSError as error:
        raise _refused(size, hugepages, error) from None
    try:
        os.ftruncate(fd, size)
        # A helper process that is handed this file must not be able to shrink it under us (SIGBUS).
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        os.close(fd)
        raise _refused(size, hugepages, error) from None
    return fd


def _create_huge_tmpfs_file(size: int) -> int | None:
    """A file on a tmpfs of its own, mounted nowhere, that uses transparent huge pages.

    A memfd does so only if the host says ``shmem_enabled``, which is off nearly everywhere: then each
    4 KiB that a guest touches is a fault (a boot: 16,000; with huge pages: 40). Such a tmpfs needs
    CAP_SYS_ADMIN; without it, None. Its files cannot be sealed: a helper process that shrinks one ends
    this machine, and only this one.
    """
    if _shmem_huge_pages() != "never":
        return None  # a memfd has them already, or nothing has
    filesystem = mount = -1
    try:
        filesystem = _system_call(_FSOPEN, b"tmpfs", 1)
        _system_call(_FSCONFIG, filesystem, _FSCONFIG_SET_STRING, b"huge", b"always", 0)
        _system_call(_FSCONFIG, filesystem, _FSCONFIG_SET_STRING, b"size", b"0", 0)
        _system_call(_FSCONFIG, filesystem, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _system_call(_FSMOUNT, filesystem, 1, 0)
        return _sized(os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, dir_fd=mount), size)
    except OSError:
        return None
    finally:
        for opened in (filesystem, mount):
            if opened >= 0:
                os.close(opened)


def _sized(fd: int, size: int) -> int:
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def _shmem_huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise _last_error()
    return result


def _map_aligned(fd: int, size: int, hugepages: bool) -> int:
    """Map the file at an HVA aligned to 2 MiB, so that KVM can use huge pages for GPA → HPA."""
    reserved = size + HUGE_PAGE
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    base = _libc.mmap(0, reserved, _PROT_NONE, flags, -1, 0)
    if base == _MAP_FAILED:
        raise _refused(size, hugepages, _last_error())
    hva: int = -(-base // HUGE_PAGE) * HUGE_PAGE
    if _libc.mmap(hva, size, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
        error = _last_error()
        _libc.munmap(base, reserved)
        raise _refused(size, hugepages, error)
    if hva > base:
        _libc.munmap(base, hva - base)
    if (tail := -(-(hva + size) // PAGE) * PAGE) < base + reserved:
        _libc.munmap(tail, base + reserved - tail)
    # Advice only: a kernel without transparent huge pages answers EINVAL and all still works.
    _libc.madvise(hva, size, _MADV_HUGEPAGE)
    _libc.madvise(hva, size, _MADV_DONTDUMP)
    return hva


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _refused(size: int, hugepages: bool, error: OSError) -> HostError:
    if not hugepages:
        return HostError(
            f"the host refused {size >> 20} MiB of guest memory: {error.strerror}",
            cure="ask for less, or raise the limit (ulimit -v, memory cgroup)",
        )
    need = size // HUGE_PAGE
    return HostError(
        f"the host has no {need} free huge pages of 2 MiB: {error.strerror}",
        cost="the machine cannot start with hugepages",
        cure=f"sysctl vm.nr_hugepages={need} (as root), or leave hugepages out",
    )
