"""Exceptions of a processor: vectors, error codes, and what it makes of two at once.

An exception may come while another event is being delivered: to a core in the middle of it, or to a
hypervisor whose answer to a VM exit is an exception (IDT-vectoring information, SDM vol. 3C §24.9.3). For
both the two are one: the second exception, #DF, or a triple fault (SDM vol. 3A §6.15, table 6-5).
"""

from __future__ import annotations

from .silicon import Event, EventType

DE, DB, NMI, BP, OF, UD, DF = 0, 1, 2, 3, 4, 6, 8
TS, NP, SS, GP, PF, AC, MC = 10, 11, 12, 13, 14, 17, 18
WITH_ERROR_CODE = frozenset((DF, TS, NP, SS, GP, PF, AC))
"""SDM vol. 3A table 6-1."""
_CONTRIBUTORY = frozenset((DE, TS, NP, SS, GP))


class TripleFault(Exception):
    """A fault while #DF is delivered: the processor shuts down."""


def fault(vector: int, error: int = 0) -> Event:
    """A hardware exception, with its error code if it has one."""
    code = error if vector in WITH_ERROR_CODE else None
    return Event(vector, EventType.HARDWARE_EXCEPTION, code)


def combine(first: Event | None, second: Event) -> Event:
    """What ``second``, which came of delivering ``first``, is: itself, or a #DF."""
    if first is None or first.type != EventType.HARDWARE_EXCEPTION:
        return second  # an interrupt or INT n that faults is the fault; it comes again after it
    if first.vector == DF:
        raise TripleFault
    if first.vector == PF:
        double = second.vector == PF or second.vector in _CONTRIBUTORY
    else:
        double = first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY
    return fault(DF) if double else second
