"""A branch to an address that is not canonical faults itself; it never happened (SDM vol. 2, JMP, CALL, RET).

::

    ret ──> RIP 1234'0000'0000'0000 ── fetch: no address ──> back to the RET, its pop undone ── #GP(0)

Unicorn's processor looks at an address only when it fetches there: RIP and RSP have moved by then. That is
AMD's way, whose VMRUN takes any RIP; VM entry does not (SDM vol. 3C §26.3.1.4), so it may not stay so: the
#GP's own delivery can exit. What a block's last instruction has moved is known from its bytes. A far
transfer has loaded segments too: who can run it alone puts back all of it, else RIP is only made canonical.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.soft.state import LINEAR_BITS

_U64 = (1 << 64) - 1


class Branch(NamedTuple):
    """The last instruction of a block: a near one, taken always."""

    offset: int
    stack: int
    """What it adds to RSP."""


def last_branch(code: bytes) -> Branch | None:
    """Of a block of 64-bit code; None where it ends otherwise."""
    from iced_x86 import Decoder, FlowControl

    taken = FlowControl.RETURN, FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL
    last, at = None, 0
    for instruction in Decoder(64, code):
        last = instruction
        at += instruction.len
    if last is None or at != len(code) or last.flow_control not in taken:
        return None
    near = last.is_jmp_near_indirect or last.is_call_near_indirect or _is_near_return(last.code)
    return Branch(at - last.len, last.stack_pointer_increment) if near else None


def _is_near_return(code: int) -> bool:
    from iced_x86 import Code

    return code in (Code.RETNQ, Code.RETNQ_IMM16)


def entered(rip: int) -> bool:
    """VM entry takes it in 64-bit code: one that ran over the border of canonical addresses, too."""
    return rip >> LINEAR_BITS in (0, _U64 >> LINEAR_BITS)


def made_canonical(rip: int) -> int:
    """By its low bits."""
    low = rip & (1 << LINEAR_BITS) - 1
    return low | (_U64 << LINEAR_BITS & _U64 if low >> LINEAR_BITS - 1 else 0)
