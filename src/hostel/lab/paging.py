"""Shadow paging against nested paging: the same guests, four ways, and what each pays for what."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hostel.errors import UserError
from hostel.soft.paging.mmu import PagingMmu, WalkTrace
from hostel.soft.physical import PAGE
from hostel.soft.silicon import Reason
from hostel.spec import Paging

from . import Drawing, Report, Step, Table, hardware
from .draw import Node, tree
from .stage import Stage

QUESTION = (
    "A guest's address is translated twice: by its own tables to what it believes to be memory (GVA → GPA), "
    "then to the memory there is (GPA → HPA). Shadow paging makes one table of both and keeps it up to date; "
    "nested paging has the processor walk both. The same guests run in either way: who pays, and when?"
)


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
WAYS: tuple[Paging, ...] = ("shadow", "ept")
_NAMES = {one.guest: one for one in WORKLOADS}
_MEMORY = {Reason.EXCEPTION_NMI, Reason.CR_ACCESS, Reason.INVLPG, Reason.EPT_VIOLATION}


_MANY = 100
"""Exits that are no longer the mere start of a guest."""


class Cost(msgspec.Struct, frozen=True):
    """Of one workload in one way. None: this way cannot tell."""

    workload: str
    way: str
    exits: int
    """For memory."""
    why: str
    fills: int | None = None
    """Entries made in a shadow or an EPT."""
    syncs: int | None = None
    """Guest tables compared again with their shadows."""
    misses: int | None = None
    """Of the TLB: each is a walk."""
    references: float | None = None
    """Table entries read, a walk."""
    longest: int | None = None
    memory: int | None = None
    """KiB of the hypervisor's page tables at their most."""
    instructions: int | None = None


def soft(workload: Workload, paging: Paging) -> tuple[Cost, WalkTrace | None]:
    """On the software hypervisor; and the longest walk that led to a page."""
    longest: list[WalkTrace] = []

    def keep(walk: WalkTrace) -> None:
        if not longest or walk.references > longest[0].references:
            longest[:] = [walk]

    with Stage() as stage:
        pcpu = stage.host.pcpus[0]
        mmu = pcpu.tlb
        assert isinstance(mmu, PagingMmu)
        mmu.on_walk = keep
        actor = stage.actor(workload.guest, paging, **workload.parameters)
        actor.play()
        vcpu, paid, walked = actor.vcpus[0], actor.machine.paging.statistics, mmu.statistics
        reasons = {reason: n for reason, n in vcpu.exits.items() if reason in _MEMORY}
        most = sorted(reasons.items(), key=lambda item: -item[1])[:2]
        cost = Cost(
            workload=workload.guest,
            way=f"soft, {'nested (EPT)' if paging == 'ept' else 'shadow'}",
            exits=sum(reasons.values()),
            why=", ".join(f"{_short(reason)} {n}" for reason, n in most),
            fills=paid.fills,
            syncs=paid.syncs,
            misses=mmu.tlb.statistics.misses,
            references=walked.references / max(walked.walks, 1),
            longest=walked.longest,
            memory=paid.frames * PAGE >> 10,
            instructions=vcpu.instructions,
        )
    return cost, longest[0] if longest else None


def _short(reason: Reason) -> str:
    return {Reason.EXCEPTION_NMI: "#PF", Reason.CR_ACCESS: "MOV CR"}.get(reason, reason.name)


def on_kvm(workload: Workload) -> Cost:
    """By the kernel's counters; of shadow paging it counts faults and the guest's INVLPGs."""
    run = hardware.play(workload.guest, **workload.parameters)
    vcpu, way = run.vcpu, hardware.paging()
    shadow = way == "shadow"
    parts = {"page faults": vcpu.get("pf_taken", 0)}
    if shadow:
        parts |= {"INVLPG": vcpu.get("invlpg", 0), "table writes": run.vm.get("mmu_pte_write", 0)}
    return Cost(
        workload=workload.guest,
        way=f"KVM, {way}",
        exits=vcpu["exits"] - run.returns,
        why=", ".join(f"{name} {n}" for name, n in parts.items() if n),
    )


def drawn(walk: WalkTrace) -> tuple[str, ...]:
    """The walk as the tables it went through."""
    node = Node(f"page at {walk.page.address:#x}")
    if walk.ept is not None:
        levels = " → ".join(f"L{step.level} {step.value:#x}" for step in walk.ept.steps)
        node = Node(
            f"GPA {walk.page.address:#x}", (Node(f"EPT: {levels} → HPA {walk.ept.address:#x}"),)
        )
    for step in reversed(walk.page.steps):
        where = "at GPA" if walk.ept is not None else "at HPA"
        through = "  (read through the EPT)" if walk.ept is not None else ""
        node = Node(
            f"level {step.level}: entry {where} {step.address:#x} = {step.value:#x}{through}",
            (node,),
        )
    return tuple(tree(Node(f"GVA {walk.address:#x}, {walk.references} references", (node,))))


def _chosen(arguments: Sequence[str]) -> list[Workload]:
    for name in arguments:
        if name not in _NAMES:
            raise UserError(f"no workload {name!r}", cure=f"there are {', '.join(_NAMES)}")
    return [_NAMES[name] for name in dict.fromkeys(arguments)] or list(WORKLOADS)


def run(arguments: Sequence[str] = ()) -> Report:
    chosen = _chosen(arguments)
    missing = hardware.missing()
    costs: list[Cost] = []
    walks: dict[Paging, WalkTrace] = {}
    for workload in chosen:
        for paging in WAYS:
            cost, walk = soft(workload, paging)
            costs.append(cost)
            if walk is not None and walk.references > _references(walks.get(paging)):
                walks[paging] = walk
        if not missing:
            costs.append(on_kvm(workload))
    return Report(
        lab="paging",
        question=QUESTION,
        steps=tuple(Step(one.guest, one.what) for one in chosen),
        drawings=tuple(
            Drawing(
                f"The longest walk, {'nested' if way == 'ept' else 'shadow'} paging", drawn(walk)
            )
            for way, walk in walks.items()
        ),
        tables=(_costs(costs, missing),),
        conclusions=tuple(_conclusions(costs)),
        data={"kvm": missing or hardware.paging()},
        page="docs/paging.md",
    )


def _references(walk: WalkTrace | None) -> int:
    return walk.references if walk else 0


def _costs(costs: Sequence[Cost], missing: str) -> Table:
    if missing:
        note = f"No row for KVM: {missing}."
    else:
        note = (
            f"This host's KVM has {hardware.paging()} paging. `./dev testbed --npt 0` and `--npt 1` have a "
            "real one of each kind: of KVM all exits that did not come back to this process are counted."
        )
    return Table(
        "Exits for memory, and what was done about them",
        ("workload", "way", "exits", "most of them", "fills", "syncs", "TLB misses", "refs/walk", "longest",
         "tables KiB", "instructions"),
        tuple(
            (one.workload, one.way, one.exits, one.why, one.fills, one.syncs, one.misses, one.references,
             one.longest, one.memory, one.instructions)
            for one in costs
        ),
        note=note,
    )  # fmt: skip


def _conclusions(costs: Sequence[Cost]) -> list[str]:
    """What follows from the figures, and from nothing else."""
    by_way = {way: {c.workload: c for c in costs if c.way == way} for way in {c.way for c in costs}}
    shadow, nested = by_way["soft, shadow"], by_way["soft, nested (EPT)"]
    said = []
    dear = [name for name in shadow if shadow[name].exits - nested[name].exits > _MANY]
    if dear:
        said.append(
            "Shadow pays for each change of the guest's tables and each switch of address spaces: "
            f"{', '.join(dear)} take more than {_MANY} exits more than with nested paging."
        )
    even = [name for name in shadow if name not in dear]
    if even:
        said.append(
            f"Where a guest leaves its tables alone there is little between them: {', '.join(even)}."
        )
    walks = {way: max((c.longest or 0) for c in row.values()) for way, row in by_way.items()}
    said.append(
        f"Nested pays for each TLB miss: up to {walks['soft, nested (EPT)']} references a walk against "
        f"{walks['soft, shadow']}; {_total(nested, 'references'):.1f} against "
        f"{_total(shadow, 'references'):.1f} on average. Four levels by four would be 24."
    )
    said.append(
        f"Page tables of the hypervisor: at most {_most(shadow)} KiB of shadows, one for each address space; "
        f"at most {_most(nested)} KiB of EPT, one for the machine."
    )
    return said


def _total(costs: dict[str, Cost], field: str) -> float:
    values = [getattr(cost, field) or 0 for cost in costs.values()]
    return float(sum(values) / len(values))


def _most(costs: dict[str, Cost]) -> int:
    return max(cost.memory or 0 for cost in costs.values())
