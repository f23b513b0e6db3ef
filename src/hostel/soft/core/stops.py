"""Why the engine stopped, other than at a block's beginning, and what that means to the guest.

An INT3 of ours, an exception, a translation that was refused, something that should not have run at all. What
was counted for the block and did not happen is taken back, so that time stays exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.errors import HostError
from hostel.soft.exceptions import BP, DB, GP, OF, PF, SS, UD, WITH_ERROR_CODE
from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access, EptFault, Event, EventType, PageFault, Reason, VmExit
from hostel.soft.state import RSP, canonical

from .astray import entered, last_branch, made_canonical
from .counter import Block
from .engine import EXCEPTION, ILLEGAL
from .env import EIP, IS_INT
from .events import STEP, Fault
from .flags import HF_CS64
from .translations import NotCanonical, Refusal
from .view import INT3

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from .translate import TranslatingCore

_FINAL = 1 << 8
"""Of an EPT violation's qualification: the access itself, not the walk to it (table 27-7)."""


class Stops:
    def __init__(self, core: TranslatingCore) -> None:
        self._core = core
        self._left: dict[tuple[int, int], int] = {}
        """Of a block, at an address: how many instructions."""

    def forget_blocks(self) -> None:
        self._left.clear()

    def act(self, error: int, spent: int) -> VmExit | None:
        """The engine stopped inside a block, or at one that it could not fetch."""
        core, env = self._core, self._core.engine.env
        if core.translations.refused is not None:
            fault, access = core.translations.refused
            core.count(spent if access is Access.FETCH else spent - self._unfinished())
            return self._after_refusal(fault, access)
        vector = UD if error == ILLEGAL else core.engine.exception
        if error not in (0, EXCEPTION, ILLEGAL):
            raise HostError(
                f"the core stopped for no reason of the guest's (unicorn error {error})"
            )
        if not error or not 0 <= vector < 32:
            # It stopped by itself at what should have been replaced, so it is no instruction here.
            core.count(spent)
            raise Fault(UD)
        if vector == BP and env.u32[IS_INT // 4]:
            return self._after_int3(spent)
        if vector == OF and env.u32[IS_INT // 4]:
            core.count(spent)
            return self._trap(OF)
        if vector == DB:
            core.count(spent)
            if env.hflags & HF_CS64 and not entered(env.rip):
                self._take_back()
                raise Fault(GP, 0)
            return core.raise_fault(Fault(DB, dr6=STEP | core.hits))
        core.count(spent - self._unfinished())
        raise Fault(vector, env.error_code & 0xFFFF if vector in WITH_ERROR_CODE else None)

    def _after_int3(self, spent: int) -> VmExit | None:
        core, env = self._core, self._core.engine.env
        at = env.linear_rip - 1 & (2**64 - 1 if env.hflags & HF_CS64 else 0xFFFF_FFFF)
        if core.view.code(at, 1) == INT3:
            core.count(spent)
            return self._trap(BP)
        core.count(spent - 1)
        env.u64[EIP // 8] = env.rip - 1 & (2**64 - 1 if env.bits == 64 else 0xFFFF_FFFF)
        return core.act(core.instruction())

    def _trap(self, vector: int) -> VmExit | None:
        """INT3 or INTO, which has been executed; the event belongs to the instruction."""
        core = self._core
        core.sync()
        core.state.rip -= 1
        event = Event(vector, EventType.SOFTWARE_EXCEPTION, None, 1)
        return core.going_on(core.delivery.software(event))

    def _after_refusal(self, fault: Refusal, access: Access) -> VmExit | None:
        core = self._core
        env, exact = core.engine.env, core.translations.linear(core.engine.fault_address)
        if access is Access.FETCH and exact // PAGE != env.linear_rip // PAGE:
            # The translator looks ahead; the instruction at hand may not reach that page at all.
            instruction = core.instruction()
            if not self._crosses(instruction):
                return core.one()
        if isinstance(fault, NotCanonical):
            if access is Access.FETCH and not canonical(env.rip):
                self._take_back()
                raise Fault(GP, 0)
            raise Fault(SS if self._on_stack(exact) else GP, 0)
        if isinstance(fault, PageFault):
            raise Fault(PF, fault.code, cr2=exact)
        physical = fault.physical
        if fault.qualification & _FINAL or fault.reason != Reason.EPT_VIOLATION:
            physical = physical & ~(PAGE - 1) | exact % PAGE
        raise EptFault(fault.reason, fault.qualification, exact, physical)

    def _take_back(self) -> None:
        """RIP is no address: who has set it so never ran."""
        core, env = self._core, self._core.engine.env
        if core.before:
            env.bytes[: len(core.before)] = core.before
            env.note_segments()
            return
        block = Block(core.engine.context.block) if core.engine.context.block else None
        branch = last_branch(core.view.code(block.pc, block.size)) if block else None
        if block and branch:
            env.set_rip(block.pc + branch.offset)
            env.u64[RSP] = env.u64[RSP] - branch.stack & 2**64 - 1
        elif not entered(env.rip):
            env.set_rip(made_canonical(env.rip))

    def _on_stack(self, address: int) -> bool:
        """An access by SS, said or implied, is #SS where others are #GP (SDM vol. 3A §6.15)."""
        from iced_x86 import Register

        core = self._core
        instruction, rsp = core.instruction(), core.engine.env.u64[RSP]
        pushed = instruction.is_stack_instruction and -64 <= address - rsp < 64
        return bool(pushed or instruction.memory_segment == Register.SS)

    def _crosses(self, instruction: Instruction) -> bool:
        return self._core.engine.env.linear_rip % PAGE + instruction.len > PAGE

    def _unfinished(self) -> int:
        """How many instructions of the current block were counted and have not been executed."""
        core = self._core
        address, env = core.engine.context.block, core.engine.env
        if not address:
            return 0
        key = address, env.rip
        left = self._left.get(key)
        if left is None:
            block = Block(address)
            length = core.translations.linear(env.linear_rip - block.pc & 2**64 - 1)
            code = core.view.code(block.pc, length) if 0 <= length < PAGE else b""
            done = core.scanner.position(code, env.bits) if block.count > 1 else 0
            left = self._left[key] = max(block.count - done, 0)
        return left
