"""Shares, from the guest's side: what it can see, and what a hostile kernel cannot do.

Each with the host's virtiofsd and with our own server.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import hostel
from guests import fuse_driver as fuse
from guests.fuse_driver import ROOT, FuseDriver, FuseError
from guests.killed import Victim, gone_within
from hostel.errors import HelperError, UserError
from hostel.host import shares, virtiofsd
from hostel.host.process import Helper
from hostel.host.runtime import Runtime, sweep
from hostel.host.shares import Served, Share, choose, share
from hostel.spec import FileServer

pytestmark = pytest.mark.qemu
NEW = struct.pack("<II", 0o755, 0) + b"new\0"
STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays another user: needs root")


MEMORY = 1 << 29


@pytest.fixture(params=["virtiofsd", "python"])
def server(request: pytest.FixtureRequest) -> FileServer:
    chosen: FileServer = request.param
    return chosen


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime() as runtime:
        yield runtime


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory to share: ``file``, ``sub/deep``, and a link that leads out of it."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_text("content")
    (tree / "sub/deep").write_text("deep")
    (tree / "out").symlink_to("/etc/passwd")
    return tree


class Shares:
    """Starts shares, and stops them."""

    def __init__(self, runtime: Runtime, server: FileServer) -> None:
        self.runtime = runtime
        self.server = server
        self.all: list[Share] = []

    def start(self, source: Path, *, read_only: bool) -> Share:
        wanted = Served(f"share{len(self.all)}", source, read_only, server=self.server)
        self.all.append(share(self.runtime.path, wanted, memory=MEMORY))
        return self.all[-1]

    def connect(self, source: Path, *, read_only: bool) -> FuseDriver:
        return FuseDriver(self.start(source, read_only=read_only).socket)

    @property
    def helper(self) -> Helper:
        return self.all[0].helper


@pytest.fixture
def served(runtime: Runtime, server: FileServer) -> Iterator[Shares]:
    shares = Shares(runtime, server)
    yield shares
    for one in shares.all:
        one.stop()
        assert not one.helper.alive()


def changes(fs: FuseDriver) -> dict[str, str]:
    """What each way to change something below ROOT is answered with."""
    file = fs.lookup(ROOT, "file")
    handle = fs.open(file)
    fs.lookup(ROOT, "out")  # the daemon removes only what the guest has seen
    open_flags = {name: struct.pack("<II", getattr(os, name), 0) for name in ("O_RDWR", "O_TRUNC")}
    answers = {
        "mkdir": fs.refusal(fuse.MKDIR, ROOT, NEW),
        "mknod": fs.refusal(fuse.MKNOD, ROOT, struct.pack("<IIII", 0o100644, 0, 0, 0) + b"node\0"),
        "create": fs.refusal(
            fuse.CREATE, ROOT, struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"made\0"
        ),
        "symlink": fs.refusal(fuse.SYMLINK, ROOT, b"symlink\0target\0"),
        "link": fs.refusal(fuse.LINK, ROOT, struct.pack("<Q", file) + b"link\0"),
        "unlink": fs.refusal(fuse.UNLINK, ROOT, b"out\0"),
        "rename": fs.refusal(fuse.RENAME, ROOT, struct.pack("<Q", ROOT) + b"file\0renamed\0"),
        "open to write": fs.refusal(fuse.OPEN, file, open_flags["O_RDWR"]),
        "open to truncate": fs.refusal(fuse.OPEN, file, open_flags["O_TRUNC"]),
    }
    direct: dict[str, Callable[[], None]] = {
        "write to a handle opened to read": lambda: fs.write(file, handle, b"x"),
        "truncate": lambda: fs.set_attributes(file, fuse.FATTR_SIZE, size=1),
        "chmod": lambda: fs.set_attributes(file, fuse.FATTR_MODE, mode=0o777),
    }
    for name, change in direct.items():
        try:
            change()
            answers[name] = ""
        except FuseError as error:
            answers[name] = error.strerror or "?"
    return answers


def test_read_only_refuses_every_change(tree: Path, served: Shares) -> None:
    with served.connect(tree, read_only=True) as fs:
        assert fs.read("file") == b"content"
        answers = changes(fs)
    assert "" not in answers.values(), answers
    assert {answers[name] for name in ("mkdir", "create", "unlink", "rename")} == {"EROFS"}
    assert (tree / "file").read_text() == "content"
    assert (tree / "file").stat().st_mode & 0o777 != 0o777
    assert sorted(path.name for path in tree.iterdir()) == ["file", "out", "sub"]


def test_the_daemon_of_a_read_only_share_can_write_nowhere(tree: Path, served: Shares) -> None:
    """Even if a guest takes it over: each mount of its namespace is read-only, and it may change none."""
    with served.connect(tree, read_only=True) as fs:
        assert fs.names() == {"file", "out", "sub"}
        proc = Path(f"/proc/{served.helper.pid}")
        mounts = (proc / "mountinfo").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert [line for line in mounts if not line.split()[5].startswith("ro")] == []
    sys_admin, sys_chroot = 21, 18
    assert not int(status["CapPrm"].strip(), 16) & (1 << sys_admin | 1 << sys_chroot)
    assert status["NoNewPrivs"].strip() == "1"


def test_writable_share_is_written(tree: Path, served: Shares) -> None:
    with served.connect(tree, read_only=False) as fs:
        answers = changes(fs)
        assert {name for name, answer in answers.items() if answer} == {
            "write to a handle opened to read"
        }
        assert (tree / "new").is_dir()
        assert (tree / "renamed").exists()
        node = fs.walk("sub/deep")
        fs.write(node, fs.open(node, os.O_RDWR), b"DEEP")
    assert (tree / "sub/deep").read_text() == "DEEP"


@pytest.mark.parametrize("read_only", [True, False])
def test_nothing_outside_is_reached(tree: Path, served: Shares, read_only: bool) -> None:
    (tree.parent / "secret").write_text("secret")
    with served.connect(tree, read_only=read_only) as fs:
        assert fs.request(fuse.READLINK, fs.lookup(ROOT, "out")) == b"/etc/passwd"
        assert fs.refusal(fuse.OPEN, fs.lookup(ROOT, "out"), bytes(8)) != ""
        for name in ("../secret", "../../etc/passwd", "/etc/passwd"):
            assert fs.refusal(fuse.LOOKUP, ROOT, name.encode() + b"\0") != "", name
        above = fs.lookup(ROOT, "..")
        assert fs.refusal(fuse.LOOKUP, above, b"secret\0") == "ENOENT"


def test_single_file_is_alone_under_its_name(tree: Path, served: Shares) -> None:
    with served.connect(tree / "file", read_only=False) as fs:
        assert fs.names() == {"file"}
        node = fs.lookup(ROOT, "file")
        fs.write(node, fs.open(node, os.O_RDWR), b"CONTENT")
    assert (tree / "file").read_text() == "CONTENT"


def test_link_to_a_file_keeps_the_links_name(tree: Path, served: Shares) -> None:
    (tree / "alias").symlink_to("sub/deep")
    with served.connect(tree / "alias", read_only=True) as fs:
        assert fs.names() == {"alias"}
        assert fs.read("alias") == b"deep"


def test_odd_names(tmp_path: Path, served: Shares) -> None:
    odd = tmp_path / 'a b,c="d"\\040\té'
    odd.mkdir()
    (odd / "file").write_text("odd")
    with served.connect(odd, read_only=True) as fs:
        assert fs.read("file") == b"odd"


def test_hosts_root_without_its_kernels_interfaces(served: Shares) -> None:
    with served.connect(Path("/"), read_only=True) as fs:
        assert {"etc", "usr", "proc"} <= fs.names()
        assert fs.read("/etc/passwd") == Path("/etc/passwd").read_bytes()[:4096]
        for name in ("proc", "sys", "dev", "run"):
            assert fs.names(fs.lookup(ROOT, name)) == set(), name


@needs_root
def test_kernel_interfaces_are_masked_wherever_they_are(tree: Path, served: Shares) -> None:
    target = tree / "a b" / "proc"
    target.mkdir(parents=True)
    subprocess.run(["mount", "-t", "proc", "proc", target], check=True)
    try:
        with served.connect(tree, read_only=True) as fs:
            assert fs.names(fs.walk("a b/proc")) == set()
    finally:
        subprocess.run(["umount", target], check=True)


@needs_root
def test_what_is_mounted_below_is_shown_and_as_read_only(tree: Path, served: Shares) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "sub"], check=True)
    try:
        (tree / "sub/inner").write_text("inner")
        with served.connect(tree, read_only=True) as fs:
            assert fs.read("sub/inner") == b"inner"
            assert fs.refusal(fuse.MKDIR, fs.lookup(ROOT, "sub"), NEW) == "EROFS"
    finally:
        subprocess.run(["umount", tree / "sub"], check=True)


def test_kernel_interface_itself_is_refused(served: Shares) -> None:
    served.start(Path("/proc"), read_only=True)
    assert served.helper.wait(10) == 1
    with pytest.raises(HelperError, match="/proc is an interface to this host's kernel"):
        served.all[0].check()


def test_file_that_turns_out_to_exist(tree: Path, served: Shares) -> None:
    """A host that makes a file while the guest does: QEMU's own virtiofsd would end here."""
    with served.connect(tree, read_only=False) as fs:
        body = struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"file\0"
        assert fs.refusal(fuse.CREATE, ROOT, body) == ""
        assert fs.read("file") == b"content"


def test_missing_source_is_one_line(runtime: Runtime) -> None:
    with pytest.raises(UserError, match="cannot share /no/such: No such file or directory"):
        share(runtime.path, Served("share0", Path("/no/such"), True), memory=MEMORY)
    assert sorted(path.name for path in runtime.path.iterdir()) == ["lock"]


def test_daemon_ends_with_its_machine_and_that_is_no_failure(tree: Path, served: Shares) -> None:
    with served.connect(tree, read_only=True) as fs:
        assert served.helper.alive()
        fs.names()
    assert served.helper.wait(5) == 0
    served.all[0].check()


KILLED = """
import sys, time
from pathlib import Path
from hostel.host.runtime import Runtime
from hostel.host.shares import Served, share
runtime = Runtime("killed")
one = share(runtime.path, Served("root", Path("/"), True, server=sys.argv[1]), memory=1 << 29)
print(one.helper.pid, one.socket, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("connected", [True, False])
def test_killed_hostel_leaves_no_daemon(connected: bool, server: FileServer) -> None:
    with Victim(KILLED, server) as victim:
        pid, socket = victim.line.split()
        if connected:
            with FuseDriver(Path(socket)) as fs:
                fs.names()
                victim.kill()
                assert gone_within(int(pid), 1.0)
        victim.kill()
        assert gone_within(int(pid), 1.0)
    assert sweep() == ["killed"]


# -- a caller who is not root ---------------------------------------------------------------------

AS_STRANGER = """
import sys, time
from pathlib import Path
from hostel.host.runtime import Runtime
from hostel.host.shares import Served, share
with Runtime("stranger") as runtime:
    what = Served("tree", Path(sys.argv[1]), sys.argv[2] == "ro", server=sys.argv[3])
    one = share(runtime.path, what, memory=1 << 29)
    print(one.socket, flush=True)
    sys.stdin.read()
    one.stop()
"""


class Stranger:
    """A share made by another user, who is in group ``STRANGER + 1`` too.

    With the system's Python and a copy of our code: a checkout may lie where nobody else can look.
    """

    def __init__(self, folder: Path, source: Path, mode: str, server: FileServer) -> None:
        python = f"/usr/bin/python3.{sys.version_info.minor}"
        if not os.path.exists(python):
            pytest.skip(f"no {python}: nobody else may run {sys.executable}, perhaps")
        folder.chmod(0o755)
        code = folder / "code"
        if not code.exists():
            for package in (hostel, msgspec):
                shutil.copytree(Path(str(package.__file__)).parent, code / package.__name__)
        home = folder / f"home-{mode}"
        home.mkdir()
        os.chown(home, STRANGER, STRANGER)
        self._process = subprocess.Popen(
            [python, "-c", AS_STRANGER, source, mode, server],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=STRANGER,
            group=STRANGER,
            extra_groups=[STRANGER, STRANGER + 1],
            cwd="/",
            env={
                **os.environ,
                "PYTHONPATH": str(code),
                "XDG_RUNTIME_DIR": str(home),
                "XDG_CACHE_HOME": str(home),
            },
        )
        assert self._process.stdout is not None
        self.socket = Path(self._process.stdout.readline().strip())

    def __enter__(self) -> FuseDriver:
        self._driver = FuseDriver(self.socket, uid=STRANGER, gid=STRANGER)
        return self._driver

    def __exit__(self, *_: object) -> None:
        self._driver.close()
        self._process.communicate(timeout=20)
        assert self._process.returncode == 0


@pytest.fixture
def open_tree(tree: Path) -> Path:
    """Files of root's: for all, for a group, for nobody else; and one of the stranger's own."""
    for folder in (tree, tree.parent, *tree.parent.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    for name, mode, owner, group in (
        ("private", 0o600, 0, 0),
        ("grouped", 0o640, 0, STRANGER + 1),
        ("own", 0o600, STRANGER, STRANGER),
    ):
        (tree / name).write_text(name)
        os.chown(tree / name, owner, group)
        (tree / name).chmod(mode)
    (tree / "closed").mkdir(mode=0o700)
    (tree / "closed/inner").write_text("inner")
    os.chown(tree / "sub", STRANGER, STRANGER)
    return tree


@needs_root
@pytest.mark.parametrize("guest_uid", [STRANGER, 0])
def test_guest_sees_what_the_caller_may_read_and_no_more(
    tmp_path: Path, open_tree: Path, guest_uid: int, server: FileServer
) -> None:
    """Whoever the guest's kernel says it acts for."""
    stranger = Stranger(tmp_path, open_tree, "ro", server)
    with stranger as fs:
        fs.uid = guest_uid
        assert fs.read("file") == b"content"
        assert fs.read("grouped") == b"grouped"
        assert fs.read("own") == b"own"
        assert fs.owner("file") == fs.owner("private") == (0, 0)
        assert fs.owner("grouped") == (0, STRANGER + 1)
        assert fs.owner("own") == (STRANGER, STRANGER)
        # as the guest's overlayfs opens it; the file is root's
        fs.open(fs.lookup(ROOT, "file"), os.O_RDONLY | os.O_NOATIME)
        for name in ("private", "closed/inner"):
            with pytest.raises(FuseError, match="Permission denied"):
                fs.read(name)
        assert fs.refusal(fuse.OPENDIR, fs.lookup(ROOT, "closed"), bytes(8)) == "EACCES"
        assert "" not in changes(fs).values()


@needs_root
@pytest.mark.parametrize("guest_uid", [STRANGER, 0])
def test_callers_writable_share_writes_as_the_caller(
    tmp_path: Path, open_tree: Path, guest_uid: int, server: FileServer
) -> None:
    with Stranger(tmp_path, open_tree, "rw", server) as fs:
        fs.uid = fs.gid = guest_uid
        assert fs.refusal(fuse.MKDIR, fs.lookup(ROOT, "sub"), NEW) == ""
        assert fs.refusal(fuse.MKDIR, ROOT, NEW) == "EACCES"
        assert (
            fs.refusal(fuse.OPEN, fs.lookup(ROOT, "file"), struct.pack("<II", os.O_RDWR, 0)) != ""
        )
    made = (open_tree / "sub/new").stat()
    assert (made.st_uid, made.st_gid) == (STRANGER, STRANGER)


def test_our_server_says_what_the_guest_did(runtime: Runtime, tree: Path) -> None:
    """A request that cannot even be answered ends it; the machine's device fails, and nothing else."""
    one = share(runtime.path, Served("share", tree, False, server="python"), memory=MEMORY)
    try:
        with FuseDriver(one.socket) as fs:
            fs.send_raw([bytes(20)], [16])
            assert one.helper.wait(10) == 1
        with pytest.raises(HelperError, match="a FUSE request without a whole header"):
            one.check()
    finally:
        one.stop()


# -- who serves it --------------------------------------------------------------------------------


def test_auto_takes_what_will_do(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Served("share", tree, False)
    monkeypatch.setattr(shares, "most_open_files", lambda: 1 << 20)
    assert choose(plain, MEMORY).server == "virtiofsd"
    monkeypatch.setattr(shares, "most_open_files", lambda: 4096)
    choice = choose(plain, MEMORY)
    assert choice.server == "python"
    assert "4096 are too few" in choice.reason
    assert choice.reason.endswith(shares.more_files(shares.ENOUGH_FILES))
    assert choose(plain, 4096 << 10).server == "virtiofsd", "so small a guest remembers no more"
    monkeypatch.setattr(virtiofsd, "PLACES", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert choose(plain, MEMORY).reason == "virtiofsd is not installed"


def test_what_virtiofsd_cannot_do(tree: Path) -> None:
    owned = Served("share", tree, False, owner=(1000, 1000))
    assert choose(owned, MEMORY).reason == "virtiofsd maps no owners"
    with pytest.raises(UserError, match=r"virtiofsd maps no owners; leave server=virtiofsd out"):
        choose(msgspec.structs.replace(owned, server="virtiofsd"), MEMORY)
