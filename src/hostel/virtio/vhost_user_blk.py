"""Block (virtio 1.2 §5.2) whose queues another process serves: a qemu-storage-daemon, for any format.

The config space is the backend's, read once a driver looks, but for two things. We keep the capacity, once
the image was resized: daemons before QEMU 8 neither say so nor show it, though they serve what is new. And a
daemon offers SIZE_MAX, a limit of segments, with 0 in it, by which it means none: Linux takes that for one
page, and cuts each request into such pieces, and what has more of them than SEG_MAX into several.
"""

from __future__ import annotations

import os
import time
from functools import partial

from hostel.abi import virtio as abi
from hostel.errors import HelperError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import QueueWiring
from .vhost_user import VhostUserDevice, connect

QUEUE_SIZE = 128
"""As QEMU has it beside a backend whose requests have up to 126 segments."""
DRAIN_SECONDS = 1.0
"""A guest may offer what is never answered, and then reset: it waits so long for nothing."""
DRAIN_STEP = 0.001
CONFIG_BYTES = abi.BLK_CONFIG.offsets["max_secure_erase_sectors"]
"""What every backend has of it; the rest is younger than most of them."""
_CAPACITY_BYTES = 8
_WCE = abi.BLK_CONFIG.offsets["wce"]
_SIZE_MAX = abi.BLK_CONFIG.offsets["size_max"]
_FEATURES = (
    abi.BLK_F_SIZE_MAX,
    abi.BLK_F_SEG_MAX,
    abi.BLK_F_RO,
    abi.BLK_F_BLK_SIZE,
    abi.BLK_F_FLUSH,
    abi.BLK_F_TOPOLOGY,
    abi.BLK_F_CONFIG_WCE,
    abi.BLK_F_MQ,
    abi.BLK_F_DISCARD,
    abi.BLK_F_WRITE_ZEROES,
)


class VhostUserBlk(VhostUserDevice):
    """``path`` is a socket that listens already; the daemon may come to it later."""

    device_id = abi.ID_BLOCK
    config = bytes(
        CONFIG_BYTES
    )  # the transport announces its length before anybody asks the backend

    def __init__(
        self,
        loop: EventLoop,
        path: str | os.PathLike[str],
        *,
        name: str,
        queues: int = 1,
        write_cache: bool = True,
    ) -> None:
        again = partial(connect, path, "qemu-storage-daemon")
        super().__init__(
            loop,
            again(),
            name=name,
            queue_sizes=(QUEUE_SIZE,) * queues,
            device_features=sum(1 << bit for bit in _FEATURES),
            again=again,
        )
        self._capacity: bytes | None = None
        self._write_cache = write_cache

    def prepare(self) -> None:
        super().prepare()
        with self._lock:
            if self.features >> abi.BLK_F_CONFIG_WCE & 1:
                # a daemon before QEMU 8 says "no cache" and has one: the guest would not flush it
                self.frontend.set_config(_WCE, bytes([self._write_cache]))
            self._read_config()
            if not any(self.config[_SIZE_MAX : _SIZE_MAX + 4]):
                self.features &= ~(1 << abi.BLK_F_SIZE_MAX)

    def write_config(self, offset: int, data: bytes) -> None:
        """The write cache is all that a driver may set (§5.2.5)."""
        if offset == _WCE and len(data) == 1 and self.features >> abi.BLK_F_CONFIG_WCE & 1:
            with self._lock:
                try:
                    self._require_alive()
                    self.frontend.set_config(offset, data)
                    self._read_config()
                except HelperError as error:
                    self.fail(error)

    def _stop_rings(self) -> list[tuple[int, int]]:
        """A daemon of QEMU 7.2 that is told to stop with requests under way finishes them into a ring that
        it has let go, and may die of it. So it first gets time to finish what was offered."""
        deadline = time.monotonic() + DRAIN_SECONDS
        if self._alive and (memory := self._memory) is not None:
            for wiring in self._wirings:
                offered = memory.read_u16(wiring.avail + 2)
                while time.monotonic() < deadline and _behind(memory, wiring, offered):
                    time.sleep(DRAIN_STEP)
        return super()._stop_rings()

    def resize(self, size: int) -> None:
        """The image has ``size`` bytes now: tell the guest."""
        with self._lock:
            self._capacity = (size // abi.BLK_SECTOR).to_bytes(_CAPACITY_BYTES, "little")
            self.config = self._capacity + self.config[_CAPACITY_BYTES:]
        self.config_changed()

    def _read_config(self) -> None:
        config = self.frontend.get_config(0, CONFIG_BYTES)
        if len(config) != CONFIG_BYTES:
            raise HelperError(f"{self.name}: the backend has {len(config)} bytes of config space")
        self.config = (self._capacity or config[:_CAPACITY_BYTES]) + config[_CAPACITY_BYTES:]


def _behind(memory: GuestMemory, wiring: QueueWiring, offered: int) -> bool:
    """Whether the used ring has not come as far as the available one was."""
    return 0 < (offered - memory.read_u16(wiring.used + 2)) & 0xFFFF <= wiring.size
