"""Which instructions are sensitive, and where they stand in a block: read with iced-x86, and remembered.

*Sensitive* (Popek and Goldberg's word) is what shows or changes the state of the processor that a hypervisor
keeps for itself, in any ring. A block is scanned from its first instruction as it was met, so that data
between code, or code read from its middle, is never taken for an instruction.

In ring 3, loads of segment registers are sensitive too: they read the GDT with a supervisor's rights, which
an ``Mmu`` has to be told. In 16- and 32-bit protected mode they are in every ring, for behind them other
accesses may have to be checked; and so are those (``segments.py``). An instruction that iced-x86 does not
know, or that has a LOCK prefix where none may be, is #UD: the translator under us is not always that strict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .flags import HF_PE
from .segments import Reach

if TYPE_CHECKING:
    from iced_x86 import Instruction

LONGEST = 15
"""Bytes of an instruction (SDM vol. 2A §2.3.11)."""
_REMEMBERED = 1 << 16

_NAMES = (
    *("CPUID", "HLT", "PAUSE", "MONITOR", "MWAIT", "RDTSC", "RDTSCP", "RDPMC", "RDMSR", "WRMSR"),
    *("IN", "OUT", "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD", "XSETBV"),
    *("CLTS", "LMSW", "SMSW", "INVLPG", "INVD", "WBINVD"),
    *("LGDT", "LIDT", "SGDT", "SIDT", "LLDT", "LTR", "SLDT", "STR"),
    *("STI", "POPF", "POPFD", "POPFQ", "IRET", "IRETD", "IRETQ", "INT", "INT1"),
    *("SYSCALL", "SYSRET", "SYSRETQ", "SYSENTER", "SYSEXIT", "SYSEXITQ", "SWAPGS"),
    *("VMCALL", "VMCLEAR", "VMLAUNCH", "VMPTRLD", "VMPTRST", "VMREAD", "VMRESUME", "VMWRITE"),
    *("VMXOFF", "VMXON", "INVEPT", "INVVPID", "VMFUNC", "INVALID"),
)
_SEGMENT_LOADS = ("LDS", "LES", "LFS", "LGS", "LSS", "LAR", "LSL", "VERR", "VERW", "RETF")
_CONTROL_MOVES = (
    *("MOV_R32_CR", "MOV_R64_CR", "MOV_CR_R32", "MOV_CR_R64"),
    *("MOV_R32_DR", "MOV_R64_DR", "MOV_DR_R32", "MOV_DR_R64"),
)
_FAR = (
    *("JMP_PTR1616", "JMP_PTR1632", "JMP_M1616", "JMP_M1632", "JMP_M1664"),
    *("CALL_PTR1616", "CALL_PTR1632", "CALL_M1616", "CALL_M1632", "CALL_M1664"),
    *("RETFQ", "RETFQ_IMM16"),
)
_SEGMENT_MOVES = (
    *("MOV_SREG_RM16", "MOV_SREG_R32M16", "MOV_SREG_R64M16"),
    *("POPW_DS", "POPD_DS", "POPW_ES", "POPD_ES", "POPW_SS", "POPD_SS"),
    *("POPW_FS", "POPD_FS", "POPQ_FS", "POPW_GS", "POPD_GS", "POPQ_GS"),
)


class Scanner:
    def __init__(self) -> None:
        import iced_x86 as iced

        self._decoder = iced.Decoder
        self._mnemonics = frozenset(getattr(iced.Mnemonic, name) for name in _NAMES)
        self._codes = frozenset(getattr(iced.Code, name) for name in _CONTROL_MOVES + _FAR)
        self._ring3 = frozenset(getattr(iced.Code, name) for name in _SEGMENT_MOVES)
        self._ring3_mnemonics = frozenset(getattr(iced.Mnemonic, name) for name in _SEGMENT_LOADS)
        self.reach = Reach()
        self._blocks: dict[tuple[bytes, int, bool, int], int | None] = {}
        self._instructions: dict[tuple[bytes, int], Instruction] = {}

    def sensitive(self, instruction: Instruction, ring3: bool, segmented: int = 0) -> bool:
        """``segmented``: as ``env.segmented`` has it."""
        if instruction.mnemonic in self._mnemonics or instruction.code in self._codes:
            return True
        if (ring3 or segmented & HF_PE) and (
            instruction.code in self._ring3 or instruction.mnemonic in self._ring3_mnemonics
        ):
            return True
        return bool(segmented) and self.reach.through_tight(instruction, segmented)

    def first_sensitive(
        self, code: bytes, bits: int, ring3: bool, segmented: int = 0
    ) -> int | None:
        """The offset of the first sensitive instruction of a block."""
        key = code, bits, ring3, segmented
        try:
            return self._blocks[key]
        except KeyError:
            pass
        if len(self._blocks) > _REMEMBERED:
            self._blocks.clear()
        found = self._blocks[key] = self._search(code, bits, ring3, segmented)
        return found

    def _search(self, code: bytes, bits: int, ring3: bool, segmented: int) -> int | None:
        at = 0
        for instruction in self._decoder(bits, code):
            if self.sensitive(instruction, ring3, segmented):
                return at
            at += instruction.len
        return None

    def decode(self, code: bytes, bits: int) -> Instruction:
        """The instruction that begins with ``code``; its mnemonic is INVALID if there is none."""
        key = code, bits
        try:
            return self._instructions[key]
        except KeyError:
            pass
        if len(self._instructions) > _REMEMBERED:
            self._instructions.clear()
        found = self._instructions[key] = self._decoder(bits, code).decode()
        return found

    def position(self, code: bytes, bits: int) -> int:
        """How many instructions there are in ``code``."""
        return sum(1 for _ in self._decoder(bits, code))
