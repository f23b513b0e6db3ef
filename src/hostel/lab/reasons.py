"""VM exits by reason, in one vocabulary: of the software hypervisor, of KVM on Intel and on AMD.

KVM's statistics count exits, and few reasons. Its tracepoint ``kvm_exit`` knows each one's number: the basic
exit reason (SDM vol. 3D appendix C) or the EXITCODE (APM vol. 2 appendix C). Where it may be counted, the
division is exact, and the sum is compared with the statistics; else it is as far as they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from typing import NamedTuple

from hostel.errors import KvmError
from hostel.kvm.tracepoints import TracepointCount
from hostel.soft.silicon import Reason

OTHER = "other"


class Kind(NamedTuple):
    name: str
    soft: tuple[Reason, ...]
    intel: str
    """What is true of the tracepoint's fields."""
    amd: str
    for_memory: bool = False


KINDS = (
    Kind(
        "#PF",
        (Reason.EXCEPTION_NMI,),  # nothing else is in its exception bitmap
        "exit_reason == 0 && intr_info == 0x80000b0e",
        "exit_reason == 0x4e",
        for_memory=True,
    ),
    Kind(
        "MOV CR",
        (Reason.CR_ACCESS,),
        "exit_reason == 28",
        "exit_reason <= 0x1f || exit_reason == 0x65",  # the last: CR0 without TS and MP
        for_memory=True,
    ),
    Kind("INVLPG", (Reason.INVLPG,), "exit_reason == 14", "exit_reason == 0x79", for_memory=True),
    Kind(
        "EPT/NPT",
        (Reason.EPT_VIOLATION, Reason.EPT_MISCONFIGURATION),
        "exit_reason == 48 || exit_reason == 49",
        "exit_reason == 0x400",
        for_memory=True,
    ),
    Kind("#UD", (), "exit_reason == 0 && intr_info == 0x80000306", "exit_reason == 0x46"),
    Kind("I/O", (Reason.IO,), "exit_reason == 30", "exit_reason == 0x7b"),
    Kind(
        "MSR",
        (Reason.RDMSR, Reason.WRMSR),
        "exit_reason == 31 || exit_reason == 32",
        "exit_reason == 0x7c",
    ),
    Kind(
        "host's",
        (Reason.EXTERNAL_INTERRUPT, Reason.PREEMPTION_TIMER),
        "exit_reason == 1 || exit_reason == 52",
        "exit_reason == 0x60 || exit_reason == 0x61",
    ),
)
"""The last: its interrupts, its timer, the end of a time slice."""

NAMES = (*(kind.name for kind in KINDS), OTHER)
MEMORY = frozenset(kind.name for kind in KINDS if kind.for_memory)


def of_soft(exits: Mapping[Reason, int]) -> dict[str, int]:
    counted = {kind.name: sum(exits.get(one, 0) for one in kind.soft) for kind in KINDS}
    return _with_rest(counted, sum(exits.values()))


def _with_rest(counted: dict[str, int], total: int) -> dict[str, int]:
    counted[OTHER] = total - sum(counted.values())
    return {name: count for name, count in counted.items() if count}


def of_statistics(
    vcpu: Mapping[str, int], port_io: int, module: str, paging: str
) -> dict[str, int]:
    """As far as a vCPU's statistics tell. A KVM that interprets the guest's kernel (neither of the two
    modules) counts there INVLPGs and faults that were no exits."""
    counted = {"I/O": port_io}
    if module in MODULES:
        counted["host's"] = vcpu.get("irq_exits", 0)
        counted["#PF" if paging == "shadow" else "EPT/NPT"] = vcpu.get("pf_taken", 0)
        counted["INVLPG"] = vcpu.get("invlpg", 0)
    return _with_rest(counted, vcpu["exits"])


MODULES = {"kvm_intel": "ept", "kvm_amd": "npt"}
"""Whose exits have these numbers, and the parameter by which each is told to use nested paging."""

_MMU = {
    "syncs": ("kvmmmu/kvm_mmu_sync_page", ""),
    "made": ("kvmmmu/kvm_mmu_get_page", "created == 1"),
    "dropped": ("kvmmmu/kvm_mmu_prepare_zap_page", ""),
}


class Traced(NamedTuple):
    """What the tracepoints told of one run."""

    reasons: dict[str, int]
    syncs: int
    """Guest tables compared again with their shadows."""
    frames: int
    """Pages of KVM's page tables in use at the end."""


class Tracer:
    """Counts this thread's exits from now on, if the host lets us; a context manager."""

    def __init__(self, module: str) -> None:
        self._undo = ExitStack()
        self._counts: dict[str, TracepointCount] = {}
        if module not in MODULES:
            return
        try:
            for name, event, condition in _wanted(module):
                self._counts[name] = TracepointCount(event, condition)
                self._undo.enter_context(closing(self._counts[name]))
        except KvmError:
            self.close()

    def read(self, exits: int) -> Traced | None:
        """None if the host does not let us, or if these are not the ``exits`` that KVM itself counted."""
        values = {name: count.value for name, count in self._counts.items()}
        if values.pop("exits", None) != exits:
            return None
        syncs, made, dropped = (values.pop(name) for name in _MMU)
        return Traced(_with_rest(values, exits), syncs, made - dropped)

    def close(self) -> None:
        self._undo.close()
        self._counts.clear()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wanted(module: str) -> Iterable[tuple[str, str, str]]:
    """Name, event, condition."""
    yield "exits", "kvm/kvm_exit", ""
    for kind in KINDS:
        yield kind.name, "kvm/kvm_exit", kind.intel if module == "kvm_intel" else kind.amd
    for name, (event, condition) in _MMU.items():
        yield name, event, condition
