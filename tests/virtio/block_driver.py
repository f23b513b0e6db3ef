"""A driver of virtio-blk, whoever serves its queues."""

from __future__ import annotations

from hostel.abi import virtio as abi
from hostel.virtio.device import VirtioDevice
from virtio.rig import Driver, Rig

MIB = 1 << 20
FLUSH = 1 << abi.BLK_F_FLUSH
OK, IOERR, UNSUPP = abi.BLK_S_OK, abi.BLK_S_IOERR, abi.BLK_S_UNSUPP


class Disk:
    """A driver of virtio-blk."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        *,
        queue: int = 0,
    ) -> tuple[int, bytes]:
        """Status and data. Header, data and status each in a buffer of their own."""
        readable = [abi.BLK_OUTHDR.pack(kind, 0, sector), *([data] if data else [])]
        done = self.driver.request(queue, readable, [*([room] if room else []), 1])
        if done.written == 1 and room:  # an error: only the status is new, behind the data
            return self._status_of_last(room), b""
        return done.data[-1], done.data[:-1]

    def _status_of_last(self, room: int) -> int:
        queue = self.driver.queues[0]
        address = queue._heap_free[16][-1]
        return queue.memory.read(address, 1)[0]

    def read(self, sector: int, size: int) -> tuple[int, bytes]:
        return self.request(abi.BLK_T_IN, sector, room=size)

    def write(self, sector: int, data: bytes) -> int:
        return self.request(abi.BLK_T_OUT, sector, data)[0]

    def ranges(self, kind: int, *ranges: tuple[int, int, int]) -> int:
        return self.request(kind, 0, b"".join(abi.BLK_RANGE.pack(*one) for one in ranges))[0]


def disk_on(rig: Rig, block: VirtioDevice, transport: str = "pci", features: int = FLUSH) -> Disk:
    driver = rig.seat(transport, block)
    driver.start(features, size=64, heap=MIB)
    return Disk(driver)
