"""What a network has changed on the host, written down before it is done: so that it can be undone.

``FOLDER/state`` is lines of two words:

    link NAME             an interface to delete
    table FAMILY:NAME     an nftables table to delete
    accept NAME           rules for bridge NAME in the host's own firewall (``firewall``)
    forwarding KEY        this network's part in the record of sysctls (``forwarding``)
"""

from __future__ import annotations

import contextlib
import os

from hostel.errors import HostError

from . import kernel


def note(folder: str | os.PathLike[str], kind: str, name: str) -> None:
    """Before it is made."""
    with open(f"{os.fspath(folder)}/state", "a") as file:
        file.write(f"{kind} {name}\n")


def forget(folder: str | os.PathLike[str], kind: str, name: str) -> None:
    """After it has been taken away."""
    line = (kind, name)
    kept = [entry for entry in _read(folder) if entry != line]
    with open(f"{os.fspath(folder)}/state", "w") as file:
        file.write("".join(f"{a} {b}\n" for a, b in kept))


def undo(folder: str | os.PathLike[str], *, force: bool = False) -> bool:
    """Put everything back; False, and nothing done, while a machine still uses one of its taps."""
    entries = _read(folder)
    links = [name for kind, name in entries if kind == "link"]
    present = kernel.interfaces()
    if not force and any(_in_use(name) for name in links if name in present):
        return False
    for kind, take_away in _UNDO.items():
        names = [name for word, name in reversed(entries) if word == kind]
        if names:
            with contextlib.suppress(HostError):  # the host's administrator was faster
                take_away(names)
    return True


def _read(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    try:
        with open(f"{os.fspath(folder)}/state") as file:
            words = [line.split() for line in file]
    except OSError:
        return []
    return [(line[0], line[1]) for line in words if len(line) == 2 and line[0] in _UNDO]


def _in_use(link: str) -> bool:
    """Whether somebody holds a tap open: it has a carrier then, as a wire that is plugged in."""
    text = kernel.run([kernel.find("ip"), "-o", "-d", "link", "show", link])
    return " tun " in text and "NO-CARRIER" not in text and "LOWER_UP" in text


def _links(names: list[str]) -> None:
    present = kernel.interfaces()
    kernel.ip([f"link del {name}" for name in names if name in present])


def _tables(names: list[str]) -> None:
    """In one transaction; naming a table first makes sure that there is one to delete."""
    tables = [name.replace(":", " ") for name in names]
    kernel.nft("".join(f"table {name}\ndelete table {name}\n" for name in tables))


def _accept(names: list[str]) -> None:
    from . import firewall

    for name in names:
        firewall.close(name)


def _forwarding(names: list[str]) -> None:
    from . import forwarding

    for name in names:
        forwarding.leave(name)


_UNDO = {"link": _links, "accept": _accept, "forwarding": _forwarding, "table": _tables}
"""In this order: what the rules of the tables guard goes before them."""
