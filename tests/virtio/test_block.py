"""The block device on real files and, where the host lets us, on a loop device."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.errors import ImageError
from hostel.spec import CacheMode
from hostel.virtio import blk_file
from hostel.virtio import block as block_module
from hostel.virtio.blk_file import DiskFile
from hostel.virtio.blk_request import RANGE_SECTORS
from hostel.virtio.block import Block
from virtio.block_driver import FLUSH, IOERR, OK, UNSUPP, Disk, disk_on
from virtio.rig import EVENT_INDEX, Rig, eventually, wait_fd

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=["pci", "mmio"])
def disk(request: pytest.FixtureRequest, rig: Rig, image: Path) -> Disk:
    block = Block(rig.loop, str(image), name="disk", serial="HOSTEL-0123456789-TOO-LONG")
    return disk_on(rig, block, request.param)


def test_config_space(disk: Disk) -> None:
    at = abi.BLK_CONFIG.offsets
    assert disk.driver.config(at["capacity"], 8) == SIZE // 512
    assert disk.driver.config(at["seg_max"], 4) == 254
    assert disk.driver.config(at["blk_size"], 4) == 512
    assert disk.driver.config(at["max_discard_sectors"], 4) == RANGE_SECTORS
    assert disk.driver.config(at["num_queues"], 2) == 1


@pytest.fixture(params=["at once", "by workers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small reads from the page cache need no worker; the others do."""
    if request.param == "by workers":
        monkeypatch.setattr(block_module, "AT_ONCE", 0)
        monkeypatch.setattr(block_module, "ALONE", 0)


@pytest.mark.usefixtures("way")
def test_read_and_write(disk: Disk, image: Path) -> None:
    content = bytearray(image.read_bytes())
    assert disk.read(3, 5 * 512) == (OK, bytes(content[3 * 512 : 8 * 512]))
    data = os.urandom(128 * 512)
    assert disk.write(100, data) == OK
    content[100 * 512 : 228 * 512] = data
    assert image.read_bytes() == content
    assert disk.request(abi.BLK_T_FLUSH)[0] == OK
    last = SIZE // 512 - 1
    assert disk.read(last, 512) == (OK, bytes(content[-512:]))


def test_a_request_may_be_cut_anywhere(disk: Disk, image: Path) -> None:
    """§2.7.4.1: the device must not assume where one buffer ends."""
    content = image.read_bytes()
    header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, 2)
    done = disk.driver.request(0, [header[:3], header[3:11], header[11:]], [100, 900, 24 + 1])
    assert done.data == content[1024:2048] + bytes([OK])
    data = os.urandom(512)
    header = abi.BLK_OUTHDR.pack(abi.BLK_T_OUT, 0, 0)
    done = disk.driver.request(0, [header[:10], header[10:] + data[:100], data[100:]], [1])
    assert done.data == bytes([OK])
    assert image.read_bytes()[:512] == data


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (SIZE // 512, 512),
        (SIZE // 512 - 1, 1024),
        (2**64 - 1, 512),
        (2**55, 512),
        (0, 511),
        (0, 513),
    ],
)
def test_what_is_not_on_the_disk(disk: Disk, image: Path, sector: int, size: int) -> None:
    before = image.read_bytes()
    assert disk.read(sector, size)[0] == IOERR
    assert disk.write(sector, bytes(size)) == IOERR
    assert image.read_bytes() == before
    assert disk.read(0, 512) == (OK, before[:512])


@pytest.mark.parametrize("kind", [2, 10, 14, 99, 2**31, 2**32 - 1])
def test_unknown_requests_are_unsupported(disk: Disk, kind: int) -> None:
    assert disk.request(kind)[0] == UNSUPP


def test_get_id(disk: Disk) -> None:
    assert disk.request(abi.BLK_T_GET_ID, room=20) == (OK, b"HOSTEL-0123456789-TO")
    assert disk.request(abi.BLK_T_GET_ID, room=64)[1][:20] == b"HOSTEL-0123456789-TO"


def test_discard_punches_a_hole(disk: Disk, image: Path) -> None:
    before = image.stat().st_blocks
    assert disk.ranges(abi.BLK_T_DISCARD, (0, 2048, 0), (4096, 2048, 0)) == OK
    assert image.stat().st_blocks <= before - 2 * 2048
    assert image.stat().st_size == SIZE
    assert disk.read(0, 4096) == (OK, bytes(4096))


@pytest.mark.parametrize("unmap", [0, abi.BLK_WRITE_ZEROES_FLAG_UNMAP])
def test_write_zeroes(disk: Disk, image: Path, unmap: int) -> None:
    content = bytearray(image.read_bytes())
    assert disk.ranges(abi.BLK_T_WRITE_ZEROES, (5, 3000, unmap)) == OK
    content[5 * 512 : 3005 * 512] = bytes(3000 * 512)
    assert image.read_bytes() == content


def test_write_zeroes_by_hand_where_the_file_system_cannot(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without fallocate: every mode is refused."""

    def refuse(self: DiskFile, mode: int, offset: int, length: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(blk_file.DiskFile, "_fallocate", refuse)
    disk = DiskFile(str(image), read_only=False)
    content = bytearray(image.read_bytes())
    disk.write_zeroes(512, 3 * MIB, unmap=True)
    content[512 : 512 + 3 * MIB] = bytes(3 * MIB)
    assert image.read_bytes() == content
    disk.close()


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (abi.BLK_T_DISCARD, [(0, 8, 1)], UNSUPP),
        (abi.BLK_T_WRITE_ZEROES, [(0, 8, 2)], UNSUPP),
        (abi.BLK_T_DISCARD, [(SIZE // 512, 8, 0)], IOERR),
        (abi.BLK_T_DISCARD, [(2**63, 8, 0)], IOERR),
        (abi.BLK_T_DISCARD, [(0, 0, 0)], IOERR),
        (abi.BLK_T_DISCARD, [(0, RANGE_SECTORS + 1, 0)], IOERR),
        (abi.BLK_T_WRITE_ZEROES, [(0, 8, 0)] * 17, IOERR),
        (abi.BLK_T_WRITE_ZEROES, [(0, 8, 0), (SIZE // 512 - 7, 8, 0)], IOERR),
        (abi.BLK_T_WRITE_ZEROES, [], IOERR),
    ],
)
def test_bad_ranges_change_nothing(
    disk: Disk, image: Path, kind: int, ranges: list[tuple[int, int, int]], status: int
) -> None:
    before = image.read_bytes()
    assert disk.ranges(kind, *ranges) == status
    assert disk.request(kind, 0, b"half a range")[0] == IOERR
    assert image.read_bytes() == before


def test_read_only(rig: Rig, image: Path) -> None:
    image.chmod(0o444)
    before = image.read_bytes()
    disk = disk_on(rig, Block(rig.loop, str(image), name="ro", read_only=True))
    features = disk.driver.read_features()
    assert features >> abi.BLK_F_RO & 1
    assert not features >> abi.BLK_F_DISCARD & 1
    assert disk.read(0, 512) == (OK, before[:512])
    assert disk.write(0, bytes(512)) == IOERR
    assert disk.ranges(abi.BLK_T_DISCARD, (0, 8, 0)) == IOERR
    assert disk.request(abi.BLK_T_FLUSH)[0] == OK
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([b"x" * 15], [1]), ([b"x" * 16], []), ([], [17])],
)
def test_what_cannot_be_answered_needs_reset(
    disk: Disk, readable: list[bytes], writable: list[int]
) -> None:
    disk.driver.queues[0].add(readable, writable)
    disk.driver.kick(0)
    assert wait_fd(disk.driver.config_fd())
    assert disk.driver.needs_reset
    disk.driver.start(FLUSH, size=64)
    assert disk.read(0, 512)[0] == OK


@pytest.mark.usefixtures("way")
def test_many_requests_in_flight_on_several_queues(rig: Rig, image: Path) -> None:
    content = image.read_bytes()
    block = Block(rig.loop, str(image), name="mq", queues=3)
    disk = disk_on(rig, block, features=FLUSH | 1 << abi.BLK_F_MQ | EVENT_INDEX)
    assert disk.driver.config(abi.BLK_CONFIG.offsets["num_queues"], 2) == 3
    expected: dict[tuple[int, int], bytes] = {}
    for index in range(3):
        for turn in range(20):
            sector = (index * 997 + turn * 131) % (SIZE // 512 - 8)
            header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, sector)
            head = disk.driver.queues[index].add([header], [4096, 1])
            expected[index, head] = content[sector * 512 : sector * 512 + 4096] + bytes([OK])
        disk.driver.kick(index)
    for index in range(3):
        for done in disk.driver.wait(index, 20):
            assert done.data == expected.pop((index, done.head))
    assert not expected


def test_the_event_loop_does_not_wait_for_the_disk(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs holds up its requests and its reset, nothing else."""
    go = threading.Event()
    monkeypatch.setattr(DiskFile, "flush", lambda self: go.wait(10))
    disk = disk_on(rig, Block(rig.loop, str(image), name="slow"))
    queue = disk.driver.queues[0]
    queue.add([abi.BLK_OUTHDR.pack(abi.BLK_T_FLUSH, 0, 0)], [1])
    disk.driver.kick(0)
    rig.loop.run_sync(lambda: None)
    assert disk.read(0, 512)[0] == OK, "another worker"
    reset = threading.Thread(target=disk.driver.set_status, args=(0,))
    reset.start()
    reset.join(0.2)
    assert reset.is_alive(), "reset waits: the flush may still write its status"
    rig.loop.run_sync(lambda: None)
    go.set()
    reset.join(10)
    assert not reset.is_alive()
    assert disk.driver.get_status() == 0


def test_a_full_host_is_an_io_error(rig: Rig, small_disk: Path) -> None:
    """A sparse image larger than its file system: the guest gets an error, the machine lives."""
    image = small_disk / "sparse"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    block = Block(rig.loop, str(image), name="full")
    disk = disk_on(rig, block)
    assert disk.write(0, bytes(512 << 10)) == OK
    assert disk.write(2048, bytes(512 << 10)) == OK
    assert disk.write(4096, bytes(512 << 10)) == IOERR
    assert "No space left" in block.statistics()["last_error"]
    assert disk.read(100_000, 512) == (OK, bytes(512))
    disk.driver.set_status(0)
    block.close()


def test_growth_reaches_the_guest(disk: Disk, image: Path) -> None:
    with image.open("ab") as file:
        file.truncate(2 * SIZE)
    block = disk.driver.device
    assert isinstance(block, Block)
    block.refresh()
    assert wait_fd(disk.driver.config_fd())
    assert disk.driver.config(0, 8) == 2 * SIZE // 512
    assert disk.write(2 * SIZE // 512 - 1, b"\xaa" * 512) == OK


def test_a_file_cut_short_behind_our_back(disk: Disk, image: Path) -> None:
    os.truncate(image, MIB)
    assert disk.read(4 * MIB // 512, 512)[0] == IOERR


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("length", [1, 511, MIB + 1, MIB + 4096 + 700])
def test_a_file_that_ends_within_a_sector(
    rig: Rig, image: Path, cache: CacheMode, length: int
) -> None:
    """As QEMU has it: the sector is whole, zeroes are added, and it is there to be written."""
    os.truncate(image, length)
    content = image.read_bytes().ljust(-(-length // 512) * 512, b"\0")
    disk = disk_on(rig, Block(rig.loop, str(image), name="disk", cache=cache))
    sectors = len(content) // 512
    assert disk.driver.config(abi.BLK_CONFIG.offsets["capacity"], 8) == sectors
    first = max(0, sectors - 16)
    assert disk.read(first, (sectors - first) * 512) == (OK, content[first * 512 :])
    assert disk.read(sectors - 1, 512) == (OK, content[-512:])
    assert disk.read(sectors, 512)[0] == IOERR
    assert image.stat().st_size == length, "reading changes nothing"
    data = os.urandom(512)
    assert disk.write(sectors - 1, data) == OK
    assert image.read_bytes() == content[:-512] + data
    assert disk.read(sectors - 1, 512) == (OK, data)
    os.truncate(image, length - 1)
    assert disk.read(sectors - 1, 512)[0] == IOERR, "cut short behind our back"


def test_state_moves(rig: Rig, image: Path) -> None:
    block = Block(rig.loop, str(image), name="disk")
    disk = disk_on(rig, block)
    data = os.urandom(512)
    assert disk.write(7, data) == OK
    state = json.loads(json.dumps(disk.driver.seat.save()))
    assert disk.read(7, 512) == (OK, data), "saving stops nothing"
    state = json.loads(json.dumps(disk.driver.seat.save()))
    disk.driver.set_status(0)
    disk.driver.transport.load(state["transport"])
    assert disk.read(7, 512) == (OK, data)


def test_closing_leaves_no_thread_and_no_file(rig: Rig, image: Path) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError):
        Block(rig.loop, str(image.parent / "absent"), name="never")
    assert len(os.listdir("/proc/self/fd")) == files
    for _ in range(5):
        block = Block(rig.loop, str(image), name="once")
        disk = disk_on(rig, block)
        disk.read(0, 512)
        assert threading.active_count() > threads
        rig.unseat(disk.driver)
    assert eventually(lambda: threading.active_count() == threads)
    assert len(os.listdir("/proc/self/fd")) == files


# --- The border --------------------------------------------------------------------------------


def complaint(path: Path, *, read_only: bool = False) -> str:
    with pytest.raises(ImageError) as caught:
        DiskFile(str(path), read_only=read_only)
    return str(caught.value)


def test_bad_images_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "No such file" in complaint(tmp_path / "absent")
    assert "Is a directory" in complaint(tmp_path)
    assert "neither a file nor" in complaint(tmp_path, read_only=True)
    assert "is empty" in complaint(empty)
    assert "neither a file nor" in complaint(fifo)
    assert "neither a file nor" in complaint(fifo, read_only=True)
    assert "neither a file nor" in complaint(Path("/dev/null"))


def test_one_writer_or_many_readers(image: Path) -> None:
    writer = DiskFile(str(image), read_only=False)
    assert "in use" in complaint(image)
    assert "in use" in complaint(image, read_only=True)
    writer.close()
    readers = [DiskFile(str(image), read_only=True) for _ in range(2)]
    assert "in use" in complaint(image)
    for reader in readers:
        reader.close()


def test_a_block_device(rig: Rig, image: Path, loop_device: str) -> None:
    block = Block(rig.loop, loop_device, name="loop")
    disk = disk_on(rig, block)
    data = os.urandom(4096)
    assert disk.write(8, data) == OK
    assert disk.request(abi.BLK_T_FLUSH)[0] == OK
    assert disk.read(8, 4096) == (OK, data)
    assert disk.ranges(abi.BLK_T_WRITE_ZEROES, (8, 8, 0)) == OK
    assert disk.read(8, 4096) == (OK, bytes(4096))
    assert disk.ranges(abi.BLK_T_DISCARD, (16, 8, 0)) in (OK, UNSUPP)
    disk.driver.set_status(0)
    block.close()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_device_with_blocks_of_4_kib(
    rig: Rig, image: Path, loop_device_of_4k: str, cache: CacheMode
) -> None:
    """The guest's are of 512 bytes: what it does with parts of the device's is done all the same."""
    content = bytearray(image.read_bytes())
    disk = disk_on(rig, Block(rig.loop, loop_device_of_4k, name="loop", cache=cache))
    assert disk.write(3, b"x" * 512) == OK
    assert disk.ranges(abi.BLK_T_WRITE_ZEROES, (13, 9, 0)) == OK
    assert disk.ranges(abi.BLK_T_WRITE_ZEROES, (5, 1, abi.BLK_WRITE_ZEROES_FLAG_UNMAP)) == OK
    assert disk.ranges(abi.BLK_T_DISCARD, (33, 20, 0), (57, 2, 0)) == OK
    content[3 * 512 : 4 * 512] = b"x" * 512
    for first, count in ((13, 9), (5, 1)):
        content[first * 512 : (first + count) * 512] = bytes(count * 512)
    status, found = disk.read(0, 64 * 512)
    assert status == OK
    assert found[: 40 * 512] == content[: 40 * 512]
    assert found[48 * 512 :] == content[48 * 512 : 64 * 512], "blocks discarded in part stay"
    disk.driver.set_status(0)
    disk.driver.device.close()
