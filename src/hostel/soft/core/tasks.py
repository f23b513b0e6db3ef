"""Task switches, as far as a processor in non-root mode goes: who may, and to where (SDM vol. 3C §25.4.2).

Gate and TSS descriptor are checked here, and what is wrong with them is the guest's fault. What is left is
a VM exit: the hypervisor switches (``hypervisor/task_switch.py``).
"""

from __future__ import annotations

from hostel.soft.exceptions import GP, NP, TS
from hostel.soft.state import CpuState

from .events import Fault, Memory, descriptor

BY_CALL, BY_IRET, BY_JMP, BY_IDT = range(4)
"""Of the exit's qualification, bits 31:30 (table 27-2)."""
_GATE, _BUSY, _WIDE = 5, 2, 8
_LEAST = {0: 0x2B, _WIDE: 0x67}
"""The limits that a TSS of 16, of 32 bits has at least."""
TASKS = (1, 3, _GATE, 9, 11)
"""System descriptors that a far transfer answers with a task switch: TSSs, available and busy, and gates."""


def by_far_transfer(state: CpuState, memory: Memory, selector: int, raw: int) -> int:
    """Far JMP or CALL to this descriptor, a TSS or a gate: the selector of the TSS (vol. 2A, CALL)."""
    rights = raw >> 40 & 0xFF
    if rights >> 5 & 3 < max(state.cpl, selector & 3):
        raise Fault(GP, selector & ~3)
    if rights & 0xF != _GATE:
        _check(selector, raw, GP, wanted=0, external=0)
        return selector
    if not rights & 0x80:
        raise Fault(NP, selector & ~3)
    return to_tss(state, memory, raw >> 16 & 0xFFFF, GP)


def to_tss(
    state: CpuState,
    memory: Memory,
    selector: int,
    wrong: int,
    *,
    busy: bool = False,
    external: int = 0,
) -> int:
    """Through a gate or a back link: the TSS has to be there, and available (or busy, for IRET)."""
    if selector & 4:
        raise Fault(wrong, selector & ~3 | external)
    raw = descriptor(state, memory, selector, wrong, external)
    _check(selector, raw, wrong, wanted=_BUSY if busy else 0, external=external)
    return selector


def _check(selector: int, raw: int, wrong: int, *, wanted: int, external: int) -> None:
    rights, error = raw >> 40 & 0xFF, selector & ~3 | external
    if selector & 4 or rights & 0x17 != 1 | wanted:
        raise Fault(wrong, error)
    if not rights & 0x80:
        raise Fault(NP, error)
    limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
    if raw >> 55 & 1:
        limit = limit << 12 | 0xFFF
    if limit < _LEAST[rights & _WIDE]:
        raise Fault(TS, error)
