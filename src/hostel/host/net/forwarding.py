"""Lets packets of our networks out: forwarding, switched on per interface and off again.

The kernel forwards a packet if forwarding is on for the interface it *arrives* at. So the bridge alone
does not do: answers arrive at the uplinks. These are opened too, only these, and only for our packets
(the chain ``guard`` in ``rules``). Where the whole host forwards already, nothing is changed.

A record beside the networks' directories says which of them need which interface that we opened; the
last one closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from hostel.errors import HostError

from . import kernel
from .subnet import Route

RECORD = ".net.forwarding"


def uplinks(routes: list[Route]) -> list[str]:
    """Interfaces that lead somewhere, without ours and the loopback."""
    found = {route.device for route in routes if route.kind == "unicast"}
    return sorted(name for name in found - {"", "lo"} if not name.startswith("hostel"))


def join(base: str, network: str, wanted: list[str]) -> list[str]:
    """Open what is closed, for this network; returns all that is open only because of us."""
    with _record(base) as opened:
        for name in wanted:
            if name in opened:
                opened[name].add(network)
            elif kernel.sysctl(f"ipv4/conf/{name}/forwarding") == "0":
                kernel.set_sysctl(f"ipv4/conf/{name}/forwarding", "1")
                opened[name] = {network}
        return sorted(opened)


def leave(path: str) -> None:
    """``BASE:NETWORK`` goes: close what nobody else needs, unless the whole host forwards by now."""
    base, _, network = path.rpartition(":")
    everywhere = kernel.sysctl("ipv4/ip_forward") == "1"
    with _record(base) as opened:
        for name, networks in list(opened.items()):
            networks.discard(network)
            if not networks:
                del opened[name]
                if everywhere or kernel.sysctl(f"ipv4/conf/{name}/forwarding") is None:
                    continue
                with contextlib.suppress(HostError):
                    kernel.set_sysctl(f"ipv4/conf/{name}/forwarding", "0")


@contextlib.contextmanager
def _record(base: str) -> Iterator[dict[str, set[str]]]:
    """The record, locked; written back at the end. Its lines: interface, then networks."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    fd = os.open(f"{base}/{RECORD}-{namespace}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(fd, "r+") as file:
        fcntl.flock(fd, fcntl.LOCK_EX)
        opened = {words[0]: set(words[1:]) for line in file if (words := line.split())}
        yield opened
        file.seek(0)
        file.truncate()
        file.writelines(f"{name} {' '.join(sorted(of))}\n" for name, of in sorted(opened.items()))
