"""Disks that a qemu-storage-daemon serves, driven as a guest's driver would."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from host.image_tools import create, qemu_img
from hostel.abi import virtio as abi
from hostel.errors import HelperError
from hostel.host import images
from hostel.host.inputs import checked_disks
from hostel.host.storage import Daemon, Overlay
from hostel.spec import Disk as DiskSpec
from hostel.virtio.vhost_user_blk import VhostUserBlk
from virtio.block_driver import FLUSH, IOERR, OK, Disk, disk_on
from virtio.rig import Rig, eventually, wait_fd

MIB = 1 << 20
SIZE = 8 * MIB
AT = abi.BLK_CONFIG.offsets

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-storage-daemon") and shutil.which("qemu-img")),
    reason="no qemu-storage-daemon or qemu-img (packages qemu-system-common, qemu-utils)",
)


@contextmanager
def served(
    rig: Rig, folder: Path, path: Path, features: int = FLUSH, **fields: Any
) -> Iterator[tuple[Disk, Daemon]]:
    (disk,) = checked_disks((DiskSpec(path=str(path), **fields),))
    overlay = Overlay(disk, folder / "disk0.overlay") if disk.overlay else None
    daemon = Daemon(disk, folder / "disk0.sock", overlay.path if overlay else None)
    try:
        daemon.wait_up()
        assert len(VhostUserBlk.config) >= AT["write_zeroes_may_unmap"], "what Linux reads at once"
        device = VhostUserBlk(
            rig.loop,
            daemon.socket,
            name="disk 0",
            queues=disk.queues,
            write_cache=disk.cache != "writethrough",
        )
        driver = disk_on(rig, device, features=features)
        yield driver, daemon
        rig.unseat(driver.driver)
    finally:
        daemon.stop()
        if overlay:
            overlay.close()


def raw_content(path: Path) -> bytes:
    raw = path.with_suffix(".converted")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx"])
def test_every_format(rig: Rig, tmp_path: Path, format: str) -> None:
    image = create(tmp_path / f"disk.{format}", format, SIZE)
    data = os.urandom(300 << 10)
    with served(rig, tmp_path, image) as (disk, _):
        assert disk.driver.config(AT["capacity"], 8) == SIZE // 512
        assert disk.write(100, data) == OK
        assert disk.request(abi.BLK_T_FLUSH)[0] == OK
        assert disk.read(100, len(data)) == (OK, data)
        assert disk.read(SIZE // 512, 512)[0] == IOERR
    content = raw_content(image)
    assert (
        hashlib.sha256(content[51200 : 51200 + len(data)]).digest() == hashlib.sha256(data).digest()
    )


def test_raw_when_asked_and_several_queues(rig: Rig, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    wanted = FLUSH | 1 << abi.BLK_F_MQ
    with served(rig, tmp_path, image, wanted, queues=3) as (disk, _):
        assert disk.driver.config(AT["num_queues"], 2) == 3
        for queue in range(3):
            header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, queue)
            done = disk.driver.request(queue, [header], [512, 1])
            assert done.data[:512] == image.read_bytes()[512 * queue : 512 * (queue + 1)]


def test_a_segment_may_be_as_long_as_it_likes(rig: Rig, tmp_path: Path) -> None:
    """The daemon says that one has at most 0 bytes: a driver that believed it would cut requests in pages."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    with served(rig, tmp_path, image, plane="vhost-user") as (disk, _):
        offered = disk.driver.read_features()
        said = int.from_bytes(disk.driver.device.config[AT["size_max"] :][:4], "little")
        assert said or not offered >> abi.BLK_F_SIZE_MAX & 1
        assert offered >> abi.BLK_F_SEG_MAX & 1
        header = abi.BLK_OUTHDR.pack(abi.BLK_T_IN, 0, 0)
        done = disk.driver.request(0, [header], [256 << 10, 1])
        assert done.data == image.read_bytes()[: 256 << 10] + bytes([OK])


def test_an_overlay_keeps_its_base(rig: Rig, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(os.urandom(SIZE))
    before = base.read_bytes()
    base.chmod(0o444)
    with served(rig, tmp_path, base, overlay=True) as (disk, _):
        assert disk.read(8, 4096) == (OK, before[4096:8192])
        assert disk.write(8, b"x" * 4096) == OK
        assert disk.read(8, 4096) == (OK, b"x" * 4096)
        assert disk.read(16, 512) == (OK, before[8192:8704])
    assert base.read_bytes() == before
    assert not (tmp_path / "disk0.overlay").is_symlink()


def test_read_only(rig: Rig, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    before = image.read_bytes()
    with served(rig, tmp_path, image, read_only=True) as (disk, _):
        assert disk.driver.read_features() >> abi.BLK_F_RO & 1
        assert disk.write(0, bytes(512)) == IOERR
        assert disk.read(0, 512) == (OK, bytes(512))
    assert image.read_bytes() == before


def test_the_guest_sees_another_size(rig: Rig, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    with served(rig, tmp_path, image) as (disk, daemon):
        daemon.resize(2 * SIZE)
        device = disk.driver.device
        assert isinstance(device, VhostUserBlk)
        device.resize(2 * SIZE)
        assert wait_fd(disk.driver.config_fd())
        assert disk.driver.config(AT["capacity"], 8) == 2 * SIZE // 512
        assert disk.write(2 * SIZE // 512 - 1, b"x" * 512) == OK
        with pytest.raises(HelperError, match="block_resize"):
            daemon.resize(1 << 62)
    assert images.size_of(images.layer(image, "qcow2")) == 2 * SIZE


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_discard_gives_room_back(rig: Rig, tmp_path: Path, format: str) -> None:
    image = create(tmp_path / f"disk.{format}", format, SIZE)
    with served(rig, tmp_path, image) as (disk, _):
        for at in range(0, SIZE, 512 << 10):
            assert disk.write(at // 512, os.urandom(512 << 10)) == OK
        before = image.stat().st_blocks
        assert disk.ranges(abi.BLK_T_DISCARD, (0, SIZE // 1024, 0)) == OK
        assert disk.request(abi.BLK_T_FLUSH)[0] == OK
        assert image.stat().st_blocks < before * 0.6


@pytest.mark.parametrize(("cache", "wce"), [("writeback", 1), ("writethrough", 0)])
def test_the_write_cache_is_the_drivers_to_choose(
    rig: Rig, tmp_path: Path, cache: str, wce: int
) -> None:
    image = create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    wanted = FLUSH | 1 << abi.BLK_F_CONFIG_WCE
    with served(rig, tmp_path, image, wanted, cache=cache) as (disk, _):
        assert disk.driver.config(AT["wce"], 1) == wce
        disk.driver.write_config(AT["wce"], 1, 1 - wce)
        assert disk.driver.config(AT["wce"], 1) == 1 - wce
        assert disk.write(0, b"x" * 512) == OK


def test_one_writer(rig: Rig, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    (spec,) = checked_disks((DiskSpec(path=str(image)),))
    with served(rig, tmp_path, image):
        second = Daemon(spec, tmp_path / "disk1.sock")
        try:
            with pytest.raises(HelperError, match=r"lock.*stop the other machine"):
                second.wait_up()
        finally:
            second.stop()


def test_a_write_that_was_flushed_survives_a_kill(rig: Rig, tmp_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "qcow2", SIZE)
    data = os.urandom(64 << 10)
    with served(rig, tmp_path, image) as (disk, daemon):
        assert disk.write(77, data) == OK
        assert disk.request(abi.BLK_T_FLUSH)[0] == OK
        os.kill(daemon.helper.pid, signal.SIGKILL)
        assert eventually(lambda: disk.driver.needs_reset), "the device has gone, the machine lives"
    assert raw_content(image)[77 * 512 : 77 * 512 + len(data)] == data
    qemu_img("check", "-q", image)


def test_a_full_disk_under_an_overlay_is_an_io_error(
    rig: Rig, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    base = tmp_path / "base.img"
    base.write_bytes(bytes(SIZE))
    with served(rig, tmp_path, base, overlay=True) as (disk, _):
        statuses = [disk.write(at * 2048, os.urandom(512 << 10)) for at in range(8)]
        assert statuses[0] == OK
        assert IOERR in statuses
        assert disk.read(0, 512)[0] == OK
    assert not list(small_disk.rglob("tmp*"))


def test_rates_hold(rig: Rig, tmp_path: Path) -> None:
    import time

    from hostel.spec import Limits, Rate

    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    limits = Limits(bytes=Rate(per_second=4 * MIB))
    with served(rig, tmp_path, image, plane="vhost-user", limits=limits) as (disk, _):
        begun = time.monotonic()
        for _ in range(24):
            assert disk.read(0, 512 << 10)[0] == OK
        rate = (24 * (512 << 10) - 4 * MIB) / (time.monotonic() - begun)
        assert 0.8 * 4 * MIB < rate < 1.2 * 4 * MIB
