"""What the lab ``paging`` says of its columns: the tables, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from . import Table, hardware, reasons
from .paging_kvm import Measured
from .workloads import Cost, Workload

MANY = 100
"""Exits that are no longer the mere start of a guest."""


class Column(msgspec.Struct, frozen=True):
    """One way, one place: a column of the table."""

    way: str
    paging: str
    costs: dict[str, Cost]
    place: Measured | None = None
    """Where KVM ran; None: it was the software hypervisor."""


def tables(chosen: Sequence[Workload], columns: Sequence[Column], missing: str) -> Iterator[Table]:
    yield _for_memory(chosen, columns)
    yield _by_reason(chosen, columns)
    yield _work(chosen, columns)
    places = [column for column in columns if column.place is not None]
    yield Table(
        "Where KVM ran",
        ("", "host", "kernel", "module", "measured", "exits"),
        tuple(
            _place(column, column.place, not missing and column.way.endswith("(a)"))
            for column in sorted(places, key=lambda column: column.way[-2])
            if column.place is not None
        ),
        note=" ".join(_hints(places, missing)),
    )


def _place(column: Column, place: Measured, here: bool) -> tuple[str, ...]:
    known = all(cost.exact for cost in column.costs.values())
    return (
        column.way[-3:],
        f"{place.host} (here)" if here else place.host,
        place.kernel,
        place.module,
        place.date,
        "by tracepoint" if known else "by statistics",
    )


def _for_memory(chosen: Sequence[Workload], columns: Sequence[Column]) -> Table:
    note = "Page faults, loads of control registers, INVLPG, violations of the EPT or NPT."
    if any(not cost.exact for column in columns for cost in column.costs.values()):
        note += (
            " ≤: KVM's statistics do not say what the other exits were; root may count them by its "
            "tracepoint, where the kernel has one."
        )
    return Table(
        "VM exits for memory",
        ("workload", *(column.way for column in columns)),
        tuple(
            (one.guest, *(_bound(column.costs.get(one.guest)) for column in columns))
            for one in chosen
        ),
        note=note,
    )


def _bound(cost: Cost | None) -> int | str | None:
    if cost is None:
        return None
    return cost.least if cost.least == cost.most else f"≤ {cost.most:,}"


def _cells(chosen: Sequence[Workload], columns: Sequence[Column]) -> Iterator[tuple[str, Cost]]:
    for one in chosen:
        for column in columns:
            if (cost := column.costs.get(one.guest)) is not None:
                yield column.way, cost


def _by_reason(chosen: Sequence[Workload], columns: Sequence[Column]) -> Table:
    cells = list(_cells(chosen, columns))
    used = [name for name in reasons.NAMES if any(name in cost.exits for _, cost in cells)]
    return Table(
        "All VM exits, by reason",
        ("workload", "way", "all", *used),
        tuple(
            (cost.workload, way, cost.total, *(_named(cost, reason) for reason in used))
            for way, cost in cells
        ),
        note="host's: its interrupts and timer, the end of a time slice. They differ from run to run.",
    )


def _named(cost: Cost, reason: str) -> int | None:
    return cost.exits.get(reason, 0 if cost.exact else None)


_WORK = {
    "fills": "fills",
    "syncs": "syncs",
    "misses": "TLB misses",
    "references": "refs / walk",
    "longest": "most",
    "tables": "tables KiB",
    "instructions": "guest instr.",
}


def _work(chosen: Sequence[Workload], columns: Sequence[Column]) -> Table:
    return Table(
        "What was done",
        ("workload", "way", *_WORK.values()),
        tuple(
            (cost.workload, way, *(getattr(cost, field) for field in _WORK))
            for way, cost in _cells(chosen, columns)
        ),
        note="fills: entries made in a shadow, an EPT or NPT. syncs: guest tables compared again with their "
        "shadows. refs / walk, most: table entries read for a TLB miss, on average and in the longest walk. "
        "tables: of the hypervisor, at the guest's end. guest instr.: instructions that the guest executed. "
        "–: this way cannot tell.",
    )


def _hints(places: Sequence[Column], missing: str) -> Iterator[str]:
    """How to come by the kinds of KVM that are not in the table."""
    there = {column.paging for column in places}
    if len(there) == 2:
        return
    if missing:
        yield f"No KVM here: {missing}. `hostel lab paging --save FILE` elsewhere, then `--with FILE`."
    elif (name := hardware.module()) in reasons.MODULES:
        wanted = "shadow" if "nested" in there else "nested"
        switch = f"{reasons.MODULES[name]}={int(wanted == 'nested')}"
        yield (
            f"KVM with {wanted} paging is root's choice, while no machine runs: `hostel lab paging --save "
            f"FILE`; `modprobe -r {name}`; `modprobe {name} {switch}`; `hostel lab paging --with FILE`."
        )
    else:
        yield f"This KVM ({name}) has no other kind of paging."
    yield "In a checkout, `./dev paging` adds both kinds, on an emulated server."


def conclusions(columns: Sequence[Column]) -> Iterator[str]:
    """What follows from the figures, and from nothing else."""
    by_way = {column.way: column.costs for column in columns}
    shadow, nested = by_way["soft, shadow"], by_way["soft, nested"]
    dear = _dear(shadow, nested)
    if dear:
        yield (
            "Shadow pays for each change of the guest's tables and each switch of address spaces: more than "
            f"{MANY} exits more than with nested paging for {', '.join(dear)}."
        )
    if even := [name for name in shadow if name not in dear]:
        yield f"Where a guest leaves its tables alone there is little between them: {', '.join(even)}."
    yield from _on_kvm(columns)
    walks = [max(cost.longest or 0 for cost in row.values()) for row in (nested, shadow)]
    yield (
        f"Nested pays for each TLB miss: up to {walks[0]} references a walk against {walks[1]}; "
        f"{_average(nested):.1f} against {_average(shadow):.1f} on average. Four levels by four would be 24."
    )
    yield (
        f"Page tables of the hypervisor: at most {_most(shadow)} KiB of shadows, some for each address "
        f"space; at most {_most(nested)} KiB of EPT, one for the machine."
    )


def _dear(shadow: dict[str, Cost], nested: dict[str, Cost]) -> list[str]:
    """Workloads whose shadow costs more in any case, whatever the exits were that nobody could name."""
    both = [name for name in shadow if name in nested]
    return [name for name in both if shadow[name].least - nested[name].most > MANY]


def _on_kvm(columns: Sequence[Column]) -> Iterator[str]:
    of_kvm = [column for column in columns if column.place is not None]
    for shadow in of_kvm:
        for nested in of_kvm:
            if (shadow.paging, nested.paging) != ("shadow", "nested"):
                continue
            if dear := _dear(shadow.costs, nested.costs):
                yield (
                    f"On KVM the same ({shadow.way[-2]} against {nested.way[-2]}): {', '.join(dear)}."
                )
    undefined = {
        name: cost.exits["#UD"]
        for column in of_kvm
        for name, cost in column.costs.items()
        if "#UD" in cost.exits
    }
    if undefined:
        told = ", ".join(f"{name} {count}" for name, count in undefined.items())
        yield (
            f"The exits for #UD ({told}) are for no memory: programs in these guests end by UD2, and KVM has "
            "every #UD exit, with either kind of paging, to emulate what this processor may lack. The "
            "software hypervisor leaves it to the guest."
        )


def _average(costs: dict[str, Cost]) -> float:
    return sum(cost.references or 0 for cost in costs.values()) / len(costs)


def _most(costs: dict[str, Cost]) -> int:
    return max(cost.tables or 0 for cost in costs.values())
