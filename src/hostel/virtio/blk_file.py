"""A disk on the host: a raw file or a block device, opened once, checked at the border.

Data goes between the file and guest memory by ``preadv`` and ``pwritev`` on views: no copy here.

::

    cache          reads and writes            flush
    writeback      page cache                  fdatasync
    writethrough   the same, writes DSYNC      fdatasync
    none           O_DIRECT                    fdatasync (the medium's own cache)
    unsafe         page cache                  nothing
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence

from hostel.errors import ImageError, SpecError
from hostel.spec import CacheMode

from .blk_lock import lock
from .queue import take, total

SECTOR = 512
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 0x10  # FALLOC_FL_*, <linux/falloc.h>
_BLKSSZGET, _BLKDISCARD, _BLKPBSZGET, _BLKZEROOUT = 0x1268, 0x1277, 0x127B, 0x127F  # <linux/fs.h>
_ZEROES = bytes(1 << 20)
MAX_BLOCK = 4096
_IN_MEMORY = {0x0102_1994, 0x8584_58F6}
"""TMPFS_MAGIC, RAMFS_MAGIC: <linux/magic.h>"""
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class DiskFile:
    """Offsets and lengths are bytes. ``OSError`` where the host fails; the device answers for it.

    Who writes holds the file alone: two machines on one image would destroy it.

    The capacity is in sectors (virtio 1.2 §5.2.4). A file that ends within one has it whole, as QEMU does it:
    what is missing reads as zeroes, and the file grows when it is written.
    """

    def __init__(
        self, path: str, *, read_only: bool = False, cache: CacheMode = "writeback"
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.is_cached = cache != "none"
        self._flushes = cache != "unsafe"
        self._direct = -1
        self._cached_flags: int | None = os.RWF_NOWAIT if self.is_cached else None
        """How to read what the page cache holds, where there is a way."""
        access = os.O_RDONLY if read_only else os.O_RDWR
        try:
            # O_NONBLOCK: or opening a FIFO would wait for its writer. A disk ignores it.
            self.fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(
                f"disk {path}: {error.strerror}",
                cure="" if read_only else "give it as read-only if it need not be written",
            ) from None
        try:
            self.is_device = self._check()
            self._lock()
            self.size = self._measure()
            self._block = self._asked(_BLKSSZGET) if self.is_device else 1
            self.block_exponent = self._block_exponent()
            if not self.is_cached:
                self._direct = self._open_direct(access)
        except (ImageError, OSError):
            os.close(self.fd)
            raise

    def _check(self) -> bool:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"disk {self.path} is neither a file nor a block device")
        if not os.lseek(self.fd, 0, os.SEEK_END):
            raise ImageError(
                f"disk {self.path} is empty", cure="truncate -s 10G makes a sparse one"
            )
        return stat.S_ISBLK(mode)

    def _lock(self) -> None:
        if not lock(self.fd, write=not self.read_only):
            raise ImageError(
                f"disk {self.path} is in use",
                cost="two machines writing one disk would destroy it",
                cure="stop the other machine, or give the disk to both as read-only",
            )

    def _open_direct(self, access: int) -> int:
        try:
            return os.open(f"/proc/self/fd/{self.fd}", access | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            raise ImageError(
                f"disk {self.path}: its file system has no direct I/O, as cache=none needs",
                cure="leave the cache to hostel",
            ) from None

    def _block_exponent(self) -> int:
        """Logical blocks (512 bytes) of a physical one, as a power of two: a guest that writes whole ones
        spares the host reading what it has to keep of them."""
        size = self._asked(_BLKPBSZGET) if self.is_device else os.fstat(self.fd).st_blksize
        return max(1, min(size, MAX_BLOCK) // SECTOR).bit_length() - 1

    def _asked(self, request: int) -> int:
        """A number that the device's driver knows."""
        return int.from_bytes(fcntl.ioctl(self.fd, request, bytes(4)), "little")

    def _measure(self) -> int:
        self._end = os.lseek(self.fd, 0, os.SEEK_END)
        return -(-self._end // SECTOR) * SECTOR

    @property
    def data_fd(self) -> int:
        """For reads and writes of whole blocks, from aligned buffers."""
        return self.fd if self._direct < 0 else self._direct

    def refresh(self) -> None:
        """Look at the size again."""
        self.size = self._measure()

    def resize(self, size: int) -> None:
        """A file is made so; a device has the size that the host gave it."""
        if not self.is_device:
            os.ftruncate(self.fd, size)
        self.refresh()
        if self.size != size:
            raise SpecError(f"disk {self.path} has {self.size} bytes, not {size}")

    def close(self) -> None:
        for fd in (self.fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self.fd = self._direct = -1

    # -- requests -----------------------------------------------------------------------------

    def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._transfer(os.preadv, buffers, offset, 0)

    def read_cached(self, buffers: Sequence[memoryview], offset: int, size: int) -> bool:
        """Read ``size`` bytes that the page cache holds, without waiting; ``False`` if it has not all."""
        if self._cached_flags is None:
            return False
        try:
            return os.preadv(self.fd, buffers, offset, self._cached_flags) == size
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # the file system cannot say: do not ask again
                self._cached_flags = 0 if self._is_in_memory() else None
            return False

    def write_cached(self, buffers: Sequence[memoryview], offset: int, size: int) -> bool:
        """Give ``size`` bytes to the page cache; ``False`` if not all of it was taken."""
        try:
            return os.pwritev(self.fd, buffers, offset) == size
        except OSError:
            return False

    def _is_in_memory(self) -> bool:
        """Whether a file system is its page cache, so that a read waits for no medium."""
        answer = (ctypes.c_long * 15)()  # struct statfs: f_type comes first
        return not _libc.fstatfs(self.fd, answer) and answer[0] in _IN_MEMORY

    def write(self, buffers: Sequence[memoryview], offset: int, *, through: bool = False) -> None:
        """``through``: on the medium before it returns."""
        flags = os.RWF_DSYNC if through else 0
        self._transfer(os.pwritev, buffers, offset, flags)

    def flush(self) -> None:
        if self._flushes:
            os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Of a device's block, 4 KiB on many disks, that it holds in part, it is free to do nothing."""
        if self.is_device:
            first = -(-offset // self._block) * self._block
            whole = (offset + length) // self._block * self._block - first
            if whole > 0:
                self._range_ioctl(_BLKDISCARD, first, whole)
        else:
            self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """By the file system or the device where they can, by hand where they cannot."""
        if (offset | length) % self._block:
            self._write_zeroes_by_hand(offset, length)
            return
        try:
            if self.is_device:
                self._range_ioctl(_BLKZEROOUT, offset, length)
            else:
                mode = _PUNCH_HOLE if unmap else _ZERO_RANGE
                self._fallocate(mode | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._write_zeroes_by_hand(offset, length)

    def _write_zeroes_by_hand(self, offset: int, length: int) -> None:
        while length:
            part = memoryview(_ZEROES)[: min(length, len(_ZEROES))]
            self.write([part], offset)
            offset += len(part)
            length -= len(part)

    def _range_ioctl(self, request: int, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, request, struct.pack("QQ", offset, length))

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if _libc.fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _transfer(
        self, call: Callable[..., int], buffers: Sequence[memoryview], offset: int, flags: int
    ) -> None:
        """All of it, however little a call does; the file ending early is an error, unless it has from the
        start, within its last sector."""
        while buffers:
            done = self._once(call, buffers, offset, flags)
            if not done and call is os.preadv and offset == self._end:
                for view in buffers:
                    view[:] = bytes(len(view))
                return
            if not done:
                raise OSError(errno.EIO, "the file is shorter than the disk")
            if done == total(buffers):
                return
            buffers, offset = take(buffers, done)[1], offset + done

    def _once(
        self, call: Callable[..., int], buffers: Sequence[memoryview], offset: int, flags: int
    ) -> int:
        """Past the page cache where that is asked for and the guest's buffers are aligned for it; the
        kernel keeps both ways coherent."""
        if self._direct >= 0:
            try:
                return call(self._direct, buffers, offset, flags)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return call(self.fd, buffers, offset, flags)
