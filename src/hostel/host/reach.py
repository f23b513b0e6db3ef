"""Which network a machine gets whose user named none: the best that this host lets this user make."""

from __future__ import annotations

import os
from pathlib import Path

from hostel.errors import MissingTool
from hostel.spec import Nic

from . import toolbox
from .net import kernel
from .tap import tun_missing

CAP_NET_ADMIN = 12  # linux/capability.h


def default_nic() -> tuple[Nic | None, str]:
    """``nat``, else ``user``, else none; and why, for a person."""
    missing = _nat_missing()
    if not missing:
        return Nic(mode="nat"), "root, tun and nftables are there"
    try:
        toolbox.find("passt", package="passt", cost="no network without root")
    except MissingTool as error:
        return None, f"no nat: {missing}; no user: {error.message}"
    if not _has_default_route():
        return None, f"no nat: {missing}; no user: this host has no default route"
    return Nic(mode="user"), f"no nat: {missing}"


def _nat_missing() -> str:
    """What a network of hostel's own lacks here; empty for nothing."""
    if os.geteuid() != 0 or not _may_administer():
        return "it needs root, and CAP_NET_ADMIN"
    try:
        for program in kernel.PACKAGES:
            kernel.find(program)
    except MissingTool as error:
        return error.message
    if missing := tun_missing():
        return missing
    writable = os.access(kernel.SYSCTL + "ipv4/ip_forward", os.W_OK)
    return "" if writable else f"{kernel.SYSCTL} may not be written"  # as in most containers


def _has_default_route() -> bool:
    """passt speaks from the address of one. Fields: interface, destination, gateway … (proc(5))."""
    try:
        lines = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(int(line.split()[1], 16) == 0 for line in lines)


def _may_administer() -> bool:
    """Root of a container may lack it (proc(5), CapEff)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    return False
