"""Disks as a Linux guest sees them, one machine an engine: formats, overlays, sizes, discards, rates."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostel
from cli.hostel_command import HOSTEL
from host.image_tools import create, needs_qemu_img, qemu_img
from hostel.errors import HostelError
from hostel.host import images
from hostel.spec import Disk, Limits, Rate

MIB = 1 << 20
PATTERN = os.urandom(MIB)
QCOW2, OVERLAY, PLAIN, SLOW, VHDX, ODD, ODD_OVERLAY = range(7)

pytestmark = [pytest.mark.slow, needs_qemu_img]


class Guest:
    def __init__(self, vm: hostel.Machine, folder: Path) -> None:
        self.vm, self.folder = vm, folder

    def sh(self, script: str) -> str:
        result = self.vm.exec(["sh", "-ec", script], user="root")
        assert result.exit_code == 0, result.stderr.decode()
        return result.stdout.decode().strip()


ENGINES = [
    pytest.param("qemu", marks=pytest.mark.qemu),
    pytest.param("kvm", marks=pytest.mark.linux_kvm),
]


@pytest.fixture(scope="module", params=ENGINES)
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("disks")
    create(folder / "disk.qcow2", "qcow2")
    create(folder / "disk.vhdx", "vhdx", 32 * MIB)
    for name in ("base.img", "plain.img", "slow.img"):
        (folder / name).write_bytes(PATTERN * 16)
    (folder / "base.img").chmod(0o444)
    for name in ("odd.img", "odd-base.img"):
        (folder / name).write_bytes(PATTERN + b"the end")
    disks = (
        Disk(path=str(folder / "disk.qcow2"), queues=2),
        Disk(path=str(folder / "base.img"), overlay=True),
        Disk(path=str(folder / "plain.img"), serial="PLAIN-1", cache="writethrough"),
        Disk(path=str(folder / "slow.img"), limits=Limits(bytes=Rate(per_second=4 * MIB))),
        Disk(path=str(folder / "disk.vhdx")),
        Disk(path=str(folder / "odd.img")),
        Disk(path=str(folder / "odd-base.img"), overlay=True),
    )
    with hostel.Machine(engine=request.param, disks=disks, memory=256 * MIB, cpus=2) as vm:
        yield Guest(vm, folder)
    check_after(folder)


def check_after(folder: Path) -> None:
    """When the machine has ended: what was flushed is there, the overlay is not."""
    qemu_img("check", "-q", folder / "disk.qcow2")
    qemu_img("convert", "-O", "raw", folder / "disk.qcow2", folder / "converted")
    with (folder / "converted").open("rb") as file:
        file.seek(8 * MIB)
        assert file.read(MIB) == PATTERN
    assert (folder / "base.img").read_bytes() == PATTERN * 16


def test_formats_carry_the_same_bytes(guest: Guest) -> None:
    for device in ("vda", "vde"):
        guest.sh(f"dd if=/dev/vdc of=/dev/{device} bs=1M count=1 seek=8 conv=fsync status=none")
        guest.sh("echo 3 > /proc/sys/vm/drop_caches")
        found = guest.sh(f"dd if=/dev/{device} bs=1M skip=8 count=1 status=none | sha256sum")
        assert found.split()[0] == hashlib.sha256(PATTERN).hexdigest()


@pytest.mark.parametrize("disk", ["vdf", "vdg"])
def test_a_size_that_is_no_multiple_of_a_sector(guest: Guest, disk: str) -> None:
    """The same on every engine: nothing of the file is hidden, and zeroes fill its last sector."""
    assert guest.sh(f"blockdev --getsize64 /dev/{disk}") == str(MIB + 512)
    assert guest.sh(f"tail -c 512 /dev/{disk} | tr -d '\\0'") == "the end"
    writing = f"dd of=/dev/{disk} bs=1 seek={MIB + 500} conv=fsync status=none"
    guest.sh(f"printf 'is written' | {writing}")
    assert guest.sh(f"tail -c 12 /dev/{disk} | tr -d '\\0'") == "is written"


def test_an_overlay_keeps_what_is_written_to_itself(guest: Guest) -> None:
    guest.sh("echo changed | dd of=/dev/vdb conv=fsync,notrunc status=none")
    guest.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.sh("head -n 1 /dev/vdb") == "changed"
    assert (guest.folder / "base.img").read_bytes() == PATTERN * 16


def test_queues_serial_and_cache(guest: Guest) -> None:
    assert guest.sh("ls /sys/block/vda/mq | wc -l") == "2"
    assert guest.sh("cat /sys/block/vdc/serial") == "PLAIN-1"
    assert guest.sh("cat /sys/block/vda/cache_type /sys/block/vdc/cache_type").split("\n") == [
        "write back",
        "write through",
    ]
    guest.sh("echo 'write back' > /sys/block/vdc/cache_type")
    assert guest.sh("cat /sys/block/vdc/cache_type") == "write back"


def test_a_new_size_is_seen(guest: Guest) -> None:
    for index, device, name in ((QCOW2, "vda", "disk.qcow2"), (PLAIN, "vdc", "plain.img")):
        guest.vm.resize_disk(index, 96 * MIB)
        seen = f"for i in $(seq 100); do s=$(blockdev --getsize64 /dev/{device}); "
        assert guest.sh(seen + f"[ $s = {96 * MIB} ] && break; sleep 0.1; done; echo $s") == str(
            96 * MIB
        )
        path = guest.folder / name
        assert images.size_of(images.layer(path, images.format_of(path))) == 96 * MIB
        guest.sh(
            f"dd if=/dev/zero of=/dev/{device} bs=4k seek=24575 count=1 conv=fsync status=none"
        )


def test_a_size_that_cannot_be(guest: Guest) -> None:
    for index, size in ((17, MIB), (-1, MIB), (QCOW2, 1000), (QCOW2, 0), (QCOW2, 1 << 62)):
        with pytest.raises(HostelError):
            guest.vm.resize_disk(index, size)
    assert guest.sh("head -c 1 /dev/vda | wc -c") == "1"


def test_discard_shrinks_the_file(guest: Guest) -> None:
    for index, device, name in ((QCOW2, "vda", "disk.qcow2"), (PLAIN, "vdc", "plain.img")):
        guest.sh(f"dd if=/dev/vdb of=/dev/{device} bs=1M seek=40 count=8 conv=fsync status=none")
        path = guest.folder / name
        before = path.stat().st_blocks
        guest.sh(f"blkdiscard -o {40 * MIB} -l {8 * MIB} /dev/{device}; sync /dev/{device}")
        assert path.stat().st_blocks <= before - (6 * MIB >> 9), index


def test_a_rate_holds_within_a_fifth(guest: Guest) -> None:
    """12 MiB, of which 4 may come at once. Never faster; slower only where the host has no time, so that
    counts if it happens three times."""
    script = "sleep 1; dd if=/dev/vdd of=/dev/null bs=256k count=48 iflag=direct 2>&1 | tail -n 1"
    ratios: list[float] = []
    while len(ratios) < 3 and not (ratios and ratios[-1] > 0.8):
        seconds = float(guest.sh(script).split(", ")[-2].split()[0])
        ratios.append(8 / seconds / 4)
        assert ratios[-1] < 1.2
    assert max(ratios) > 0.8


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_host_is_an_io_error_and_the_machine_goes_on(engine: str, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", tmp_path], check=True)
    try:
        image = tmp_path / "disk.img"
        image.touch()
        os.truncate(image, 16 * MIB)
        disks = (Disk(path=str(image)),)
        with hostel.Machine(engine=engine, disks=disks, memory=256 * MIB) as vm:
            write = ["dd", "if=/dev/zero", "of=/dev/vda", "bs=1M", "count=16", "conv=fsync"]
            result = vm.exec(write, user="root", timeout=60)
            assert result.exit_code == 1
            assert b"Input/output error" in result.stderr
            assert vm.exec(["head", "-c", "1", "/dev/vda"], user="root", timeout=60).stdout == b"\0"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.linux_kvm
def test_a_daemon_that_ends_is_told_of(tmp_path: Path) -> None:
    create(tmp_path / "disk.qcow2", "qcow2")
    command = [HOSTEL, "run", "--engine", "kvm", "--net", "none", "-m", "256M"]
    command += ["--disk", str(tmp_path / "disk.qcow2"), "--", "sh", "-c", "echo up; read word"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        tasks = Path(f"/proc/{run.pid}/task").glob("*/children")
        pids = [pid for task in tasks for pid in task.read_text().split()]
        (daemon,) = [pid for pid in pids if "storage-da" in Path(f"/proc/{pid}/comm").read_text()]
        os.kill(int(daemon), signal.SIGKILL)
        said = run.communicate(b"word\n", timeout=60)[1].decode()
    assert run.returncode == 0
    assert "hostel: disk 0: the vhost-user backend hung up; what the guest asks of it" in said
