"""What QEMU's programs are told of a disk, overlays without a name, and the plan of a machine with disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from host.image_tools import create, needs_qemu_img
from hostel import disks, prepare
from hostel.errors import ImageError, SpecError
from hostel.host import images, storage
from hostel.host.inputs import checked_disks
from hostel.plan import Drive, Plan
from hostel.spec import Disk, Limits, MachineSpec, Rate, Root

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def checked(path: Path, **fields: Any) -> Disk:
    (disk,) = checked_disks((Disk(path=str(path), **fields),))
    return disk


def test_nothing_is_opened_but_what_is_named(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    header = images.empty_qcow2(MIB)
    place, name = 112, b"disk.img"
    top.write_bytes(
        header[:8] + place.to_bytes(8, "big") + len(name).to_bytes(4, "big") + header[20:place]
    )
    with top.open("r+b") as file:
        file.seek(place)
        file.write(name)
    disk = checked(top)
    assert storage.followed(disk) == [image]
    node = storage.graph(disk, "disk0")
    assert node["driver"] == "qcow2"
    assert node["backing"] == {
        "driver": "raw",
        "file": {"driver": "file", "filename": str(image), "aio": "threads"},
    }
    alone = storage.graph(checked(image, overlay=True), "disk0", tmp_path / "layer")
    assert alone["file"]["filename"] == str(tmp_path / "layer")
    assert alone["backing"]["file"]["filename"] == str(image)


@pytest.mark.parametrize(
    ("rate", "limits"),
    [
        (Rate(per_second=100), {"bps-total": 100, "bps-total-max": 100}),
        (Rate(per_second=100, burst=500), {"bps-total": 100, "bps-total-max": 500}),
        (Rate(per_second=100, burst=50), {"bps-total": 100}),
    ],
)
def test_rates(image: Path, rate: Rate, limits: dict[str, int]) -> None:
    disk = checked(image, limits=Limits(bytes=rate))
    assert storage.limits(disk, "disk0")["limits"] == limits
    assert storage.graph(disk, "disk0")["driver"] == "throttle"


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("writeback", {"direct": False, "no-flush": False}),
        ("writethrough", {"direct": False, "no-flush": False}),
        ("none", {"direct": True, "no-flush": False}),
        ("unsafe", {"direct": False, "no-flush": True}),
    ],
)
def test_cache_modes(image: Path, cache: str, options: dict[str, bool]) -> None:
    assert storage.graph(checked(image, cache=cache), "disk0")["cache"] == options


def test_an_overlay_is_gone_however_we_end(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    overlay = storage.Overlay(checked(image), tmp_path / "disk0.overlay")
    assert overlay.path.read_bytes()[:4] == b"QFI\xfb"
    overlay.close()
    overlay.close()
    assert not overlay.path.is_symlink()
    script = (
        "import sys; from pathlib import Path; from hostel.host import storage\n"
        "from hostel.host.inputs import checked_disks; from hostel.spec import Disk\n"
        "(disk,) = checked_disks((Disk(path=sys.argv[1]),))\n"
        "overlay = storage.Overlay(disk, Path(sys.argv[2]))\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(image), str(tmp_path / "disk1.overlay")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert list((tmp_path / "cache").rglob("*.*")) == []
        child.send_signal(signal.SIGKILL)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


# --- plans -------------------------------------------------------------------------------------


def drives(engine: str, *given: Disk) -> list[Drive]:
    choice = prepare.Choice(engine, "kvm", "")  # type: ignore[arg-type]
    return list(prepare._drives(checked_disks(given), choice, Path("/run/x")))


@needs_qemu_img
def test_who_serves_what(tmp_path: Path, image: Path) -> None:
    raw = Disk(path=str(image))
    overlay = Disk(path=str(image), overlay=True)
    qcow2 = Disk(path=str(create(tmp_path / "d.qcow2", "qcow2")))
    asked = Disk(path=str(image), plane="vhost-user")
    found = drives("kvm", raw, overlay, qcow2, asked)
    assert [drive.socket and drive.socket.name for drive in found] == [
        None,
        "disk1.sock",
        "disk2.sock",
        "disk3.sock",
    ]
    assert [bool(drive.overlay) for drive in found] == [False, True, False, False]
    assert [drive.keeps_writes for drive in found] == [True, False, True, True]
    assert [drive.socket for drive in drives("qemu", raw, overlay, qcow2, asked)] == [None] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overlay": True, "plane": "python"}, "Python plane serves raw"),
        ({"overlay": True, "serial": "S"}, "no serial"),
    ],
)
def test_what_cannot_be_served(image: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        drives("kvm", Disk(path=str(image), **fields))


def test_what_is_said_of_a_disk(image: Path) -> None:
    image.write_bytes(b"QFI\xfb" + bytes(MIB))
    (note,) = prepare._disk_notes((checked(image),))
    assert "taken as raw" in note


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        checked(tmp_path)
    if os.geteuid() == 0:
        pytest.skip("root may write all")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    image.chmod(0o444)
    with pytest.raises(ImageError, match=r"disk\.img:ro, or .*,overlay"):
        checked(image)
    assert checked(image, overlay=True).overlay


def test_a_full_file_system_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MachineSpec(root=Root(kind="none"), disks=(Disk(path=str(image)),))
    plan = Plan(
        spec=spec,
        engine="kvm",
        reason="",
        kernel=Path(),
        release="",
        initrd=None,
        cmdline="",
        disks=(Drive(spec.disks[0]), Drive(Disk(path=str(image), read_only=True))),
        shares=(),
        runtime=Path(),
    )
    assert disks.full(plan) == []
    monkeypatch.setattr(disks, "FULL", 1 << 60)
    (line,) = disks.full(plan)
    assert f"the file system of {image} is full" in line


def test_io_uring_where_host_and_daemon_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hostel.abi import io_uring

    without = tmp_path / "daemon"
    without.write_bytes(b"\x7fELF, and libaio.so.1")
    assert storage._aio(str(without)) == "threads"
    without.write_bytes(b"\x7fELF, and liburing.so.2")
    found = storage._aio(str(without))
    monkeypatch.setattr(io_uring, "SYS_SETUP", 9999)
    assert storage._aio(str(without)) == "threads", "the host has none"
    if found == "threads":
        pytest.skip("no io_uring here")
