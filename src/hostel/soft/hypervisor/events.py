"""What to do when one event meets another: SDM vol. 3A §6.15 (table 6-5), and its like for a hypervisor.

A VM exit may come while the processor delivers an event (IDT-vectoring information, SDM vol. 3C §24.9.3). If
the hypervisor's answer is an exception, the two are one: that second exception, #DF, or a triple fault.
"""

from __future__ import annotations

from hostel.soft.silicon import Event, EventType

DE, DB, BP, UD, DF, TS, NP, SS, GP, PF, AC = 0, 1, 3, 6, 8, 10, 11, 12, 13, 14, 17
_CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP})
_WITH_ERROR = frozenset({DF, TS, NP, SS, GP, PF, AC})


class TripleFault(Exception):
    """A fault while #DF is delivered: the processor shuts down."""


def fault(vector: int, error: int = 0) -> Event:
    """A hardware exception, with its error code if it has one."""
    code = error if vector in _WITH_ERROR else None
    return Event(vector, EventType.HARDWARE_EXCEPTION, code)


def combine(first: Event | None, second: Event) -> Event:
    """``second`` came of delivering ``first``."""
    if first is None or first.type != EventType.HARDWARE_EXCEPTION:
        return second  # an interrupt or INT n that faults is the fault; it comes again after it
    if first.vector == DF:
        raise TripleFault
    if first.vector == PF:
        double = second.vector == PF or second.vector in _CONTRIBUTORY
    else:
        double = first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY
    return fault(DF) if double else second
