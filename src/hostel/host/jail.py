"""What a file server may do besides serving, by means that anyone may use on himself.

::

    no_new_privs ── Landlock ── seccomp
                    files: the share, and what a program needs to start
                    TCP, abstract sockets, signals, ptrace: nothing

For a server that runs as an ordinary user outside any namespace of ours (``launch.py``): it has the
caller's rights, and a guest that took it over would too. Landlock (Linux 5.13, landlock(7)) leaves it
what the share's own mounts give. A kernel without it costs this second wall, not the first.

Imported by a program that starts with ``python -IS``: it imports next to nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

NR_CREATE_RULESET, NR_ADD_RULE, NR_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
READ = 1 << 2 | 1 << 3
"""READ_FILE, READ_DIR (linux/landlock.h)."""
FILE_RIGHTS = 1 << 1 | 1 << 2 | 1 << 14
"""WRITE_FILE, READ_FILE, TRUNCATE: all that a rule for a single file may say."""
WRITES = (1 << 1 | 0x1FF0, 1 << 13, 1 << 14)
"""WRITE_FILE and what changes directories; REFER, with version 2; TRUNCATE, with version 3."""
NET = 3
"""TCP: bind, connect; with version 4."""
SCOPE = 3
"""Abstract Unix sockets, signals; with version 6."""

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``."""

    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scope", ctypes.c_uint64)]


class PathBeneath(ctypes.Structure):
    """``struct landlock_path_beneath_attr``, packed."""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class Filter(ctypes.Structure):
    """``struct sock_filter``, linux/filter.h."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    """``struct sock_fprog``, linux/filter.h."""

    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter))]


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def no_new_privileges() -> None:
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def landlock_version() -> int:
    """0: this kernel has none, or has it turned off."""
    found: int = libc.syscall(NR_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    return max(found, 0)


def confine(share: int, *, read_only: bool, readable: Iterable[str | int] = ()) -> bool:
    """Leave this process the directory ``share``, and ``readable`` to read. False: it cannot be done.

    Before version 2 no file could be renamed from one directory to another: a writable share does
    without then.
    """
    version = landlock_version()
    if version < (1 if read_only else 2):
        return False
    writes = sum(WRITES[: min(version, 3)])
    rules = Ruleset(READ | writes, NET if version >= 4 else 0, SCOPE if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = check(libc.syscall(NR_CREATE_RULESET, ctypes.byref(rules), size, 0), "landlock")
    _allow(ruleset, share, READ if read_only else READ | writes)
    for path in readable:
        _allow_reading(ruleset, path)
    no_new_privileges()
    check(libc.syscall(NR_RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)
    return True


def _allow(ruleset: int, fd: int, rights: int) -> None:
    rule = PathBeneath(rights, fd)
    result = libc.syscall(NR_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    check(result, "landlock")


def _allow_reading(ruleset: int, path: str | int) -> None:
    """What is not there needs no rule."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC) if isinstance(path, str) else os.dup(path)
    except OSError:
        return
    try:
        directory = os.stat(fd).st_mode & 0o170000 == 0o040000
        _allow(ruleset, fd, READ if directory else READ & FILE_RIGHTS)
    finally:
        os.close(fd)


def pretend(calls: Sequence[int]) -> None:
    """Let these system calls do nothing and succeed (seccomp(2))."""
    load_number, if_equal, give = 0x20, 0x15, 0x06
    allow, succeed = 0x7FFF0000, 0x00050000
    program = [(load_number, 0, 0, 0)]
    for left, number in enumerate(calls):
        program.append((if_equal, len(calls) - left, 0, number))
    program += [(give, 0, 0, allow), (give, 0, 0, succeed)]
    instructions = (Filter * len(program))(*(Filter(*entry) for entry in program))
    header = Program(len(program), instructions)
    no_new_privileges()
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0), "seccomp")
