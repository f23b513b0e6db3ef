"""Guest kernels: which is found, which is meant, and fetching one from a real apt archive of our own."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from hostel import cache
from hostel.errors import HelperError, HostError, ImageError, MissingTool
from hostel.host import fetch as fetching
from hostel.host import kernels
from hostel.host.fetch import fetch

needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb"))), reason="no apt here"
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, and a host without kernels of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_boot", list)
    monkeypatch.setattr(kernels, "_module_trees", list)
    folder = tmp_path / "cache" / "hostel" / "kernels"
    folder.mkdir(parents=True)
    return folder


def bzimage(release: str) -> bytes:
    """The head of a bzImage that says its release (boot.rst: kernel_version)."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x600)
    text = f"{release} (somebody@somewhere) #1 SMP".encode() + b"\0"
    head[0x800 : 0x800 + len(text)] = text
    return bytes(head)


def add(store: Path, release: str, *, modules: str = "lib/modules") -> Path:
    tree = store / release
    image = tree / "boot" / f"vmlinuz-{release}"
    image.parent.mkdir(parents=True)
    image.write_bytes(bzimage(release))
    if modules:
        (tree / modules / release / "kernel").mkdir(parents=True)
    return image


# -- finding ----------------------------------------------------------------------------------


def test_no_kernel_names_the_cure(store: Path) -> None:
    assert kernels.survey() == ()
    with pytest.raises(ImageError, match="hostel kernel fetch"):
        kernels.find()


def test_best_is_usable_with_modules_cloud_and_newest(store: Path) -> None:
    add(store, "6.1.0-9-cloud-amd64")
    add(store, "6.1.0-10-cloud-amd64", modules="usr/lib/modules")
    add(store, "6.12.0-1-amd64")
    add(store, "6.13.0-1-cloud-amd64", modules="")
    add(store, "6.14.0-1-cloud-amd64").write_bytes(b"")
    order = [kernel.release for kernel in kernels.survey()]
    assert order == [
        "6.1.0-10-cloud-amd64",
        "6.1.0-9-cloud-amd64",
        "6.12.0-1-amd64",
        "6.13.0-1-cloud-amd64",
        "6.14.0-1-cloud-amd64",
    ]
    best = kernels.find()
    assert best.source == "fetched"
    assert best.modules == store / best.release / "usr/lib/modules" / best.release


def test_kernel_of_the_host_that_may_not_be_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "vmlinuz-6.8.0-1-generic"
    image.write_bytes(bzimage("6.8.0-1-generic"))
    image.chmod(0)
    if os.access(image, os.R_OK):
        monkeypatch.setattr(os, "access", lambda path, mode: path != image)
    monkeypatch.setattr(
        kernels, "_boot", lambda: [kernels._kernel("6.8.0-1-generic", image, tmp_path, "host")]
    )
    assert "chmod +r" in kernels.survey()[0].problem
    with pytest.raises(ImageError, match="not readable by you"):
        kernels.find()
    with pytest.raises(ImageError, match="not readable by you"):
        kernels.find("6.8.0-1-generic")


def test_find_by_release_and_by_path(store: Path, tmp_path: Path) -> None:
    image = add(store, "6.1.0-9-cloud-amd64")
    assert kernels.find("6.1.0-9-cloud-amd64").image == image
    by_path = kernels.find(str(image))
    assert (by_path.source, by_path.release) == ("file", "6.1.0-9-cloud-amd64")
    assert by_path.modules == kernels.find().modules

    elsewhere = tmp_path / "bzImage"
    elsewhere.write_bytes(bzimage("6.1.0-9-cloud-amd64"))
    assert kernels.find(str(elsewhere)).modules == by_path.modules, "the store knows this release"


def test_release_in_a_file_is_not_trusted(store: Path, tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(bzimage("../../../etc"))
    assert kernels.find(str(image)).release == ""
    image.write_bytes(b"MZ")
    assert kernels.find(str(image)).release == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("6.1.0-8-cloud-amd64", "did you mean 6.1.0-9-cloud-amd64"),
        ("nothing-like-it", "hostel kernel ls"),
        ("/no/such/file", "no such file"),
        ("/dev/null", "not a regular file"),
        ("/usr", "not a regular file"),
        ("/" + 300 * "x", "File name too long"),
        (300 * "x", "no kernel"),
    ],
)
def test_what_is_no_kernel(store: Path, name: str, message: str) -> None:
    add(store, "6.1.0-9-cloud-amd64")
    with pytest.raises(ImageError, match=message):
        kernels.find(name)


def test_leftovers_of_a_fetch_are_no_kernels(store: Path) -> None:
    add(store, ".fetch-abc")
    assert kernels.survey() == ()


def test_versions_sort_as_people_count() -> None:
    releases = ["6.1.0-9", "6.1.0-10", "6.12~rc1", "6.12", "6.12.1", "10.0"]
    assert sorted(reversed(releases), key=kernels.version_key) == releases


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.home() == Path.home() / ".cache" / "hostel"


# -- fetching ---------------------------------------------------------------------------------

RELEASE = "6.99.0-1-cloud-amd64"
IMAGE = f"linux-image-{RELEASE}"


def package(folder: Path, name: str, fields: str, files: dict[str, bytes]) -> None:
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 6.99-1\nArchitecture: all\nMaintainer: a\n{fields}"
    (tree / "DEBIAN" / "control").write_text(f"{control}Description: a\n")
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", tree, folder / f"{name}.deb"],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(tree)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package archive in a folder, as apt's only source, and no lists of it on the host yet."""
    folder = tmp_path / "archive"
    folder.mkdir()
    modules = f"lib/modules/{RELEASE}/kernel/fs/fuse/fuse.ko"
    files = {f"boot/vmlinuz-{RELEASE}": bzimage(RELEASE), modules: b"module"}
    package(folder, IMAGE, "Installed-Size: 200\n", files)
    package(folder, "linux-image-cloud-amd64", f"Depends: {IMAGE} (= 6.99-1)\n", {})
    package(folder, "linux-image-6.98.0-1-empty", "", {})
    large = {"boot/vmlinuz-6.97.0-1-large": bytes(4 << 20)}
    package(folder, "linux-image-6.97.0-1-large", "", large)
    index(folder)
    etc = tmp_path / "apt"
    (etc / "lists" / "partial").mkdir(parents=True)
    (etc / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    (etc / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{etc}/sources.list";\nDir::Etc::sourceparts "/nonexistent";\n'
        f'Dir::State::lists "{etc}/lists";\n'
        # A hook of the host's that must not be run for lists that are not the host's.
        f'APT::Update::Post-Invoke {{ "touch {etc}/hook; false"; }};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(etc / "apt.conf"))
    return folder


def index(folder: Path) -> None:
    """``Packages``, as dpkg-scanpackages (of another package) would write it."""
    blocks = []
    for deb in sorted(folder.glob("*.deb")):
        control = subprocess.run(
            ["dpkg-deb", "-f", deb], check=True, capture_output=True, text=True
        )
        digest = subprocess.run(["sha256sum", deb], check=True, capture_output=True, text=True)
        size = deb.stat().st_size
        blocks.append(
            f"{control.stdout}Filename: ./{deb.name}\nSize: {size}\nSHA256: {digest.stdout[:64]}\n"
        )
    (folder / "Packages").write_text("\n".join(blocks))


def contents(store: Path) -> list[str]:
    return sorted(entry.name for entry in store.iterdir() if entry.name != ".lock")


@needs_apt
def test_fetch_without_lists_announces_and_unpacks(store: Path, archive: Path) -> None:
    said: list[str] = []
    steps: list[float] = []
    kernel = fetch(say=said.append, progress=steps.append)
    assert kernel.release == RELEASE
    assert kernel.image.read_bytes() == bzimage(RELEASE)
    assert kernel.modules is not None
    assert (kernel.modules / "kernel/fs/fuse/fuse.ko").read_bytes() == b"module"
    assert kernel == kernels.find()
    assert "lists of our own" in said[0]
    assert IMAGE in said[1]
    assert "MiB" in said[1]
    assert steps[-1] == 100
    assert contents(store) == [RELEASE]
    assert not (archive.parent / "apt" / "hook").exists()


@needs_apt
def test_fetch_again_downloads_nothing(store: Path, archive: Path) -> None:
    first = fetch(say=lambda text: None)
    (archive / f"{IMAGE}.deb").unlink()
    said: list[str] = []
    assert fetch(say=said.append) == first
    assert not any("downloading" in line for line in said)


@needs_apt
def test_fetch_by_the_name_of_the_image(store: Path, archive: Path) -> None:
    assert fetch(IMAGE, say=lambda text: None).release == RELEASE


@needs_apt
def test_concurrent_fetches_make_one_kernel(store: Path, archive: Path) -> None:
    results: list[kernels.Kernel] = []

    def one() -> None:
        results.append(fetch(say=lambda text: None))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [kernel.release for kernel in results] == [RELEASE] * 3
    assert contents(store) == [RELEASE]


@needs_apt
def test_what_a_killed_fetch_left_is_removed(store: Path, archive: Path) -> None:
    (store / ".fetch-old" / "tree").mkdir(parents=True)
    fetch(say=lambda text: None)
    assert contents(store) == [RELEASE]


@needs_apt
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linux-image-nothing", "apt knows no kernel package linux-image-nothing"),
        ("bash; rm -rf /", "apt knows no kernel package"),
        ("linux-image-6.98.0-1-empty", "has no boot/vmlinuz-6.98.0-1-empty"),
    ],
)
def test_packages_without_a_kernel(store: Path, archive: Path, name: str, message: str) -> None:
    with pytest.raises((HostError, ImageError), match=message):
        fetch(name, say=lambda text: None)
    assert contents(store) == []


@needs_apt
def test_damaged_package_is_refused(store: Path, archive: Path) -> None:
    deb = archive / f"{IMAGE}.deb"
    deb.write_bytes(deb.read_bytes()[:-1] + b"!")
    with pytest.raises(HelperError, match="could not download"):
        fetch(say=lambda text: None)
    assert contents(store) == []


@needs_apt
def test_no_space_is_one_line_and_nothing_left(
    store: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HostError, match="no space"):
        fetch(say=lambda text: None)
    assert contents(store) == []


@needs_apt
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a full disk needs root")
def test_a_disk_that_fills_up(store: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, that holds the package but not what is in it."""
    monkeypatch.setattr(fetching, "_need_space", lambda store, wanted: None)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(store)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(HostError, match="No space left on device; make room"):
            fetch("linux-image-6.97.0-1-large", say=lambda text: None)
        assert contents(store) == []
    finally:
        subprocess.run(["umount", str(store)], check=True)


def test_a_host_without_apt(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingTool, match="not Debian"):
        fetch(say=lambda text: None)


def test_a_cache_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    monkeypatch.setattr(fetching, "_need_tools", lambda: None)
    with pytest.raises(HostError, match="cannot store a kernel"):
        fetch(say=lambda text: None)
