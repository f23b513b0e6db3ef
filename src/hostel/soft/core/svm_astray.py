"""The core by intercept, when a guest has branched to what is no address: see ``astray.py``."""

from __future__ import annotations

from collections.abc import Callable

from hostel.soft.exceptions import GP, fault
from hostel.soft.silicon import Access, Controls, Event, Reason, VmExit
from hostel.soft.state import RSP, CpuState, canonical

from .astray import Branch, entered, last_branch, made_canonical
from .counter import Block
from .svm_host import Shared

Read = Callable[[CpuState, int, int], bytes]


def is_astray(state: CpuState, shared: Shared) -> bool:
    """In 64-bit code; not where it ran up to the last address, and the next exit came."""
    return not entered(state.rip) or (not canonical(state.rip) and _was_fetched(state, shared))


def _was_fetched(state: CpuState, shared: Shared) -> bool:
    return shared.access == Access.FETCH and shared.address == state.rip


def take_back(
    state: CpuState, controls: Controls, shared: Shared, read: Read
) -> tuple[VmExit | None, Event | None]:
    """#GP: the exit, or the event to inject."""
    _restore(state, shared, read)
    event = fault(GP)
    if controls.exception_bitmap >> GP & 1:
        return VmExit(Reason.EXCEPTION_NMI, interruption=event), None
    return None, event


def _restore(state: CpuState, shared: Shared, read: Read) -> None:
    """The branch never happened, if it can be told which; else RIP becomes an address."""
    if _was_fetched(state, shared) and shared.before:
        block = Block(shared.before)
        if branch := last_branch(read(state, block.pc, block.size)):
            _undo(state, block.pc, branch)
            return
    if not entered(state.rip):
        state.rip = made_canonical(state.rip)


def _undo(state: CpuState, start: int, branch: Branch) -> None:
    state.rip = start + branch.offset
    state.gpr[RSP] = state.gpr[RSP] - branch.stack & (1 << 64) - 1
