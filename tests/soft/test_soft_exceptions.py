"""Two events at once: SDM vol. 3A table 6-5."""

from __future__ import annotations

import pytest

from hostel.soft.exceptions import DB, DE, DF, GP, NP, PF, TS, UD, TripleFault, combine, fault
from hostel.soft.silicon import Event, EventType


@pytest.mark.parametrize(
    ("first", "second", "becomes"),
    [
        *((UD, PF, PF), (UD, GP, GP), (DB, PF, PF)),
        *((GP, GP, DF), (GP, DE, DF), (TS, NP, DF), (GP, PF, PF), (GP, UD, UD)),
        *((PF, PF, DF), (PF, GP, DF), (PF, UD, UD)),
    ],
)
def test_table(first: int, second: int, becomes: int) -> None:
    assert combine(fault(first), fault(second)).vector == becomes


def test_a_double_fault_has_error_code_0() -> None:
    assert combine(fault(PF, 2), fault(PF, 3)) == Event(DF, EventType.HARDWARE_EXCEPTION, 0)


@pytest.mark.parametrize("second", [GP, PF, UD])
def test_a_third_is_a_triple_fault(second: int) -> None:
    with pytest.raises(TripleFault):
        combine(fault(DF), fault(second))


@pytest.mark.parametrize("type", [EventType.EXTERNAL, EventType.SOFTWARE_INTERRUPT, EventType.NMI])
def test_what_is_no_exception_gives_way(type: EventType) -> None:
    assert combine(Event(0x30, type), fault(PF, 2)) == fault(PF, 2)


def test_alone() -> None:
    assert combine(None, fault(UD)) == Event(UD, EventType.HARDWARE_EXCEPTION)
