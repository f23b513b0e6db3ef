"""Shadow paging against nested paging: the same guests, four ways, and what each pays for what.

::

    column            the software hypervisor, shadow and nested;  KVM here;  KVM elsewhere, from files
      └─ Cost         of each workload

Exits for memory are those that another way of virtualizing memory would not have, or would have elsewhere:
page faults, loads of control registers, INVLPG, and violations of the nested table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase

import msgspec

from hostel.errors import UserError
from hostel.soft.paging.mmu import PagingMmu, WalkTrace
from hostel.soft.physical import PAGE
from hostel.spec import Paging

from . import Drawing, Report, Step, hardware, paging_kvm, reasons
from .draw import Node, tree
from .paging_kvm import Measured
from .paging_report import Column, conclusions, tables
from .stage import Stage
from .vmx import tell
from .workloads import Cost, Workload, choose

QUESTION = (
    "A guest's address is translated twice: by its own tables to what it believes to be memory (GVA → GPA), "
    "then to the memory there is (GPA → HPA). Shadow paging makes one table of both and keeps it up to date; "
    "nested paging has the processor walk both. The same guests run in either way: who pays, and when?"
)
WAYS: dict[str, Paging] = {"shadow": "shadow", "nested": "ept"}
MOST_FILES = 8
FIRST_EXITS = 10


def soft(workload: Workload, paging: Paging) -> tuple[Cost, WalkTrace | None]:
    """On the software hypervisor; and the longest walk that led to a page."""
    longest: list[WalkTrace] = []

    def keep(walk: WalkTrace) -> None:
        if not longest or walk.references > longest[0].references:
            longest[:] = [walk]

    with Stage() as stage:
        mmu = stage.host.pcpus[0].tlb
        assert isinstance(mmu, PagingMmu)
        mmu.on_walk = keep
        actor = stage.actor(workload.guest, paging, **workload.parameters)
        actor.play()
        vcpu, paid, walked = actor.vcpus[0], actor.machine.paging.statistics, mmu.statistics
        cost = Cost(
            workload.guest,
            reasons.of_soft(vcpu.exits),
            fills=paid.fills,
            syncs=paid.syncs,
            misses=mmu.tlb.statistics.misses,
            references=walked.references / max(walked.walks, 1),
            longest=walked.longest,
            tables=paid.frames * PAGE >> 10,
            instructions=vcpu.instructions,
        )
    return cost, longest[0] if longest else None


def drawn(walk: WalkTrace) -> tuple[str, ...]:
    """The walk as the tables it went through."""
    node = Node(f"page at {walk.page.address:#x}")
    if walk.ept is not None:
        node = Node(f"HPA {walk.ept.address:#x}")
        for step in reversed(walk.ept.steps):
            node = Node(
                f"EPT level {step.level}: entry at HPA {step.address:#x} = {step.value:#x}", (node,)
            )
        node = Node(f"page at GPA {walk.page.address:#x}", (node,))
    for step in reversed(walk.page.steps):
        where = "at GPA" if walk.ept is not None else "at HPA"
        through = " (read through the EPT)" if walk.ept is not None else ""
        node = Node(
            f"level {step.level}: entry {where} {step.address:#x} = {step.value:#x}{through}",
            (node,),
        )
    return tuple(tree(Node(f"GVA {walk.address:#x}, {walk.references} references", (node,))))


def _soft_columns(chosen: Sequence[Workload]) -> tuple[list[Column], list[Drawing]]:
    columns, drawings = [], []
    for name, paging in WAYS.items():
        played = [soft(workload, paging) for workload in chosen]
        columns.append(Column(f"soft, {name}", name, {cost.workload: cost for cost, _ in played}))
        walks = [walk for _, walk in played if walk is not None]
        if walks:
            longest = max(walks, key=lambda walk: walk.references)
            drawings.append(Drawing(f"The longest walk, {name} paging", drawn(longest)))
    return columns, drawings


def _first_exits(workload: Workload) -> Iterator[Step]:
    """What either way begins with, in words."""
    for name, paging in WAYS.items():
        with Stage(traced=True) as stage:
            stage.actor(workload.guest, paging, **workload.parameters).play()
            exits = [event for event in stage.trace if event.what == "VM exit"][:FIRST_EXITS]
        for step in tell(exits):
            yield Step(f"{workload.guest}, {name}", step.what, step.time)


def _kvm_columns(chosen: Sequence[Workload], measured: Iterable[Measured]) -> Iterator[Column]:
    names = [one.guest for one in chosen]
    for letter, one in zip(ascii_lowercase, measured, strict=False):
        costs = {cost.workload: cost for cost in one.costs if cost.workload in names}
        yield Column(f"KVM, {one.paging} ({letter})", one.paging, costs, one)


def run(arguments: Sequence[str] = (), *, beside: Sequence[Path] = ()) -> Report:
    """``beside``: files of ``paging_kvm``, what KVM did elsewhere."""
    if len(beside) > MOST_FILES:
        raise UserError(f"at most {MOST_FILES} files stand beside each other, not {len(beside)}")
    chosen = choose(arguments)
    measured = [paging_kvm.load(path) for path in beside]
    missing = hardware.missing()
    if not missing:
        measured.insert(0, paging_kvm.measure(chosen))
    columns, drawings = _soft_columns(chosen)
    columns += _kvm_columns(chosen, measured)
    columns.sort(key=lambda column: column.paging != "shadow")  # stable: soft before KVM
    return Report(
        lab="paging",
        question=QUESTION,
        steps=(*(Step(one.guest, one.what) for one in chosen), *_first_exits(chosen[0])),
        drawings=tuple(drawings),
        tables=tuple(tables(chosen, columns, missing)),
        conclusions=tuple(conclusions(columns)),
        data={"kvm": missing or hardware.paging(), "columns": msgspec.to_builtins(columns)},
        page="docs/paging.md",
    )
