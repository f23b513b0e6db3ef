"""What a network has changed on the host, written down before it is done: so that it can be undone.

``FOLDER/state`` is lines of two words:

    link NAME             an interface to delete
    table FAMILY:NAME     an nftables table to delete
    accept NAME           rules for bridge NAME in the host's own firewall (``firewall``)
    forwarding FOLDER     this network's part in the record of sysctls (``forwarding``)
"""

from __future__ import annotations

import contextlib
import os

from hostel.errors import HostError

from . import firewall, forwarding, kernel


class State:
    """A keeper's own, also in memory: somebody may take the folder away under it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = f"{os.fspath(folder)}/state"
        self._entries: list[tuple[str, str]] = []

    @classmethod
    def left(cls, folder: str | os.PathLike[str]) -> State:
        """As a keeper that was killed left it."""
        state = cls(folder)
        with contextlib.suppress(OSError), open(state._path) as file:
            for line in file:
                kind, _, name = line.rstrip("\n").partition(" ")
                if kind in _UNDO and name:
                    state._entries.append((kind, name))
        return state

    def note(self, kind: str, name: str) -> None:
        """Before it is made. It may stand here already."""
        if self.has(kind, name):
            return
        self._entries.append((kind, name))
        with contextlib.suppress(OSError), open(self._path, "a") as file:
            file.write(f"{kind} {name}\n")

    def forget(self, kind: str, name: str) -> None:
        """After it has been taken away."""
        self._entries = [entry for entry in self._entries if entry != (kind, name)]
        with contextlib.suppress(OSError), open(self._path, "w") as file:
            file.writelines(f"{a} {b}\n" for a, b in self._entries)

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._entries

    def names(self, kind: str) -> list[str]:
        return [name for word, name in self._entries if word == kind]

    def in_use(self) -> bool:
        """Whether a machine still has one of the taps open."""
        present = kernel.interfaces()
        return any(_is_open(name) for name in self.names("link") if name in present)

    def undo(self) -> None:
        """Put everything back."""
        for kind, take_away in _UNDO.items():
            if names := self.names(kind):
                with contextlib.suppress(HostError):  # the host's administrator was faster
                    take_away(names[::-1])


def _is_open(link: str) -> bool:
    """A tap has a carrier then, as a wire that is plugged in; a macvtap always has one."""
    text = kernel.run([kernel.find("ip"), "-o", "-d", "link", "show", link])
    if " macvtap " in text:
        return _held(f"/dev/tap{kernel.index(link)}")
    return " tun " in text and "LOWER_UP" in text


def _held(device: str) -> bool:
    """Whether any process has this file open (proc(5), /proc/pid/fd)."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == device:
                        return True
    return False


def _links(names: list[str]) -> None:
    present = kernel.interfaces()
    kernel.ip([f"link del {name}" for name in names if name in present])


def _tables(names: list[str]) -> None:
    """In one transaction; naming a table first makes sure that there is one to delete."""
    tables = [name.replace(":", " ") for name in names]
    kernel.nft("".join(f"table {name}\ndelete table {name}\n" for name in tables))


def _accept(names: list[str]) -> None:
    for name in names:
        firewall.close(name)


def _forwarding(names: list[str]) -> None:
    for name in names:
        forwarding.leave(name)


_UNDO = {"link": _links, "accept": _accept, "forwarding": _forwarding, "table": _tables}
"""In this order: what the rules of the tables guard goes before them."""
