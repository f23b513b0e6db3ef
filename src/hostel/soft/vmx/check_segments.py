"""VM entry's checks of the guest's segment registers (SDM vol. 3C §26.3.1.2), in the manual's order.

Selectors, then bases, then limits, then access rights, each for all registers: a virtual-8086 guest has
rules of its own for the six ordinary ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hostel.soft.silicon import Secondary
from hostel.soft.state import CR0_PE, RFLAGS_VM, Segment, canonical
from hostel.soft.vmx.capabilities import EntryControl
from hostel.soft.vmx.enter import secondary_of
from hostel.soft.vmx.fields import SEGMENTS, Field
from hostel.soft.vmx.vmcs import Vmcs

Checks = Iterator[tuple[bool, str]]

TYPE, S, P, CODE_64, DB, G = 0xF, 1 << 4, 1 << 7, 1 << 13, 1 << 14, 1 << 15
RESERVED_LOW, RESERVED_HIGH = 0xF00, 0xFFFE_0000
DATA_WRITABLE = 3
"""Type: a read/write, accessed, expand-up data segment."""


class Guest(msgspec.Struct):
    """What the checks look at."""

    segments: dict[str, Segment]
    v8086: bool
    long: bool
    unrestricted: bool
    protected: bool


REAL_MODE = Secondary.UNRESTRICTED_GUEST | Secondary.PAGED_REAL_MODE


def check_segments(vmcs: Vmcs) -> Checks:
    guest = _gather(vmcs)
    yield from _selectors(guest)
    yield from _bases(guest)
    if guest.v8086:
        for name in SEGMENTS[:6]:
            yield (
                guest.segments[name].limit == 0xFFFF,
                f"§26.3.1.2: limit of {name} in virtual-8086 mode",
            )
            yield (
                guest.segments[name].rights == 0xF3,
                f"§26.3.1.2: rights of {name} in virtual-8086 mode",
            )
    else:
        yield from _code(guest)
        yield from _stack(guest)
        for name in ("ds", "es", "fs", "gs"):
            yield from _data(guest, name)
    yield from _tr(guest)
    yield from _ldtr(guest)


def _gather(vmcs: Vmcs) -> Guest:
    def segment(number: int) -> Segment:
        return Segment(
            vmcs.read(Field.GUEST_ES_SELECTOR + 2 * number),
            vmcs.read(Field.GUEST_ES_BASE + 2 * number),
            vmcs.read(Field.GUEST_ES_LIMIT + 2 * number),
            vmcs.read(Field.GUEST_ES_RIGHTS + 2 * number),
        )

    return Guest(
        segments={name: segment(number) for number, name in enumerate(SEGMENTS)},
        v8086=bool(vmcs.read(Field.GUEST_RFLAGS) & RFLAGS_VM),
        long=bool(vmcs.read(Field.ENTRY_CONTROLS) & EntryControl.GUEST_64),
        unrestricted=bool(secondary_of(vmcs) & REAL_MODE),
        protected=bool(vmcs.read(Field.GUEST_CR0) & CR0_PE),
    )


def _selectors(guest: Guest) -> Checks:
    at = guest.segments
    yield not at["tr"].selector & 4, "§26.3.1.2: TI of the selector of tr"
    yield (
        not at["ldtr"].usable or not at["ldtr"].selector & 4,
        "§26.3.1.2: TI of the selector of ldtr",
    )
    if not guest.v8086 and not guest.unrestricted:
        yield (
            at["ss"].selector & 3 == at["cs"].selector & 3,
            "§26.3.1.2: RPL of ss is not the RPL of cs",
        )


def _bases(guest: Guest) -> Checks:
    at = guest.segments
    if guest.v8086:
        for name in SEGMENTS[:6]:
            yield (
                at[name].base == at[name].selector << 4,
                f"§26.3.1.2: base of {name} in virtual-8086 mode",
            )
    for name in ("tr", "fs", "gs"):
        yield canonical(at[name].base), f"§26.3.1.2: base of {name} is not canonical"
    yield (
        not at["ldtr"].usable or canonical(at["ldtr"].base),
        "§26.3.1.2: base of ldtr is not canonical",
    )
    yield not at["cs"].base >> 32, "§26.3.1.2: bits 63:32 of the base of cs"
    for name in ("ss", "ds", "es"):
        yield (
            not at[name].usable or not at[name].base >> 32,
            f"§26.3.1.2: bits 63:32 of the base of {name}",
        )


def _code(guest: Guest) -> Checks:
    cs, ss = guest.segments["cs"], guest.segments["ss"]
    kind = cs.rights & TYPE
    yield (
        kind in (9, 11, 13, 15) or (guest.unrestricted and kind == DATA_WRITABLE),
        "§26.3.1.2: type of cs",
    )
    yield bool(cs.rights & S), "§26.3.1.2: S of cs"
    yield _code_dpl(kind, cs.dpl, ss.dpl), "§26.3.1.2: DPL of cs"
    yield from _present(cs, "cs")
    if guest.long and cs.rights & CODE_64:
        yield not cs.rights & DB, "§26.3.1.2: D/B of a 64-bit cs"
    yield from _granularity(cs, "cs")


def _code_dpl(kind: int, dpl: int, stack_dpl: int) -> bool:
    """A data segment's is 0, nonconforming code's SS.DPL, conforming code's at most that."""
    if kind == DATA_WRITABLE:
        return dpl == 0
    return dpl == stack_dpl if kind in (9, 11) else dpl <= stack_dpl


def _stack(guest: Guest) -> Checks:
    cs, ss = guest.segments["cs"], guest.segments["ss"]
    if ss.usable:
        yield ss.rights & TYPE in (3, 7), "§26.3.1.2: type of ss"
        yield bool(ss.rights & S), "§26.3.1.2: S of ss"
    if not guest.unrestricted:
        yield ss.dpl == ss.selector & 3, "§26.3.1.2: DPL of ss is not its RPL"
    if cs.rights & TYPE == DATA_WRITABLE or not guest.protected:
        yield ss.dpl == 0, "§26.3.1.2: DPL of ss"
    if ss.usable:
        yield from _present(ss, "ss")
        yield from _granularity(ss, "ss")


def _data(guest: Guest, name: str) -> Checks:
    segment = guest.segments[name]
    if not segment.usable:
        return
    kind = segment.rights & TYPE
    yield bool(kind & 1) and (not kind & 8 or bool(kind & 2)), f"§26.3.1.2: type of {name}"
    yield bool(segment.rights & S), f"§26.3.1.2: S of {name}"
    if not guest.unrestricted and kind <= 11:
        yield segment.dpl >= segment.selector & 3, f"§26.3.1.2: DPL of {name} is below its RPL"
    yield from _present(segment, name)
    yield from _granularity(segment, name)


def _tr(guest: Guest) -> Checks:
    tr = guest.segments["tr"]
    yield tr.rights & TYPE in ((11,) if guest.long else (3, 11)), "§26.3.1.2: type of tr"
    yield not tr.rights & S, "§26.3.1.2: S of tr"
    yield from _present(tr, "tr")
    yield from _granularity(tr, "tr")
    yield tr.usable, "§26.3.1.2: tr is unusable"


def _ldtr(guest: Guest) -> Checks:
    ldtr = guest.segments["ldtr"]
    if ldtr.usable:
        yield ldtr.rights & TYPE == 2, "§26.3.1.2: type of ldtr"
        yield not ldtr.rights & S, "§26.3.1.2: S of ldtr"
        yield from _present(ldtr, "ldtr")
        yield from _granularity(ldtr, "ldtr")


def _present(segment: Segment, name: str) -> Checks:
    yield bool(segment.rights & P), f"§26.3.1.2: P of {name}"
    yield not segment.rights & RESERVED_LOW, f"§26.3.1.2: bits 11:8 of the rights of {name}"


def _granularity(segment: Segment, name: str) -> Checks:
    """A limit that is not whole pages must be in bytes; one of more than 20 bits, in pages."""
    pages = segment.rights & G
    yield segment.limit & 0xFFF == 0xFFF or not pages, f"§26.3.1.2: G of {name} and its limit"
    yield not segment.limit >> 20 or bool(pages), f"§26.3.1.2: G of {name} and its limit"
    yield not segment.rights & RESERVED_HIGH, f"§26.3.1.2: bits 31:17 of the rights of {name}"
