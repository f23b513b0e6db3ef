"""``hostel run`` by a user who is not root: whose files the guest sees, and what it may not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import lz4
import msgspec
import pytest
import qemu.qmp
import zstandard

import hostel
from hostel.host import kernels

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="plays another user: needs root"),
]
USER, GROUP = 54323, 54324
Run = Callable[..., dict[str, str]]

LOOKS = """
look() { echo "$1=$(shift; "$@" 2>&1 | tail -n 1)"; }
look groups id -G
look owners stat -c %u:%g /etc/passwd "$1/grouped" "$1/private"
look passwd stat -c %u /etc/passwd
look grouped cat "$1/grouped"
look private cat "$1/private"
look own sh -c "cat '$1/own'"
sleep 3 | su > /dev/null 2>&1 & sleep 1
echo "su=$(grep ^Uid /proc/$!/status | tr -s '[:space:]' ' ')"
look files sh -c "find '$1/many' | wc -l"
echo mine > "$1/volume/new"
"""
AS_ROOT = """
look() { echo "$1=$(shift; "$@" 2>&1 | tail -n 1)"; }
look user id -u
look private cat "$1/private"
look shadow head -c 1 /etc/shadow
look volume stat -c %u:%g /mnt/volume/new
"""


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """Files of root's, for a group, for nobody else; and more of them than a process may open.

    Not below pytest's own directory: each pytest that starts closes that to others.
    """
    with tempfile.TemporaryDirectory(prefix="hostel-user-") as directory:
        Path(directory).chmod(0o755)
        fill(Path(directory))
        yield Path(directory)


def fill(top: Path) -> None:
    for name, mode, owner, group in (
        ("grouped", 0o640, 0, GROUP),
        ("private", 0o600, 0, 0),
        ("own", 0o600, USER, USER),
    ):
        (top / name).write_text(name)
        os.chown(top / name, owner, group)
        (top / name).chmod(mode)
    for number in range(3000):
        path = top / f"many/{number % 50}/{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (top / "volume").mkdir()
    os.chown(top / "volume", USER, USER)


@pytest.fixture(scope="module")
def run(tree: Path) -> Run:
    """``hostel run`` as that user, 1024 files at most: what the script printed, as names and values.

    With the system's Python and a copy of our code: a checkout may lie where nobody else can look.
    """
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if not os.path.exists(python):
        pytest.skip(f"no {python}: nobody else may run {sys.executable}, perhaps")
    kernel = kernels.find()
    if kernel.source == "fetched":
        target = tree / "home/hostel/kernels" / kernel.release
        shutil.copytree(kernels.store() / kernel.release, target, copy_function=link_or_copy)
    code = tree / "code"
    for package in (hostel, click, lz4, msgspec, qemu.qmp, zstandard):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, code / package.__name__.replace(".", "/"))
    for path in (tree / "home/hostel", tree / "run"):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, USER, USER)

    def run(script: str, *options: str) -> dict[str, str]:
        limit = ["prlimit", "--nofile=1024:1024", "--"]
        words = ["run", "--engine", "qemu", *options, "--", "sh", "-c", script, "sh", str(tree)]
        done = subprocess.run(
            [*limit, python, "-m", "hostel", *words],
            user=USER,
            group=USER,
            extra_groups=[GROUP],
            cwd="/",
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONPATH": str(code),
                "XDG_RUNTIME_DIR": str(tree / "run"),
                "XDG_CACHE_HOME": str(tree / "home"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = (line.partition("=") for line in done.stdout.splitlines())
        return {name: value for name, _, value in lines} | {"said": done.stderr}

    return run


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def test_the_users_own_machine(run: Run, tree: Path) -> None:
    seen = run(LOOKS, "-v", f"{tree}/volume:{tree}/volume")
    assert seen["groups"].split() == [str(USER), str(GROUP)]
    assert seen["passwd"] == "0"
    assert seen["owners"] == "0:0"
    assert seen["grouped"] == "grouped"
    assert seen["private"].endswith("Permission denied")
    assert seen["own"] == "own"
    assert seen["su"].split() == ["Uid:", str(USER), "0", "0", "0"]
    assert seen["files"] == str(3000 + 50 + 1)
    made = (tree / "volume/new").stat()
    assert (made.st_uid, made.st_gid) == (USER, USER)
    assert "1024 are too few" in seen["said"]


def test_root_of_the_guest_reads_no_more(run: Run, tree: Path) -> None:
    (tree / "volume/new").touch()
    os.chown(tree / "volume/new", USER, USER)
    volume = f"{tree}/volume:/mnt/volume,server=virtiofsd"
    seen = run(AS_ROOT, "-u", "root", "-v", volume)
    assert seen["user"] == "0"
    assert seen["private"].endswith("Permission denied")
    assert seen["shadow"].endswith("Permission denied")
    assert seen["volume"] == f"{USER}:{USER}"
