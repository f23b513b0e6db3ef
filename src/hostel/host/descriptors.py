"""Whether this process may open as many files as a machine needs.

Where the limit is too low, one of many steps fails, in one of several processes, and some of them only wait
for each other then. So it is looked at before anything is started.
"""

from __future__ import annotations

from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

from hostel.errors import HostError
from hostel.spec import MachineSpec

BASE = 64
"""Half for a machine without devices of one's choice; the rest is for moments of its start."""


def ensure(spec: MachineSpec) -> None:
    """Raise our own limit as far as we may; ``HostError`` if that is not enough."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = needed(spec)
    if soft == RLIM_INFINITY or soft >= wanted:
        return
    if hard != RLIM_INFINITY and hard < wanted:
        raise HostError(
            f"this process may open {hard} files",
            cost=f"the machine would need up to {wanted}, and its start would stand still",
            cure="raise the limit (ulimit -n 1024), or where it comes from (limits.conf, LimitNOFILE=)",
        )
    setrlimit(RLIMIT_NOFILE, (wanted, hard))


def needed(spec: MachineSpec) -> int:
    """Besides what the caller has open. A vCPU, and each queue, has two; a NIC's and a backend's more."""
    queues = sum(disk.queues for disk in spec.disks) + 3 * sum(nic.queues for nic in spec.nics)
    devices = len(spec.disks) + len(spec.nics) + len(spec.volumes)
    return BASE + 2 * spec.cpus + 2 * queues + 6 * devices
