"""Whether this host's KVM runs Linux, tried once and remembered until the host or its KVM is another.

The trial (``kvm/probe.py``) takes some ten milliseconds and half of the monitor's modules: too much for
each start. What is remembered is named by the boot, the device node (made anew with the module) and
whether we may open it; only a trial that came to an end is. ``hostel doctor`` always tries again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from hostel.errors import HostelError

from . import runtime

DEVICE = "/dev/kvm"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Verdict(msgspec.Struct, frozen=True):
    usable: bool
    reason: str
    max_vcpus: int
    key: str = ""


def verdict() -> Verdict:
    """Never raises."""
    key = _key()
    try:
        file = runtime.base() / ".kvm"
    except HostelError:  # who starts a machine there will say so
        return _tried(key)[0]
    with contextlib.suppress(OSError, ValueError):
        known = _recall(file)
        if key and known.key == key:
            return known
    found, certain = _tried(key)
    if key and certain:
        _remember(file, found)
    return found


def _tried(key: str) -> tuple[Verdict, bool]:
    from hostel.kvm.probe import probe

    report = probe()
    return Verdict(report.usable, report.reason, report.max_vcpus, key), not report.error


def _key() -> str:
    try:
        node = os.stat(DEVICE)
        boot = Path(_BOOT_ID).read_text().strip()
    except OSError:
        return ""
    may_open = os.access(DEVICE, os.R_OK | os.W_OK, effective_ids=True)
    return f"{boot} {node.st_ino} {node.st_ctime_ns} {may_open}"


def _recall(file: Path) -> Verdict:
    """Lines: a decoder of JSON is more to import than there is to read."""
    key, usable, max_vcpus, reason, end = file.read_text().split("\n")
    if end:
        raise ValueError(end)
    return Verdict(usable == "usable", reason, int(max_vcpus), key)


def _remember(file: Path, found: Verdict) -> None:
    """A torn file is none: it is tried again next time."""
    usable = "usable" if found.usable else "unusable"
    with contextlib.suppress(OSError):
        file.write_text(f"{found.key}\n{usable}\n{found.max_vcpus}\n{found.reason}\n")
