"""Lets packets of our networks out: forwarding, switched on per interface and off again.

The kernel forwards a packet if forwarding is on for the interface it *arrives* at. So the bridge alone
does not do: answers arrive at the uplinks. These are opened too, only these, and only for our packets
(the chain ``guard`` in ``rules``). Where the whole host forwards already, nothing is changed.

A record, one for all users' networks of this network namespace, says which of them need which interface
that we opened; the last one closes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from hostel.errors import HostError

from . import kernel
from .subnet import Route

PLACE = "/run/hostel-forwarding"


def uplinks(routes: list[Route]) -> list[str]:
    """Interfaces that lead somewhere, without ours and the loopback."""
    found = {route.device for route in routes if route.kind == "unicast"}
    return sorted(name for name in found - {"", "lo"} if not name.startswith("hostel"))


def join(network: str, wanted: list[str]) -> list[str]:
    """Open what is closed, for the network in this folder; returns all that is open only because of us."""
    with _record() as opened:
        for name in wanted:
            if name in opened:
                opened[name].add(network)
            elif kernel.sysctl(f"ipv4/conf/{name}/forwarding") == "0":
                kernel.set_sysctl(f"ipv4/conf/{name}/forwarding", "1")
                opened[name] = {network}
        return sorted(opened)


def leave(network: str) -> None:
    """It goes: close what nobody else needs, unless the whole host forwards by now."""
    everywhere = kernel.sysctl("ipv4/ip_forward") == "1"
    with _record() as opened:
        for name, networks in list(opened.items()):
            opened[name] = {folder for folder in networks - {network} if os.path.isdir(folder)}
            if opened[name]:
                continue
            del opened[name]
            if not everywhere and kernel.sysctl(f"ipv4/conf/{name}/forwarding") is not None:
                with contextlib.suppress(HostError):
                    kernel.set_sysctl(f"ipv4/conf/{name}/forwarding", "0")


@contextlib.contextmanager
def _record() -> Iterator[dict[str, set[str]]]:
    """The record, locked; written back at the end. Its lines: interface, then networks, by tabs."""
    path = f"{PLACE}-{os.stat('/proc/self/ns/net').st_ino}"
    with kernel.locked(path) as file:
        opened = {words[0]: set(words[1:]) for line in file if (words := line.rstrip().split("\t"))}
        yield opened
        file.seek(0)
        file.truncate()
        file.writelines("\t".join((name, *sorted(of))) + "\n" for name, of in opened.items())
        if not opened:
            os.unlink(path)
