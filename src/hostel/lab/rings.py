"""Rings and modes: what a guest's kernel and programs do among themselves, and what leaves the guest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from hostel.soft.silicon import Reason
from hostel.spec import Paging

from . import Drawing, Report, Step, Table, none_of
from .stage import Stage

QUESTION = (
    "A guest's kernel believes that it is in ring 0, and it is: in ring 0 of non-root mode. Which of the "
    "things that kernels and programs do need the hypervisor? Each is done n times and once; what n - 1 of "
    "them cost in VM exits is counted, with nested paging and with shadow paging."
)


class Deed(msgspec.Struct, frozen=True):
    """Something a mini guest does as often as a parameter says."""

    what: str
    guest: str
    parameter: str
    many: int
    each: int = 1
    """Of these in one round."""
    fixed: dict[str, int] = {}


DEEDS = (
    Deed("SYSCALL and SYSRET: ring 3 → 0 → 3", "syscall", "rounds", 101, fixed={"gate": 0}),
    Deed("INT 0x80 and IRET: ring 3 → 0 → 3", "syscall", "rounds", 101, fixed={"gate": 1}),
    Deed("a round of arithmetic in ring 0", "compute", "rounds", 1001),
    Deed("a page missing, later read-only: two page faults", "demand", "pages", 33),
    Deed("a switch of address spaces (MOV to CR3)", "switch", "rounds", 11, each=4,
         fixed={"processes": 4}),
    Deed("a page mapped, used and unmapped (INVLPG)", "churn", "rounds", 5, each=16,
         fixed={"pages": 16}),
)  # fmt: skip

_NOT_ITS_DOING = ("PREEMPTION_TIMER", "IO")
"""The hypervisor's own slices; and the guest's words, whose figures are longer after many rounds."""

_DRAWING = """\
             ring 0                                   ring 3
root         the hypervisor: decides                  the monitor: devices
             VM entry ↓   ↑ VM exit: CPUID, OUT, HLT, CR3 with shadow paging …
non-root     the guest's kernel  ◄─ SYSCALL, #PF, INT ─  the guest's programs
                                 ─── SYSRET, IRET ────►  no exit
"""


def _exits(deed: Deed, count: int, paging: Paging) -> Counter[str]:
    with Stage() as stage:
        actor = stage.actor(deed.guest, paging, **{**deed.fixed, deed.parameter: count})
        actor.play()
        exits = Counter({reason.name: n for reason, n in actor.vcpus[0].exits.items()})
    for name in _NOT_ITS_DOING:
        del exits[name]
    return exits


def _each(deed: Deed, paging: Paging) -> tuple[float, str]:
    """Exits for one deed, and of which reasons."""
    more = _exits(deed, deed.many, paging)
    more.subtract(_exits(deed, 1, paging))
    times = (deed.many - 1) * deed.each
    reasons = [name for name, n in more.most_common() if n >= times / 4]
    return sum(more.values()) / times, ", ".join(reasons)


def _rings() -> tuple[list[str], Counter[Reason]]:
    """What ring 3 may not do, in the guest's own words; and the exits of all of it."""
    with Stage() as stage:
        actor = stage.actor("rings")
        actor.play()
        return actor.words.splitlines(), Counter(actor.vcpus[0].exits)


_VECTORS = {"d": "#GP", "e": "#PF"}


def _told(line: str) -> str:
    """``write code: e error 7 at 8000000128``, as people write it (the guest's figures are hexadecimal)."""
    if found := re.fullmatch(r"(.+): ([de]) error (\w+) at (\w+)", line):
        what, vector, code, address = found.groups()
        where = f", address 0x{address}" if vector == "e" else ""
        return f"{what}: {_VECTORS[vector]}, error code 0x{code}{where}"
    return line


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("rings", arguments)
    rows = []
    for deed in DEEDS:
        ept, why = _each(deed, "ept")
        shadow, shadow_why = _each(deed, "shadow")
        rows.append((deed.what, ept, why or "–", shadow, shadow_why or "–"))
    words, exits = _rings()
    faults = sum(" error " in line for line in words)
    free = [row[0].partition(":")[0] for row in rows if row[1] < 0.05]
    dear = [row[0].partition("(")[0].strip() for row in rows if row[3] - row[1] > 0.5]
    return Report(
        lab="rings",
        question=QUESTION,
        steps=(
            Step(
                "—",
                f"ring 3 tries what only ring 0 may; {exits.total()} VM exits in all, those for its words "
                "on the console included",
            ),
            *(Step("guest", _told(line)) for line in words),
        ),
        drawings=(Drawing("Four places", tuple(_DRAWING.splitlines())),),
        tables=(
            Table(
                "VM exits for one of each",
                ("what the guest does", "EPT", "which", "shadow", "which"),
                tuple(rows),
            ),
        ),
        conclusions=(
            f"Without any exit under EPT: {'; '.join(free)}.",
            f"Dearer with shadow paging: {'; '.join(dear)}. The hypervisor must see each change of the "
            "guest's tables; with nested paging the processor walks them itself.",
            f"Of {len(words)} things that a ring 3 program tried {faults} were exceptions, taken by its own "
            f"kernel; {exits[Reason.EXCEPTION_NMI]} of them left the guest. Rings separate inside the guest, "
            "modes separate the guest from the hypervisor.",
        ),
        page="docs/rings.md",
    )
