"""Which thread does a block request: the disk's own where the page cache has it, workers otherwise."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostel.abi import virtio as abi
from hostel.virtio import block as block_module
from hostel.virtio.blk_file import DiskFile
from hostel.virtio.blk_request import Request
from hostel.virtio.block import Block
from virtio.block_driver import OK, disk_on
from virtio.rig import Rig

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_cached_read_needs_no_worker(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image.read_bytes()
    disk = disk_on(rig, Block(rig.loop, str(image), name="cached"))
    device = disk.driver.device
    assert isinstance(device, Block)
    room = bytearray(512)
    if not device.disk.read_cached([memoryview(room)], 0, 512):
        pytest.skip("this file system does not say what is cached (RWF_NOWAIT)")
    monkeypatch.setattr(DiskFile, "read", lambda *_: pytest.fail("a worker was asked"))
    assert disk.read(9, 4096) == (OK, content[9 * 512 : 9 * 512 + 4096])


def test_a_file_system_that_cannot_say_what_is_cached_is_asked_once(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    disk, room = DiskFile(str(image)), [memoryview(bytearray(512))]
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(DiskFile, "_is_in_memory", lambda self: False)
    assert not disk.read_cached(room, 0, 512)
    assert not disk.read_cached(room, 0, 512)
    assert asked == [os.RWF_NOWAIT]
    disk.close()


def test_a_disk_in_memory_is_read_at_once(rig: Rig, small_disk: Path) -> None:
    """tmpfs does not say what is cached: all of it is."""
    image = small_disk / "image"
    image.write_bytes(os.urandom(MIB // 2))
    block = Block(rig.loop, str(image), name="shm")
    disk = disk_on(rig, block)
    content = image.read_bytes()
    assert disk.read(1, 512) == (OK, content[512:1024])
    assert block.disk.read_cached([memoryview(bytearray(512))], 0, 512)
    assert not block.disk.read_cached([memoryview(bytearray(512))], MIB // 2 - 256, 512)
    disk.driver.set_status(0)
    block.close()


class LargeRequests:
    """A disk, and which of its requests workers have done."""

    size = 2 * block_module.AT_ONCE

    def __init__(self, rig: Rig, image: Path, kind: int, patch: pytest.MonkeyPatch) -> None:
        self.block = Block(rig.loop, str(image), name="large")
        self.kind, self.content = kind, image.read_bytes()
        self.by_workers: list[int] = []
        answer = Block._answer

        def spy(block: Block, request: Request) -> tuple[int, int]:
            self.by_workers.append(request.sector)
            return answer(block, request)

        patch.setattr(Block, "_answer", spy)
        self.driver = disk_on(rig, self.block).driver
        if not self.block.disk.read_cached([memoryview(bytearray(512))], 0, 512):
            pytest.skip("this file system does not say what is cached (RWF_NOWAIT)")

    def add(self, sector: int) -> None:
        header = abi.BLK_OUTHDR.pack(self.kind, 0, sector)
        if self.kind == abi.BLK_T_IN:
            self.driver.queues[0].add([header], [self.size, 1])
        else:
            self.driver.queues[0].add([header, self.content[512 * sector :][: self.size]], [1])

    def wait(self, count: int) -> None:
        self.driver.kick(0)
        assert [done.data[-1] for done in self.driver.wait(0, count)] == [OK] * count


@pytest.fixture(params=[abi.BLK_T_IN, abi.BLK_T_OUT])
def large(
    request: pytest.FixtureRequest, rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> LargeRequests:
    return LargeRequests(rig, image, request.param, monkeypatch)


def test_large_requests_one_after_another_need_no_worker(large: LargeRequests) -> None:
    for turn in range(3):
        large.add(turn)
        large.wait(1)
    assert not large.by_workers


def test_several_large_requests_are_shared_by_workers(large: LargeRequests, image: Path) -> None:
    with large.block.lock:  # all are there before one is served
        for turn in range(3):
            large.add(turn)
        large.driver.kick(0)
    large.wait(3)
    assert sorted(large.by_workers) == [0, 1, 2]
    assert image.read_bytes() == large.content


def test_a_large_request_that_comes_during_another_is_a_workers(
    large: LargeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("read_cached", "write_cached"):
        move = getattr(DiskFile, name)

        def slowly(*arguments: Any, move: Callable[..., bool] = move) -> bool:
            if not second:
                second.append(1)
                large.add(1)
            return move(*arguments)

        monkeypatch.setattr(DiskFile, name, slowly)
    second: list[int] = []
    large.add(0)
    large.wait(2)
    assert large.by_workers == [1]
