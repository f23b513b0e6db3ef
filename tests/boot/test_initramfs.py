"""The initramfs: what cpio(1) makes of it, the cache, a user's own initrd before it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from hostel.boot import initramfs
from hostel.errors import HostError, ImageError

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hostel" / "initramfs"


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"the agent")
    return path


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """Modules without any ELF in them depend on nothing."""
    directory = tmp_path / "modules"
    (directory / "kernel").mkdir(parents=True)
    for name in ("b", "a-x"):
        (directory / "kernel" / f"{name}.ko").write_bytes(name.encode() * 3)
    (directory / "modules.order").write_text("kernel/b.ko\nkernel/a-x.ko\n")
    return directory


def unpack(image: Path, target: Path) -> list[str]:
    """By cpio(1), whose reading of the format is not ours."""
    target.mkdir()
    command = ["cpio", "-idm", "--quiet", "--no-absolute-filenames"]
    subprocess.run(command, cwd=target, input=image.read_bytes(), check=True, capture_output=True)
    return sorted(str(path.relative_to(target)) for path in target.rglob("*"))


@needs_cpio
@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes, which only root may make")
def test_contents(cache: Path, agent: Path, modules: Path, tmp_path: Path) -> None:
    image = initramfs.build(modules, "6.1", ["b", "a_x"], agent)
    root = tmp_path / "root"
    assert unpack(image, root) == [
        *("dev", "dev/console", "dev/null", "hostel", "hostel/modules"),
        *("hostel/modules/a_x.ko", "hostel/modules/b.ko", "hostel/modules/list", "init"),
    ]
    assert (root / "init").read_bytes() == b"the agent"
    assert stat.S_IMODE((root / "init").stat().st_mode) == 0o755
    assert (root / "hostel/modules/list").read_text() == "b.ko\na_x.ko\n"
    assert (root / "hostel/modules/a_x.ko").read_bytes() == b"a-x" * 3
    for name, device in (("console", (5, 1)), ("null", (1, 3))):
        info = (root / "dev" / name).stat()
        assert stat.S_ISCHR(info.st_mode)
        assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == device


def test_cached_and_reproducible(cache: Path, agent: Path, modules: Path) -> None:
    first = initramfs.build(modules, "6.1", ["b"], agent)
    stamp, content = first.stat().st_mtime_ns, first.read_bytes()
    assert initramfs.build(modules, "6.1", ["b"], agent) == first
    assert first.stat().st_mtime_ns == stamp
    first.unlink()
    assert initramfs.build(modules, "6.1", ["b"], agent).read_bytes() == content
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert len(content) % 4 == 0


def test_whatever_changes_gives_another(
    cache: Path, agent: Path, modules: Path, tmp_path: Path
) -> None:
    seen = {initramfs.build(modules, "6.1", ["b"], agent)}
    seen.add(initramfs.build(modules, "6.1", ["b", "a-x"], agent))
    seen.add(initramfs.build(modules, "6.1", [], agent, optional=["b"]))
    seen.add(initramfs.build(modules, "6.2", ["b"], agent))
    seen.add(initramfs.build(None, "6.1", ["b"], agent))
    user = tmp_path / "user.img"
    user.write_bytes(b"x")
    seen.add(initramfs.build(modules, "6.1", ["b"], agent, initrd=user))
    user.write_bytes(b"xx")
    seen.add(initramfs.build(modules, "6.1", ["b"], agent, initrd=user))
    agent.write_bytes(b"another agent")
    seen.add(initramfs.build(modules, "6.1", ["b"], agent))
    (modules / "modules.order").write_text("kernel/b.ko\n")
    seen.add(initramfs.build(modules, "6.1", ["b"], agent))
    assert len(seen) == 9


def test_without_modules(cache: Path, agent: Path) -> None:
    content = initramfs.build(None, "", ["virtio_pci"], agent).read_bytes()
    assert b".ko" not in content
    assert b"the agent" in content


@pytest.mark.parametrize("size", range(5))
def test_a_users_initrd_comes_first(cache: Path, agent: Path, tmp_path: Path, size: int) -> None:
    """Padded to four bytes, where the kernel looks for the next archive."""
    user = tmp_path / "user.img"
    user.write_bytes(b"u" * size)
    content = initramfs.build(None, "6.1", [], agent, initrd=user).read_bytes()
    start = (size + 3) // 4 * 4
    assert content[:start] == b"u" * size + bytes(start - size)
    assert content[start : start + 6] == b"070701"
    assert content[start:] == initramfs.archive(b"the agent", {})


def test_missing_initrd(cache: Path, agent: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.img cannot be read: No such file"):
        initramfs.build(None, "6.1", [], agent, initrd=tmp_path / "nothing.img")


def test_missing_module(cache: Path, agent: Path, modules: Path) -> None:
    with pytest.raises(HostError, match="no module virtiofs"):
        initramfs.build(modules, "6.1", ["virtiofs"], agent)
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_made(agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(HostError, match="XDG_CACHE_HOME"):
        initramfs.build(None, "6.1", [], agent)


def test_failed_write_leaves_nothing(
    cache: Path, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(HostError, match="No space left"):
        initramfs.build(None, "6.1", [], agent)
    assert list(cache.iterdir()) == []
