"""What a disk can be told: cache modes, the driver's write cache, rates, who else has it open."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from host.image_tools import create, needs_qemu_img, qemu_img
from hostel.abi import io_uring as abi_uring
from hostel.abi import virtio as abi
from hostel.errors import ImageError, SpecError
from hostel.spec import CacheMode, Limits, Rate
from hostel.virtio import blk_file, blk_request, plane
from hostel.virtio.blk_file import DiskFile
from hostel.virtio.block import Block
from hostel.virtio.uring import Uring
from virtio.block_driver import FLUSH, IOERR, OK, Disk, disk_on
from virtio.rig import EVENT_INDEX, Rig, eventually

MIB = 1 << 20
SIZE = 8 * MIB
AT = abi.BLK_CONFIG.offsets
WCE = 1 << abi.BLK_F_CONFIG_WCE
TESTS = Path(__file__).parent.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def opened(rig: Rig, image: Path, features: int = FLUSH, **fields: Any) -> Disk:
    return disk_on(rig, Block(rig.loop, str(image), name="disk", **fields), features=features)


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none", "unsafe"])
def test_every_cache_mode(rig: Rig, image: Path, cache: CacheMode) -> None:
    """The mock driver's buffers are aligned to 16 bytes: direct I/O has to cope with that too."""
    content = bytearray(image.read_bytes())
    disk = opened(rig, image, cache=cache)
    assert disk.read(3, 5 * 512) == (OK, bytes(content[3 * 512 : 8 * 512]))
    data = os.urandom(100 * 512)
    assert disk.write(7, data) == OK
    assert disk.read(0, 110 * 512) == (
        OK,
        bytes(content[: 7 * 512]) + data + bytes(content[107 * 512 : 110 * 512]),
    )
    assert disk.request(abi.BLK_T_FLUSH)[0] == OK
    content[7 * 512 : 107 * 512] = data
    assert image.read_bytes() == content


def test_direct_io_is_direct(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskFile(str(image), cache="none")
    used: list[int] = []

    def spy(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        used.append(fd)
        if fd == disk._direct and len(buffers[0]) % 4096:  # not every file system says no
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(fd, buffers, offset, flags)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", spy)
    room = mmap.mmap(-1, MIB)
    with memoryview(room) as aligned:
        disk.read([aligned[:4096], aligned[8192:16384]], 4096)
        assert used == [disk._direct], "aligned: past the page cache"
        assert room[:4096] == image.read_bytes()[4096:8192]
        used.clear()
        disk.read([aligned[1 : 1 + 512]], 512)
        assert used[-1] == disk.fd, "misaligned: by the page cache"
        assert room[1:513] == image.read_bytes()[512:1024]
    assert not disk.read_cached([memoryview(bytearray(512))], 0, 512)
    disk.close()


def test_a_file_system_without_direct_io(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # which no file can be opened with
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="no direct I/O"):
        DiskFile(str(image), cache="none")
    assert len(os.listdir("/proc/self/fd")) == files


def test_unsafe_does_not_flush(rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    for cache, times in (("unsafe", 0), ("writeback", 1)):
        disk = opened(rig, image, cache=cache)
        assert disk.request(abi.BLK_T_FLUSH)[0] == OK
        assert len(flushed) == times
        rig.unseat(disk.driver)


def through(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the device finds of each write, however it is then done."""
    seen: list[bool] = []
    is_through = Block._is_through

    def spy(self: Block) -> bool:
        seen.append(is_through(self))
        return seen[-1]

    monkeypatch.setattr(Block, "_is_through", spy)
    return seen


@pytest.mark.parametrize("io_uring", [True, False])
def test_a_write_through_is_dsync(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch, io_uring: bool
) -> None:
    """By both ways a write can go."""
    flags: list[int] = []
    put, pwritev = Uring.put, os.pwritev

    def spy_put(self: Uring, *arguments: Any, **keywords: Any) -> None:
        flags.append(keywords["flags"])
        put(self, *arguments, **keywords)

    def spy_pwritev(fd: int, buffers: list[memoryview], offset: int, flag: int) -> int:
        flags.append(flag)
        return pwritev(fd, buffers, offset, flag)

    monkeypatch.setattr(Uring, "put", spy_put)
    monkeypatch.setattr(os, "pwritev", spy_pwritev)
    if not io_uring:
        monkeypatch.setattr(abi_uring, "SYS_SETUP", 9999)
    disk = opened(rig, image, FLUSH | WCE, cache="writethrough")
    block = disk.driver.device
    assert isinstance(block, Block)
    if io_uring and block._uring is None:
        pytest.skip("no io_uring here")
    assert disk.write(3, bytes(1024)) == OK
    assert flags == [os.RWF_DSYNC]
    assert image.read_bytes()[1536:2560] == bytes(1024)


@pytest.mark.parametrize(
    "case",
    [
        ("writeback", FLUSH, False),
        ("writeback", 0, True),
        ("none", FLUSH, False),
        ("unsafe", 0, False),
        ("writethrough", FLUSH, True),
        ("writethrough", FLUSH | WCE, True),
    ],
)
def test_when_a_completed_write_is_safe(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[CacheMode, int, bool]
) -> None:
    cache, features, safe = case
    seen = through(monkeypatch)
    assert opened(rig, image, features, cache=cache).write(0, bytes(512)) == OK
    assert seen == [safe]


def test_the_driver_switches_the_write_cache(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = through(monkeypatch)
    disk = opened(rig, image, FLUSH | WCE)
    assert disk.driver.config(AT["wce"], 1) == 1
    for wce in (0, 1):
        disk.driver.write_config(AT["wce"], 1, wce)
        assert disk.driver.config(AT["wce"], 1) == wce
        assert disk.write(0, bytes(512)) == OK
    assert seen == [True, False]
    disk.driver.write_config(AT["wce"], 1, 0)
    disk.driver.write_config(0, 8, 12345)
    assert disk.driver.config(0, 8) == SIZE // 512, "nothing else is the driver's"
    disk.driver.start(FLUSH | WCE)
    assert disk.driver.config(AT["wce"], 1) == 1, "a reset brings the first state back"


def test_topology(rig: Rig, image: Path) -> None:
    disk = opened(rig, image, FLUSH | 1 << abi.BLK_F_TOPOLOGY)
    exponent = disk.driver.config(AT["physical_block_exp"], 1)
    assert 512 << exponent == min(os.stat(image).st_blksize, blk_file.MAX_BLOCK)


# --- rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 3])
def test_bytes_per_second(rig: Rig, image: Path, queues: int) -> None:
    """16 requests of 32 KiB: the first four at once, the others at 512 KiB a second; by any queue."""
    limits = Limits(bytes=Rate(per_second=512 << 10, burst=128 << 10))
    several = 1 << abi.BLK_F_MQ if queues > 1 else 0
    disk = opened(rig, image, FLUSH | several, limits=limits, queues=queues)
    begun = time.monotonic()
    for turn in range(16):
        header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, 8 * turn)
        disk.driver.queues[turn % queues].add([header], [32 << 10, 1])
    for queue in range(queues):
        disk.driver.kick(queue)
    for queue in range(queues):
        disk.driver.wait(queue, len(range(queue, 16, queues)))
    # who is in debt waits for the next request: the last one's debt is not waited for
    expected = (15 * 32 - 128) / 512
    assert expected * 0.8 < time.monotonic() - begun < expected * 1.2 + 0.1


@pytest.mark.parametrize("event_index", [0, EVENT_INDEX])
def test_operations_per_second(rig: Rig, image: Path, event_index: int) -> None:
    limits = Limits(operations=Rate(per_second=50, burst=5))
    disk = opened(rig, image, FLUSH | event_index, limits=limits)
    begun = time.monotonic()
    for turn in range(30):
        assert disk.read(turn, 512)[0] == OK
    assert 0.8 * 24 / 50 < time.monotonic() - begun < 1.3 * 24 / 50 + 0.1


def test_a_disk_in_debt_can_be_reset(rig: Rig, image: Path) -> None:
    limits = Limits(bytes=Rate(per_second=1000, burst=1000))
    disk = opened(rig, image, limits=limits)
    assert disk.read(0, 4096)[0] == OK
    disk.driver.queues[0].add([abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, 0)], [4096, 1])
    disk.driver.kick(0)
    begun = time.monotonic()
    disk.driver.set_status(0)
    assert time.monotonic() - begun < 1


def test_queues_take_turns(rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue with much to do does not hold up another one."""
    monkeypatch.setattr(plane, "BATCH", 4)
    order: list[int] = []
    finish = blk_request.Request.finish

    def spy(self: blk_request.Request, status: int, written: int) -> None:
        order.append(self.queue.index)
        finish(self, status, written)

    monkeypatch.setattr(blk_request.Request, "finish", spy)
    disk = opened(rig, image, FLUSH | 1 << abi.BLK_F_MQ, queues=2)
    header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, 0)
    with disk.driver.device.lock:  # type: ignore[attr-defined]  # both are there before one is served
        for index, count in ((0, 20), (1, 2)):
            for _ in range(count):
                disk.driver.queues[index].add([header], [512, 1])
            disk.driver.kick(index)
    for index, count in ((0, 20), (1, 2)):
        disk.driver.wait(index, count)
    assert order.index(1) <= 8
    assert sorted(order) == [0] * 20 + [1] * 2


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_modes_of_a_block_device(rig: Rig, loop_device: str, cache: CacheMode) -> None:
    disk = opened(rig, Path(loop_device), cache=cache)
    data = os.urandom(8192)
    assert disk.write(8, data) == OK
    assert disk.request(abi.BLK_T_FLUSH)[0] == OK
    assert disk.read(8, 8192) == (OK, data)
    rig.unseat(disk.driver)


# --- locks -------------------------------------------------------------------------------------


@needs_qemu_img
def test_qemu_sees_our_lock(image: Path) -> None:
    disk = DiskFile(str(image))
    with pytest.raises(subprocess.CalledProcessError):
        qemu_img("resize", "-f", "raw", image, 2 * SIZE)
    disk.close()
    reader = DiskFile(str(image), read_only=True)
    qemu_img("info", image)
    with pytest.raises(subprocess.CalledProcessError):
        qemu_img("resize", "-f", "raw", image, 2 * SIZE)
    reader.close()
    qemu_img("resize", "-f", "raw", image, 2 * SIZE)


@pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="no qemu-storage-daemon")
def test_we_see_qemus_lock(tmp_path: Path, image: Path) -> None:
    from hostel.host.inputs import checked_disks
    from hostel.host.storage import Daemon
    from hostel.spec import Disk as DiskSpec

    (spec,) = checked_disks((DiskSpec(path=str(image)),))
    daemon = Daemon(spec, tmp_path / "disk0.sock")
    try:
        daemon.wait_up()
        with pytest.raises(ImageError, match="is in use"):
            DiskFile(str(image), read_only=True)
    finally:
        daemon.stop()
    DiskFile(str(image)).close()


# --- size --------------------------------------------------------------------------------------


def test_a_new_size(rig: Rig, image: Path) -> None:
    disk = opened(rig, image)
    block = disk.driver.device
    assert isinstance(block, Block)
    block.resize(2 * SIZE)
    assert image.stat().st_size == 2 * SIZE
    assert disk.write(2 * SIZE // 512 - 1, bytes(512)) == OK
    block.resize(SIZE // 2)
    assert disk.driver.config(0, 8) == SIZE // 1024
    assert disk.read(SIZE // 512 - 1, 512)[0] == IOERR


def test_a_device_keeps_its_size(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskFile(str(image))
    disk.is_device = True
    with pytest.raises(SpecError, match=f"has {SIZE} bytes"):
        disk.resize(2 * SIZE)
    disk.resize(SIZE)
    disk.close()


# --- flushed is flushed ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_flushed_survives_a_kill_of_the_vmm(tmp_path: Path, kind: str) -> None:
    """A process of its own holds device (or daemon) and driver; it is killed in the middle of writes."""
    if kind == "qcow2" and not (shutil.which("qemu-img") and shutil.which("qemu-storage-daemon")):
        pytest.skip("no qemu-img or qemu-storage-daemon")
    image = tmp_path / f"disk.{kind}"
    if kind == "raw":
        image.write_bytes(bytes(SIZE))
    else:
        create(image, kind, SIZE)
    script = TESTS / "guests" / "killed_writer.py"
    command = [sys.executable, str(script), str(image), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{TESTS}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        flushed = [int(child.stdout.readline()) for _ in range(20)][-1]
        child.send_signal(signal.SIGKILL)
        flushed = max([flushed, *map(int, child.stdout.read().split())])
    if kind == "qcow2":
        assert eventually(lambda: _is_free(image)), "the daemon ends with its parent"
        qemu_img("check", "-q", image)
        qemu_img("convert", "-O", "raw", image, tmp_path / "raw")
        image = tmp_path / "raw"
    content = image.read_bytes()
    for turn in range(flushed + 1):
        assert content[turn * 4096 : turn * 4096 + 4096] == bytes([turn % 251 + 1]) * 4096


def _is_free(image: Path) -> bool:
    try:
        qemu_img("check", "-q", image)
    except subprocess.CalledProcessError:
        return False
    return True
