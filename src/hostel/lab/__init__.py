"""Guided runs of the mechanisms: each small, deterministic, and told in words.

A lab runs real code of this house (the software hypervisor, and KVM where it compares) and gives a
``Report``: the question, the steps as they happened, tables of what was counted, drawings, and what
follows. Nothing in a report is written down beforehand but the words around the figures: a conclusion
that depends on a figure is computed from it.

Adding one is its file here, with ``run(arguments) -> Report``, and a line in ``LABS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import msgspec

from hostel.errors import UserError

LABS = {
    "paging": "Shadow against nested paging: the same guests, and what each way pays for what.",
    "vmx": "From VMXON to VMXOFF: what a processor does to run a guest, and what it answers to wrong use.",
    "schedule": "Several machines on two processors: shares, migration, threads that move by themselves.",
    "rings": "Rings and modes: what a guest does by itself, and what leaves it.",
    "models": "Hypervisor, host and hybrid: where the devices are, and what must be crossed.",
    "iommu": "A device that copies memory by itself, and what an evil guest reaches with it.",
}
"""Each with the question that it answers."""


class Step(msgspec.Struct, frozen=True):
    """A line of the trace: what happened, in words."""

    who: str
    what: str
    time: int | None = None
    """In guest instructions, where the lab has a clock."""


class Table(msgspec.Struct, frozen=True):
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str = ""


class Drawing(msgspec.Struct, frozen=True):
    title: str
    lines: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """What a lab found; ``msgspec.to_builtins`` of it is its JSON."""

    lab: str
    question: str
    steps: tuple[Step, ...] = ()
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    conclusions: tuple[str, ...] = ()
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    """Figures that have no place in a table."""
    page: str = ""
    """The page of the documentation."""


def run(name: str, arguments: Sequence[str] = (), **options: Any) -> Report:
    """Run a lab; ``options`` are its own. ``UserError`` for a name or an argument that it does not know,
    ``MissingTool`` without the extra ``soft``."""
    from hostel.soft.extra import unicorn_version

    if name not in LABS:
        raise UserError(f"no lab {name!r}", cure=f"there are {', '.join(LABS)}")
    unicorn_version()
    report: Report = import_module(f".{name}", __package__).run(arguments, **options)
    return report


def none_of(name: str, arguments: Sequence[str]) -> None:
    """For a lab that takes no arguments."""
    if arguments:
        raise UserError(f"the lab {name} takes no argument, not {arguments[0]!r}")
