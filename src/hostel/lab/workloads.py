"""What the lab ``paging`` plays, and what one play came to in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from hostel.errors import UserError

from . import reasons

Count = Annotated[int, msgspec.Meta(ge=0)]


class Workload(msgspec.Struct, frozen=True):
    guest: str
    what: str
    parameters: dict[str, int] = {}


WORKLOADS = (
    Workload("compute", "arithmetic: no page-table change at all"),
    Workload("memory", "streams and random places over 1 MiB", {"kib": 1024}),
    Workload("churn", "pages mapped, used, unmapped", {"pages": 32, "rounds": 6}),
    Workload("fork", "address spaces copied on write", {"pages": 16, "copies": 4}),
    Workload("switch", "context switches between 4 processes", {"rounds": 50}),
    Workload("demand", "page faults: missing, then read-only", {"pages": 64}),
    Workload("syscall", "system calls: ring 3 to ring 0 and back"),
)


def choose(names: Sequence[str]) -> list[Workload]:
    """Those named, once each; all, if none is."""
    known = {one.guest: one for one in WORKLOADS}
    for name in names:
        if name not in known:
            raise UserError(f"no workload {name!r}", cure=f"there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(WORKLOADS)


class Cost(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one workload in one way. None: this way cannot tell."""

    workload: str
    exits: dict[str, Count]
    """By reason, in the words of ``reasons.NAMES``."""
    exact: bool = True
    """False: exits for memory may be among the ``other``."""
    fills: Count | None = None
    """Entries made in a shadow or an EPT."""
    syncs: Count | None = None
    """Guest tables compared again with their shadows."""
    misses: Count | None = None
    """Of the TLB: each is a walk."""
    references: float | None = None
    """Table entries read, a walk."""
    longest: Count | None = None
    tables: Count | None = None
    """KiB of the hypervisor's page tables."""
    instructions: Count | None = None

    @property
    def total(self) -> int:
        return sum(self.exits.values())

    @property
    def least(self) -> int:
        """Exits for memory, at least."""
        return sum(count for reason, count in self.exits.items() if reason in reasons.MEMORY)

    @property
    def most(self) -> int:
        """And at most."""
        return self.least + (0 if self.exact else self.exits.get(reasons.OTHER, 0))
