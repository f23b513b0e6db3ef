"""Volumes in a Linux guest: what POSIX promises, the same bytes on both sides, owners, caches.

One machine for all of it; each kind of server has a volume, and our own serves the root too.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.machine import Machine, Result
from hostel.spec import Root, Volume

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="volumes with files of several owners: needs root"
    ),
]
TABLE = Path(__file__).with_name("guests") / "posix_table.py"
DIGESTS = "cd {} && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"


class Guest:
    """A machine with volumes below /mnt, whose directories on the host are below ``top``."""

    def __init__(self, machine: Machine, top: Path) -> None:
        self.machine = machine
        self.top = top

    def run(self, *argv: str, user: str = "root") -> Result:
        return self.machine.exec(argv, user=user, cwd="/")

    def sh(self, script: str) -> str:
        result = self.run("sh", "-c", script)
        assert result.exit_code == 0, result.stderr.decode()
        return result.stdout.decode()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    top = tmp_path_factory.mktemp("volumes")
    volumes = {
        "ours": Volume(source="", target="", server="python"),
        "virtiofsd": Volume(source="", target="", server="virtiofsd"),
        "fixed": Volume(source="", target="", server="python", read_only=True),
        "owned": Volume(source="", target="", owner="1000:100"),
        "always": Volume(source="", target="", server="python", cache="always"),
        "none": Volume(source="", target="", server="python", cache="none"),
    }
    for name in volumes:
        (top / name).mkdir()
    (top / "fixed/file").write_text("fixed")
    placed = tuple(
        Volume(
            source=str(top / name),
            target=f"/mnt/{name}",
            server=volume.server,
            read_only=volume.read_only,
            owner=volume.owner,
            cache=volume.cache,
        )
        for name, volume in volumes.items()
    )
    with Machine(engine="qemu", volumes=placed, root=Root(server="python")) as machine:
        machine.copy_in(TABLE, "/tmp/posix_table.py")
        yield Guest(machine, top)


@pytest.mark.parametrize(
    ("server", "skipped"), [("ours", ()), ("virtiofsd", ("attributes_of_users",))]
)
def test_posix(guest: Guest, server: str, skipped: tuple[str, ...]) -> None:
    table = guest.run("/usr/bin/python3", "/tmp/posix_table.py", f"/mnt/{server}", *skipped)
    *failed, count = table.stdout.decode().splitlines()
    assert failed == [], table.stderr.decode()
    assert int(count.split()[0]) >= 24


def make_tree(top: Path) -> None:
    dice = random.Random(7)
    for number in range(60):
        path = top / f"{number % 7}/{number % 3}/file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dice.randbytes(dice.choice((0, 1, 4096, 70_001, 300_000))))


def digest(top: Path) -> str:
    """What ``DIGESTS`` prints."""
    files = sorted((path for path in top.rglob("*") if path.is_file()), key=bytes)
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(top)}\n"
        for path in files
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("server", ["ours", "none", "always", "virtiofsd"])
def test_the_same_bytes_on_both_sides(guest: Guest, server: str) -> None:
    here, there = guest.top / server, f"/mnt/{server}"
    make_tree(here / "from-host")
    assert guest.sh(DIGESTS.format(f"{there}/from-host")).split()[0] == digest(here / "from-host")
    guest.sh(f"cp -a {there}/from-host /tmp/{server} && cp -a /tmp/{server} {there}/from-guest")
    assert digest(here / "from-guest") == digest(here / "from-host")
    assert guest.sh(f"rm -r {there}/from-guest {there}/from-host; ls -A {there}/from-*; true") == ""
    shutil.rmtree(here / "from-guest", ignore_errors=True)


def test_read_only_is_read_only(guest: Guest) -> None:
    assert guest.sh("cat /mnt/fixed/file") == "fixed"
    tries = ("mount -o remount,rw .", "echo no > file", "rm file", "mkdir d", "chmod 777 file")
    script = "cd /mnt/fixed;" + ";".join(tries)
    assert guest.run("sh", "-c", script).exit_code != 0
    assert [path.name for path in (guest.top / "fixed").iterdir()] == ["file"]
    assert (guest.top / "fixed/file").read_text() == "fixed"


def test_owner_stands_for_the_caller(guest: Guest) -> None:
    (guest.top / "owned/mine").write_text("mine")
    (guest.top / "owned").chmod(0o755)
    script = """
    import os
    os.setgroups([]), os.setgid(100), os.setuid(1000)
    os.chdir("/mnt/owned")
    open("theirs", "w").write("x")
    open("mine", "a").write(", and theirs")
    print(os.stat("mine").st_uid, os.stat("theirs").st_gid)
    """
    code = "\n".join(line[4:] for line in script.splitlines())
    assert guest.run("/usr/bin/python3", "-c", code).stdout == b"1000 100\n"
    assert (guest.top / "owned/mine").read_text() == "mine, and theirs"
    made = (guest.top / "owned/theirs").stat()
    assert (made.st_uid, made.st_gid) == (0, 0)


def test_caches(guest: Guest) -> None:
    """What the host changes shows at once, after a second, or not before it must."""
    for name in ("none", "ours", "always"):
        (guest.top / name / "changing").write_text("before")
    assert (
        guest.sh("cat /mnt/none/changing /mnt/ours/changing /mnt/always/changing") == "before" * 3
    )
    for name in ("none", "ours", "always"):
        (guest.top / name / "changing").write_text("afterwards")
    assert guest.sh("cat /mnt/none/changing; sleep 1.1; cat /mnt/ours/changing") == "afterwards" * 2
    assert guest.sh("stat -c %s /mnt/always/changing") == "6\n"


def test_the_hosts_owners(guest: Guest) -> None:
    shared = guest.top / "ours"
    (shared / "theirs").write_text("x")
    os.chown(shared / "theirs", 4242, 4343)
    assert guest.sh("stat -c %u:%g /mnt/ours/theirs /etc/passwd") == "4242:4343\n0:0\n"
