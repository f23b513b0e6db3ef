"""Requests that no good driver sends, to both who serve disks: answered, or the device stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.host.inputs import checked_disks
from hostel.host.storage import Daemon
from hostel.spec import Disk as DiskSpec
from hostel.virtio.block import Block
from hostel.virtio.vhost_user_blk import VhostUserBlk
from virtio.block_driver import FLUSH, OK, Disk, disk_on
from virtio.rig import Driver, Rig, eventually

MIB = 1 << 20
SIZE = 4 * MIB
SECTORS = SIZE // 512
IN, OUT, ID = abi.BLK_T_IN, abi.BLK_T_OUT, abi.BLK_T_GET_ID
DISCARD, ZEROES = abi.BLK_T_DISCARD, abi.BLK_T_WRITE_ZEROES


def header(kind: int, sector: int = 0, priority: int = 0) -> bytes:
    return abi.BLK_OUTHDR.pack(kind, priority, sector)


def ranges(*each: tuple[int, int, int]) -> bytes:
    return b"".join(abi.BLK_RANGE.pack(*one) for one in each)


Buffers = tuple[list[bytes], list[int]]
CASES: dict[str, Buffers] = {
    "read behind the end": ([header(IN, SECTORS)], [512, 1]),
    "read across the end": ([header(IN, SECTORS - 1)], [1024, 1]),
    "read at the last sector there is": ([header(IN, 2**64 - 1)], [512, 1]),
    "read where sector * 512 wraps to 0": ([header(IN, 2**55)], [512, 1]),
    "read where sector + length wraps": ([header(IN, 2**64 - 8)], [8192, 1]),
    "read half a sector": ([header(IN)], [100, 1]),
    "read nothing": ([header(IN)], [1]),
    "read with data from the guest": ([header(IN), b"x" * 512], [1]),
    "write behind the end": ([header(OUT, SECTORS), b"x" * 512], [1]),
    "write where sector * 512 wraps to 0": ([header(OUT, 2**55), b"x" * 512], [1]),
    "write half a sector": ([header(OUT), b"x" * 100], [1]),
    "write nothing": ([header(OUT)], [1]),
    "write into the guest": ([header(OUT)], [512, 1]),
    "the serial without room": ([header(ID)], [1]),
    "the serial into one byte": ([header(ID)], [1, 1]),
    "flush with a sector and data": ([header(4, 2**64 - 1), b"x" * 512], [1]),
    "a kind that nobody knows": ([header(0xDEAD)], [512, 1]),
    "a SCSI command": ([header(2), b"x" * 32], [96, 4, 16, 1]),
    "secure erase": ([header(14), ranges((0, 8, 0))], [1]),
    "zone append": ([header(15), b"x" * 512], [8, 1]),
    "a priority": ([header(0xFFFF, 0, 0xFFFF_FFFF)], [512, 1]),
    "discard half a range": ([header(DISCARD), b"x" * 8], [1]),
    "discard no range": ([header(DISCARD)], [1]),
    "discard 2 TiB": ([header(DISCARD), ranges((0, 2**32 - 1, 0))], [1]),
    "discard behind the end": ([header(DISCARD), ranges((SECTORS, 8, 0))], [1]),
    "discard where the sector wraps": ([header(DISCARD), ranges((2**64 - 8, 16, 0))], [1]),
    "discard with flags": ([header(DISCARD), ranges((0, 8, 2**32 - 1))], [1]),
    "discard 1,000 ranges": ([header(DISCARD), ranges((0, 8, 2)) * 1000], [1]),
    "zeroes behind the end": ([header(ZEROES), ranges((SECTORS - 1, 8, 0))], [1]),
    "zeroes with flags": ([header(ZEROES), ranges((0, 8, 2**32 - 2))], [1]),
}
UNANSWERABLE: dict[str, Buffers] = {
    "no header": ([b"x"], [1]),
    "half a header": ([header(IN)[:8]], [512, 1]),
    "no room for a status": ([header(IN)], []),
    "a status and no header": ([], [1]),
    "only data": ([], [512, 1]),
}


def ours(rig: Rig, image: Path, stack: ExitStack) -> Disk:
    return disk_on(rig, Block(rig.loop, str(image), name="disk"))


def daemons(rig: Rig, image: Path, stack: ExitStack) -> Disk:
    (spec,) = checked_disks((DiskSpec(path=str(image)),))
    daemon = Daemon(spec, image.parent / "disk0.sock")
    stack.callback(daemon.stop)
    daemon.wait_up()
    return disk_on(rig, VhostUserBlk(rig.loop, daemon.socket, name="disk"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=[ours, daemons])
def disk(request: pytest.FixtureRequest, rig: Rig, image: Path) -> Iterator[Disk]:
    serve: Callable[[Rig, Path, ExitStack], Disk] = request.param
    if serve is daemons and not shutil.which("qemu-storage-daemon"):
        pytest.skip("no qemu-storage-daemon")
    with ExitStack() as stack:
        yield serve(rig, image, stack)


@pytest.mark.parametrize("name", [*CASES, *UNANSWERABLE])
def test_a_hostile_request(disk: Disk, image: Path, name: str) -> None:
    """What it may do: fail, be harmless, or stop its own device. What is on the disk stays. The daemon
    forgets what it cannot answer."""
    before = image.read_bytes()
    driver = disk.driver
    driver.queues[0].add(*{**CASES, **UNANSWERABLE}[name])
    driver.kick(0)
    forgets = isinstance(driver.device, VhostUserBlk) and name in UNANSWERABLE
    over = eventually(lambda: is_over(driver), 0.2 if forgets else 10)
    assert over or forgets, "neither answered nor stopped"
    if not driver.needs_reset:
        assert disk.read(8, 512) == (OK, before[4096:4608])
    assert image.read_bytes() == before
    assert not driver.rig.errors


def is_over(driver: Driver) -> bool:
    return bool(driver.queues[0].completed()) or driver.needs_reset


def test_resets_in_the_middle_of_requests(disk: Disk) -> None:
    driver = disk.driver
    for turn in range(20):
        for at in range(12):
            driver.queues[0].add([header(IN, 8 * at)], [32 << 10, 1])
        driver.kick(0)
        if turn % 2:
            driver.rig.loop.run_sync(lambda: None)
        driver.set_status(0)
        driver.start(FLUSH, size=64)
    assert disk.read(0, 512)[0] == OK
    assert not driver.rig.errors
