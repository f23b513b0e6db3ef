"""What POSIX and Linux promise of a file system, as a table of checks; run by a guest's Python.

    python3 posix_table.py DIRECTORY [SKIPPED…]

Prints the name of each check that fails, with the reason, and at the end how many there were. It uses
nothing but the standard library: the guest has no more.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator

Name = str | bytes


def refuses(number: int, call: Callable[..., object], *arguments: object, **named: object) -> None:
    answer = 0
    try:
        call(*arguments, **named)
    except OSError as error:
        answer = error.errno or 0
    assert answer == number, f"{os.strerror(answer)}, not {errno.errorcode[number]}"


def put(name: Name, data: bytes = b"", mode: int = 0o644) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.write(fd, data)
    os.close(fd)


def get(name: Name) -> bytes:
    with open(name, "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(name: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(name, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def as_user(uid: int, act: Callable[[], object]) -> bool:
    """Do it as another user of the guest; True if it went well."""
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        try:
            act()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def check_write_and_read() -> None:
    put("a", b"one")
    with opened("a", os.O_RDWR) as fd:
        assert os.pwrite(fd, b"X" * 100_000, 1 << 20) == 100_000
        assert os.pread(fd, 5, 0) == b"one\0\0"
        assert os.fstat(fd).st_size == (1 << 20) + 100_000
        os.ftruncate(fd, 2)
        assert os.pread(fd, 5, 0) == b"on"
        os.fsync(fd)
        os.fdatasync(fd)


def check_large_file() -> None:
    block = os.urandom(1 << 20)
    with open("a", "wb") as file:
        for _ in range(16):
            file.write(block)
    data = get("a")
    assert len(data) == 16 << 20
    assert data == block * 16


def check_append() -> None:
    put("a", b"1")
    with (
        opened("a", os.O_WRONLY | os.O_APPEND) as one,
        opened("a", os.O_WRONLY | os.O_APPEND) as two,
    ):
        os.write(one, b"2")
        os.write(two, b"3")
        os.write(one, b"4")
    assert get("a") == b"1234"


def check_open_flags() -> None:
    put("a", b"x")
    os.mkdir("d")
    os.symlink("a", "s")
    refuses(errno.EEXIST, os.open, "a", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    refuses(errno.EEXIST, os.open, "s", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    refuses(errno.ELOOP, os.open, "s", os.O_RDONLY | os.O_NOFOLLOW)
    refuses(errno.ENOTDIR, os.open, "a", os.O_RDONLY | os.O_DIRECTORY)
    refuses(errno.EISDIR, os.open, "d", os.O_WRONLY)
    refuses(errno.ENOENT, os.open, "none", os.O_RDONLY)
    refuses(errno.ENOTDIR, os.open, "a/b", os.O_RDONLY)
    with opened("a", os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0


def check_directories() -> None:
    os.mkdir("d", 0o750)
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o750
    assert os.stat("d").st_nlink in (1, 2)
    refuses(errno.EEXIST, os.mkdir, "d")
    put("d/a")
    refuses(errno.ENOTEMPTY, os.rmdir, "d")
    refuses(errno.EISDIR, os.unlink, "d")
    refuses(errno.ENOTDIR, os.rmdir, "d/a")
    os.unlink("d/a")
    os.rmdir("d")
    refuses(errno.ENOENT, os.stat, "d")


def check_rename() -> None:
    put("a", b"a")
    put("b", b"b")
    os.makedirs("d/e")
    os.mkdir("empty")
    os.rename("a", "b")
    assert get("b") == b"a"
    assert not os.path.exists("a")
    refuses(errno.EISDIR, os.rename, "b", "d")
    refuses(errno.ENOTDIR, os.rename, "d", "b")
    refuses(errno.EINVAL, os.rename, "d", "d/e/f")
    refuses(errno.ENOTEMPTY, os.rename, "empty", "d")
    os.rename("d", "empty")
    assert os.listdir("empty") == ["e"]
    os.rename("b", "empty/e/c")
    assert get("empty/e/c") == b"a"


def check_rename_of_what_is_open() -> None:
    put("a", b"old")
    put("b", b"new")
    with opened("a", os.O_RDWR) as fd:
        os.rename("b", "a")
        assert os.read(fd, 10) == b"old"
        assert os.fstat(fd).st_nlink == 0
        os.write(fd, b"er")
    assert get("a") == b"new"
    os.mkdir("d")
    put("d/f", b"f")
    with opened("d", os.O_RDONLY) as fd:
        os.rename("d", "e")
        assert os.listdir(fd) == ["f"]
        assert os.stat("f", dir_fd=fd).st_size == 1


def check_links() -> None:
    put("a", b"a")
    os.link("a", "b")
    assert os.stat("a").st_nlink == 2
    assert os.path.samefile("a", "b")
    put("b", b"changed")
    assert get("a") == b"changed"
    os.unlink("a")
    assert os.stat("b").st_nlink == 1
    refuses(errno.EEXIST, os.link, "b", "b")
    os.symlink("nowhere/at/all", "s")
    assert os.readlink("s") == "nowhere/at/all"
    assert os.lstat("s").st_size == 14
    refuses(errno.ENOENT, os.stat, "s")
    os.symlink("s2", "s3")
    os.symlink("s3", "s2")
    refuses(errno.ELOOP, os.stat, "s2")
    refuses(errno.EINVAL, os.readlink, "b")


def check_unlink_of_what_is_open() -> None:
    put("a", b"a")
    with opened("a", os.O_RDWR) as fd:
        os.unlink("a")
        refuses(errno.ENOENT, os.stat, "a")
        os.pwrite(fd, b"still", 0)
        assert os.pread(fd, 10, 0) == b"still"
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_size == 5
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 1)
        assert os.fstat(fd).st_size == 1
        put("a", b"another")
        assert os.pread(fd, 10, 0) == b"s"
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    assert os.listdir(".") == []
    refuses(errno.ENOENT, put, "x")


def check_modes_and_times() -> None:
    put("a", mode=0o600)
    for mode in (0o000, 0o777, 0o4755, 0o2755, 0o1644):
        os.chmod("a", mode)
        assert stat.S_IMODE(os.stat("a").st_mode) == mode
    os.utime("a", ns=(1_000_000_005, 2_000_000_007))
    found = os.stat("a")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_005, 2_000_000_007)
    before = os.stat("a").st_ctime_ns
    os.chmod("a", 0o644)
    assert os.stat("a").st_ctime_ns >= before
    put("a", b"x")
    assert os.stat("a").st_mtime_ns > 2_000_000_007
    old = os.umask(0o077)
    put("b", mode=0o666)
    os.mkdir("d", 0o777)
    os.umask(old)
    assert stat.S_IMODE(os.stat("b").st_mode) == 0o600
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o700


def check_owners() -> None:
    put("a")
    os.chown("a", 1234, 5678)
    assert (os.stat("a").st_uid, os.stat("a").st_gid) == (1234, 5678)
    os.chown("a", -1, 1)
    assert (os.stat("a").st_uid, os.stat("a").st_gid) == (1234, 1)
    os.symlink("a", "s")
    os.lchown("s", 7, 8)
    assert (os.lstat("s").st_uid, os.stat("s").st_uid) == (7, 1234)


def check_users() -> None:
    os.mkdir("d", 0o777)
    os.chmod("d", 0o1777)
    assert as_user(1234, lambda: put("d/theirs", b"x"))
    assert as_user(1234, lambda: os.mkdir("d/sub"))
    assert (os.stat("d/theirs").st_uid, os.stat("d/theirs").st_gid) == (1234, 1234)
    assert os.stat("d/sub").st_uid == 1234
    put("private", b"x", 0o600)
    os.mkdir("closed", 0o700)
    put("d/mine")
    assert not as_user(1234, lambda: get("private"))
    assert not as_user(1234, lambda: put("private"))
    assert not as_user(1234, lambda: os.listdir("closed"))
    assert not as_user(1234, lambda: os.unlink("d/mine"))
    assert not as_user(1234, lambda: os.chmod("d/mine", 0o777))
    assert as_user(1234, lambda: os.unlink("d/theirs"))
    assert as_user(1234, lambda: os.rmdir("d/sub"))


def check_setuid_goes_with_a_write() -> None:
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
        put("a", b"x", 0o777)
        os.chmod("a", 0o6777)
        with opened("a", flags) as fd:
            assert as_user(1234, lambda fd=fd: os.write(fd, b"more"))  # type: ignore[misc]
        assert stat.S_IMODE(os.stat("a").st_mode) == 0o777
    os.chmod("a", 0o4777)
    os.chown("a", 1234, 1234)
    assert not os.stat("a").st_mode & stat.S_ISUID


def check_setgid_directory() -> None:
    os.mkdir("d", 0o777)
    os.chown("d", 0, 4321)
    os.chmod("d", 0o2777)
    put("d/a")
    os.mkdir("d/e")
    assert os.stat("d/a").st_gid == 4321
    assert os.stat("d/e").st_gid == 4321
    assert os.stat("d/e").st_mode & stat.S_ISGID


def check_special_files() -> None:
    os.mkfifo("fifo")
    assert stat.S_ISFIFO(os.stat("fifo").st_mode)
    with opened("fifo", os.O_RDWR) as fd:
        os.write(fd, b"through")
        assert os.read(fd, 7) == b"through"
    server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with server, client:
        server.bind("socket")
        server.listen()
        client.connect("socket")


def check_names() -> None:
    put("n" * 255)
    refuses(errno.ENAMETOOLONG, put, "n" * 256)
    for name in (b"\xff\xfe", "ä€".encode(), b"a b\n\t'\"", b"..x", b"-"):
        put(name, name)
        assert get(name) == name
    deep = "/".join(["d" * 40] * 30)
    os.makedirs(deep)
    put(deep + "/leaf", b"leaf")
    assert get(deep + "/leaf") == b"leaf"


def check_many_files() -> None:
    for number in range(500):
        put(f"file-{number}")
    assert len(os.listdir(".")) == 500
    for number in range(0, 500, 2):
        os.unlink(f"file-{number}")
    assert sorted(os.listdir("."), key=lambda name: int(name[5:])) == [
        f"file-{number}" for number in range(1, 500, 2)
    ]


def check_removal_while_listing() -> None:
    for number in range(300):
        put(str(number))
    with os.scandir(".") as entries:
        for entry in entries:
            assert entry.is_file(follow_symlinks=False)
            os.unlink(entry.name)
    assert os.listdir(".") == []


def check_mapping() -> None:
    put("a", b"0" * 8192)
    with opened("a", os.O_RDWR) as fd, mmap.mmap(fd, 8192) as area:
        area[5000:5005] = b"hello"
        area.flush()
        assert os.pread(fd, 5, 5000) == b"hello"
    assert get("a")[5000:5005] == b"hello"


def check_locks() -> None:
    put("a")
    with opened("a", os.O_RDWR) as one, opened("a", os.O_RDWR) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        refuses(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX)


def check_database() -> None:
    with contextlib.closing(sqlite3.connect("db")) as base:
        base.execute("create table t (n integer)")
        base.executemany("insert into t values (?)", [(n,) for n in range(500)])
        base.commit()
    with contextlib.closing(sqlite3.connect("db")) as base:
        assert base.execute("select sum(n) from t").fetchone() == (124750,)


def check_holes() -> None:
    with opened("a", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 1 << 20)
        assert os.lseek(fd, 0, os.SEEK_DATA) <= 1 << 20
        assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 3
        os.posix_fallocate(fd, 0, 4096)
        assert os.pread(fd, 3, 0) == b"\0\0\0"


def check_copies() -> None:
    put("a", os.urandom(100_000))
    with opened("a", os.O_RDONLY) as one, opened("b", os.O_RDWR | os.O_CREAT) as two:
        done = 0
        while done < 100_000:
            done += os.copy_file_range(one, two, 100_000 - done)
    assert get("a") == get("b")
    with opened("a", os.O_RDONLY) as one, opened("c", os.O_RDWR | os.O_CREAT) as two:
        offset = 0
        while offset < 100_000:
            offset += os.sendfile(two, one, offset, 100_000 - offset)
    assert get("c") == get("a")


def check_programs() -> None:
    put("script", b"#!/bin/sh\nexit 7\n", 0o755)
    assert subprocess.run(["./script"], check=False).returncode == 7
    os.chmod("script", 0o644)
    refuses(errno.EACCES, subprocess.run, ["./script"], check=False)


def check_space() -> None:
    found = os.statvfs(".")
    assert found.f_blocks > 0
    assert found.f_namemax == 255


def check_attributes_of_users() -> None:
    put("a")
    os.setxattr("a", "user.one", b"1")
    assert os.getxattr("a", "user.one") == b"1"
    assert os.listxattr("a") == ["user.one"]
    refuses(errno.EEXIST, os.setxattr, "a", "user.one", b"2", os.XATTR_CREATE)
    os.removexattr("a", "user.one")
    refuses(errno.ENODATA, os.getxattr, "a", "user.one")


def main() -> None:
    top, skipped = os.path.abspath(sys.argv[1]), sys.argv[2:]
    checks = {name[6:]: check for name, check in globals().items() if name.startswith("check_")}
    for name, check in checks.items():
        if name in skipped:
            continue
        place = f"{top}/{name}"
        os.mkdir(place, 0o777)
        os.chmod(place, 0o777)
        os.chdir(place)
        try:
            check()
        except Exception as error:
            lines = [
                at.line
                for at in traceback.extract_tb(error.__traceback__)
                if at.filename == __file__
            ]
            print(f"{name}: {error!r} in {lines[-1]}")
    print(f"{len(checks) - len(skipped)} checks")


main()
