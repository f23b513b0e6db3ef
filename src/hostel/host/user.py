"""Who calls: the ids of this process, and what the host's account database (NSS) says of them.

The guest's agent reads ``/etc/passwd`` only; a caller that LDAP or systemd-homed knows is known here.
"""

from __future__ import annotations

import os

import msgspec

DEFAULT_SHELL = "/bin/sh"


class Identity(msgspec.Struct, frozen=True):
    """A user as a process carries it, with the account if there is one."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str

    def environment(self) -> dict[str, str]:
        """What a login gives a command (login(1))."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "SHELL": self.shell}


def caller() -> Identity:
    """Who runs this process: its ids as they are now."""
    import pwd

    uid, gid, groups = os.getuid(), os.getgid(), tuple(os.getgroups())
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return Identity(uid, gid, groups, str(uid), "/", DEFAULT_SHELL)
    home, shell = account.pw_dir or "/", account.pw_shell or DEFAULT_SHELL
    return Identity(uid, gid, groups, account.pw_name, home, shell)
