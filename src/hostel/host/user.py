"""Who calls: uid, gid, groups, and what the account database says of them.

A command in a guest runs as the caller unless told otherwise (``resolve``). Names are looked up where
the guest will look them up: for the host's root in the host's database (``pwd``, which asks NSS), for
another directory in that directory's own ``/etc/passwd``, never in the host's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hostel.errors import UserError

ID_LIMIT = 2**32 - 1
"""The last uid_t is -1, "no change" to chown(2) and setresuid(2): it names nobody."""

DEFAULT_SHELL = "/bin/sh"


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as a process carries it."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str

    @property
    def spec(self) -> str:
        """``uid:gid``, as an agent takes it."""
        return f"{self.uid}:{self.gid}"


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str
    shell: str


_ROOT = _Account("root", 0, 0, "/root", DEFAULT_SHELL)


class Accounts:
    """The account database of the root file system at ``root``.

    ``None``: it cannot be read from outside (a disk image); only root is known there, and numbers.
    """

    def __init__(self, root: Path | None = Path("/")) -> None:
        self._host = root == Path("/")
        self._root = root

    def user(self, key: str | int) -> _Account | None:
        """The account of a name or a uid."""
        if self._host:
            return _host_account(key)
        users = self._users() if self._root else [_ROOT]
        return next((a for a in users if key in (a.name, a.uid)), None)

    def gid(self, name: str) -> int | None:
        """The number of a group."""
        if self._host:
            return _host_gid(name)
        return next((int(f[2]) for f in self._rows("group", 4) if f[0] == name), None)

    def groups(self, account: _Account) -> tuple[int, ...]:
        """Every group of an account, its own first."""
        if self._host:
            return tuple(os.getgrouplist(account.name, account.gid))
        others = (int(f[2]) for f in self._rows("group", 4) if account.name in f[3].split(","))
        return tuple(dict.fromkeys((account.gid, *others)))

    def _users(self) -> list[_Account]:
        rows = self._rows("passwd", 7)
        return [_Account(f[0], int(f[2]), int(f[3]), f[5], f[6] or DEFAULT_SHELL) for f in rows]

    def _rows(self, database: str, width: int) -> list[list[str]]:
        """The well-formed lines of ``/etc/passwd`` or ``/etc/group``: the file is a guest's."""
        if self._root is None:
            return []
        try:
            text = (self._root / "etc" / database).read_text(errors="replace")
        except OSError:
            return []
        rows = (line.split(":") for line in text.splitlines())
        numbers = slice(2, 4) if database == "passwd" else slice(2, 3)
        return [f for f in rows if len(f) == width and all(n.isdecimal() for n in f[numbers])]


def caller() -> Identity:
    """Who runs this process: its ids as they are now, and what the database adds."""
    uid, gid = os.getuid(), os.getgid()
    return _identity(uid, gid, tuple(os.getgroups()), Accounts().user(uid))


def resolve(text: str, accounts: Accounts) -> Identity:
    """``name``, ``uid``, ``name:group`` or ``uid:gid`` in the given database."""
    who, colon, group = text.partition(":")
    number = _number(who)
    account = accounts.user(who if number is None else number)
    if account is None and number is None:
        raise _unknown("user", who, accounts)
    uid = account.uid if account else number or 0
    if colon:
        gid = _group(group, accounts)
        return _identity(uid, gid, (gid,), account)
    if account is None:  # as user-private groups do; never group root, as some tools do
        return _identity(uid, uid, (uid,), None)
    return _identity(uid, account.gid, accounts.groups(account), account)


def _group(text: str, accounts: Accounts) -> int:
    number = _number(text)
    gid = accounts.gid(text) if number is None else number
    if gid is None:
        raise _unknown("group", text, accounts)
    return gid


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdecimal()):
        return None
    if int(text) >= ID_LIMIT:
        raise UserError(f"not a user or group id: {text}", cure=f"ids end at {ID_LIMIT - 1}")
    return int(text)


def _unknown(kind: str, name: str, accounts: Accounts) -> UserError:
    return UserError(
        f"no {kind} {name!r} in the guest's root file system",
        cure="give a number, or a name that its /etc/passwd knows",
    )


def _identity(uid: int, gid: int, groups: tuple[int, ...], account: _Account | None) -> Identity:
    if account is None:
        return Identity(uid, gid, groups, str(uid), "/", DEFAULT_SHELL)
    return Identity(uid, gid, groups, account.name, account.home or "/", account.shell)


def _host_account(key: str | int) -> _Account | None:
    import pwd

    try:
        found = pwd.getpwnam(key) if isinstance(key, str) else pwd.getpwuid(key)
    except (KeyError, OverflowError, ValueError):
        return None
    shell = found.pw_shell or DEFAULT_SHELL
    return _Account(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir, shell)


def _host_gid(name: str) -> int | None:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
