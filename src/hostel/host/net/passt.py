"""``--net user``: a network without privileges, by passt: a guest's connections become sockets of the host's.

The frames come through a Unix socket; passt speaks for the guest from the host's own addresses. The
guest does not see the host's loopback (``--no-map-gw``), as on every other network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hostel.errors import HelperError
from hostel.host import toolbox
from hostel.host.interface import Attachment, GuestLink
from hostel.host.process import Helper
from hostel.spec import Nic, Publish

from . import subnet
from .port import reserve

MTU = 65520
"""passt's own default: with no wire behind it, frames may be large."""
PATIENCE = 10.0


def start(nic: Nic, publish: Sequence[Publish], path: Path) -> tuple[Helper, GuestLink]:
    """Start it; it will listen at ``path``."""
    program = toolbox.find("passt", package="passt", cost="no network without root")
    plan = link(nic, subnet.routes())
    address = plan.addresses[0].partition("/")[0]
    options = ["-f", "-q", "-s", str(path), "-a", address, "-n", str(subnet.PREFIX)]
    options += ["-g", plan.gateway, "--dns-forward", plan.dns[0]]  # to the host's own resolver
    options += ["-m", str(plan.mtu), "--no-map-gw", "-4", *_ports(publish)]
    for port in publish:  # passt's own words say neither which port nor why
        reserve(port.address, port.host, port.protocol).close()
    if os.geteuid() == 0:  # it would become nobody, who cannot make a socket in our directory; it
        options += ["--runas", "0"]  # gives up all rights and its root directory even so
    return Helper(path.stem, [program, *options], runtime=path.parent), plan


def ready(helper: Helper, path: Path, attachment: Attachment) -> Attachment:
    """The attachment, once passt listens."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if helper.wait(0.002) is not None:
            raise helper.failure()
        if time.monotonic() > deadline:
            raise HelperError(f"passt did not listen on {path} in {PATIENCE:g} s")
    return attachment


def link(nic: Nic, taken: list[subnet.Route]) -> GuestLink:
    """A subnet that the host has no use for: the guest could not reach what the host has there."""
    base = subnet.choose("user", taken)
    gateway, address, dns = (subnet.text(base + n) for n in (1, 2, 3))
    return GuestLink(
        mac=nic.mac,
        addresses=(f"{address}/{subnet.PREFIX}",),
        gateway=gateway,
        dns=(dns,),
        mtu=nic.mtu or MTU,
    )


def _ports(publish: Sequence[Publish]) -> list[str]:
    options = []
    for port in publish:
        flag = "-u" if port.protocol == "udp" else "-t"
        where = f"{port.address}/" if port.address else ""
        options += [flag, f"{where}{port.host}:{port.guest}"]
    return options
