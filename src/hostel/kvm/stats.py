"""KVM's binary statistics (api.rst §4.133): a file per VM and per vCPU.

::

    header | id | descriptors: flags, exponent, size, offset, name | data: u64 each

The descriptors never change, so they are read once, by who first asks; then one ``pread`` gets all values.
"""

from __future__ import annotations

import os
from ctypes import sizeof

from hostel.abi import kvm as abi
from hostel.errors import KvmError

Value = int | list[int]


class Stats:
    """The statistics of one VM or vCPU. Owns its file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._data_offset = 0
        self._fields: list[tuple[str, int, int]] = []

    def read(self) -> dict[str, Value]:
        """All values now: a number, or a list for a histogram or an array."""
        if not self._fields:
            header = abi.StatsHeader.from_buffer_copy(self._read(sizeof(abi.StatsHeader), 0))
            self._data_offset = header.data_offset
            self._fields = self._read_descriptors(header)
        end = max((offset + 8 * size for _, size, offset in self._fields), default=0)
        words = memoryview(self._read(end, self._data_offset)).cast("Q")
        return {
            name: words[offset // 8] if size == 1 else list(words[offset // 8 : offset // 8 + size])
            for name, size, offset in self._fields
        }

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read_descriptors(self, header: abi.StatsHeader) -> list[tuple[str, int, int]]:
        named_at = sizeof(abi.StatsDesc)
        step = named_at + header.name_size
        block = self._read(step * header.num_desc, header.desc_offset)
        fields = []
        for start in range(0, len(block), step):
            entry = abi.StatsDesc.from_buffer_copy(block, start)
            name = block[start + named_at : start + step].split(b"\0", 1)[0].decode()
            fields.append((name, entry.size, entry.offset))
        return fields

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise KvmError(f"KVM's statistics are cut short: {len(data)} of {size} bytes")
        return data
