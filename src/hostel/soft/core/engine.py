"""One unicorn instance as an engine for translated blocks: run, count, stop exactly, have blocks scanned.

::

    block of host code ── first met: Python scans it, and writes the count into it (``counter.py``)
                      └── known ──> budget -= n ──> the block's instructions
                                        └─ none left, or kicked ──> Python: uc_emu_stop

A stop is always asked for inside a hook, at a block's first instruction: unicorn's stop from outside
re-executes an instruction that was half done.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable

from hostel.errors import HostError, MachineStopped
from hostel.soft.physical import Span

from . import build
from .counter import NO_DATA, Block, Counter, Note
from .env import FEATURES, OLD_EXCEPTION, Env
from .tlb import Tlb

FOREVER = 1 << 62
TO_SCAN, FULL = 2, 3
"""Why the counter stopped, besides ``STOPPED``: a block to scan; no room for more blocks."""
_BUFFER, _FULL = 64 << 20, 48 << 20
"""Of translated code. Unicorn would start anew by itself when it is full, unseen by the split view."""

_HOOK_BLOCK, _HOOK_TLB_FILL = 8, 131072
_USE_EXITS, _REQUEST, _REMOVE, _FLUSH_BLOCKS, _TLB_TYPE, _BUFFER_SIZE = (
    4,
    8,
    9,
    10,
    12,
    13,
)
_TLB_VIRTUAL = 1
_EPYC_ROME = 37
_REG_FPCW, _REG_FPTAG, _REG_MXCSR = 246, 247, 249
_ALL = 7
_RDRAND, _RDSEED = 1 << 30, 1 << 18
EXCEPTION, ILLEGAL = 21, 10
"""What ``uc_emu_start`` returns: UC_ERR_EXCEPTION, UC_ERR_INSN_INVALID (which is #UD)."""


class _Entry(ctypes.Structure):
    paddr: int
    perms: int
    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_int))


_FILL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int,
    ctypes.POINTER(_Entry), ctypes.c_void_p,
)  # fmt: skip


class Engine:
    """``fill`` answers a TLB miss with (frame, rights) or None; ``meet`` is shown each block as it first
    runs and says whether to stop before it."""

    def __init__(
        self,
        fill: Callable[[int, int], tuple[int, int] | None],
        meet: Callable[[Block], bool],
    ) -> None:
        self._lib = build.library()
        self.handle = build.open_handle(_EPYC_ROME)
        self._fill, self._meet = fill, meet
        self.error: BaseException | None = None
        """A fault of ours inside a hook, where it cannot be raised."""
        build.control(self.handle, _BUFFER_SIZE, ctypes.c_uint32(_BUFFER))
        self.cpu = build.find_cpu(self.handle)
        self._spans: list[Span] = []
        self.env = Env(self.cpu)
        self.tlb = Tlb(self._lib, self.cpu)
        self._without_features()
        self._reset_fpu()
        build.control(self.handle, _USE_EXITS, ctypes.c_int(1))
        build.control(self.handle, _TLB_TYPE, ctypes.c_int(_TLB_VIRTUAL))
        self.context = Note.from_buffer(build.low_memory(4096))
        self._counter = Counter(self.handle, self.context, self._on_block)
        self._keep: list[object] = []
        self._hook(_HOOK_TLB_FILL, _FILL(self._on_fill), 0)
        self._hook(_HOOK_BLOCK, self._counter.hook, NO_DATA)
        self._start = self._lib.uc_emu_start
        self._exception = ctypes.c_int32.from_address(self.cpu + build.CPU_EXCEPTION)
        self._next_flags = ctypes.c_int32.from_address(self.cpu + build.CPU_NEXT_FLAGS)
        self._invalid = ctypes.c_uint64.from_address(self.handle + build.UC_INVALID_ADDRESS)
        self._first = 0

    def _without_features(self) -> None:
        """Chance is not deterministic: no RDRAND, no RDSEED."""
        words = self.env.u64  # by leaf: 1 EDX, 1 ECX, 7 EBX …
        words[FEATURES // 8 + 1] &= ~_RDRAND
        words[FEATURES // 8 + 2] &= ~_RDSEED

    def _reset_fpu(self) -> None:
        """As after a reset (SDM vol. 3A table 9-1); unicorn leaves MXCSR and the control word at 0."""
        for register, value in ((_REG_FPCW, 0x37F), (_REG_FPTAG, 0xFFFF), (_REG_MXCSR, 0x1F80)):
            word = ctypes.c_uint32(value)
            write, handle = self._lib.uc_reg_write, ctypes.c_void_p(self.handle)
            build.check(write(handle, register, ctypes.byref(word)), "a register of the FPU")

    def _hook(self, kind: int, function: object, data: int) -> None:
        """Everywhere: a range that begins after its end."""
        handle, begin, end = ctypes.c_size_t(), ctypes.c_uint64(1), ctypes.c_uint64(0)
        if isinstance(function, int):
            function = ctypes.c_void_p(function)
        self._keep.append(function)
        add, data_pointer = self._lib.uc_hook_add, ctypes.c_void_p(data)
        build.check(
            add(ctypes.c_void_p(self.handle), ctypes.byref(handle), kind, function,
                data_pointer, begin, end),
            "a hook",
        )  # fmt: skip

    # --- Hooks: nothing may be raised out of them ---

    def _on_fill(self, _uc: int, page: int, kind: int, entry: object, _data: int) -> int:
        try:
            self.tlb.missed()
            answer = self._fill(page, kind - 16)
            if answer is None:
                return 0
            slot = entry[0]  # type: ignore[index]
            slot.paddr, slot.perms = answer
            return 1
        except BaseException as error:
            self.error = error
            return 0

    def _on_block(self, block: Block) -> int:
        self._first = self._first or block.address
        if block.address - self._first > _FULL:
            return FULL
        return TO_SCAN if self._meet(block) else 0

    # --- Run ---

    def run(self, budget: int, *, cut: bool = False) -> int:
        """From the loaded state, at most ``budget`` instructions; returns unicorn's error code.

        A block that is longer than what is left does not begin, unless it is ``cut`` to that length.
        A block cut to one instruction is not scanned: that is how a sensitive one is run as it stands.
        """
        if not self.handle:
            raise MachineStopped("this core is closed")
        context, env = self.context, self.env
        context.budget, context.stopped, context.block = budget, 0, 0
        env.i32[OLD_EXCEPTION // 4] = -1
        if cut:
            self._next_flags.value = min(budget, build.TB_COUNT_MASK)
        error: int = self._start(self.handle, env.rip, 0, 0, 0)
        self._counter.check()
        if self.error is not None:
            raised, self.error = self.error, None
            raise raised
        return error

    @property
    def exception(self) -> int:
        return self._exception.value

    @property
    def fault_address(self) -> int:
        """The exact address of the access that ``fill`` refused."""
        return self._invalid.value

    def flush(self, address: int | None = None) -> None:
        if not self.handle:
            return
        if address is None:
            self.tlb.flush()
        else:
            self.tlb.flush_page(address)

    def retranslate(self, block: Block) -> int:
        """Forget the block and translate it from what is in memory now. Returns its address."""
        pc = ctypes.c_uint64(block.pc)
        build.control(self.handle, _REMOVE, pc, ctypes.c_uint64(block.pc + 1))
        room = (ctypes.c_uint64 * 2)()
        self._next_flags.value = block.length or -1
        build.control(self.handle, _REQUEST, pc, ctypes.byref(room), reads=True)
        self._next_flags.value = -1
        return _u64(self.cpu + build.CPU_BLOCKS + 8 * _hash(block.pc))

    def forget_blocks(self) -> None:
        build.control(self.handle, _FLUSH_BLOCKS)
        self._first = 0

    def drop_blocks(self, hpa: int, size: int) -> None:
        """Those translated from these bytes, which have changed."""
        for span in self._spans:
            if span.hpa <= hpa < span.hpa + span.size:
                start = self._lib.qemu_ram_addr_from_host_x86_64(
                    self.handle, span.hva + hpa - span.hpa
                )
                self._lib.tb_invalidate_phys_range_x86_64(self.handle, start, start + size)
                return

    def map(self, span: Span) -> None:
        self._spans.append(span)
        build.check(
            self._lib.uc_mem_map_ptr(self.handle, span.hpa, span.size, _ALL, span.hva),
            f"memory at {span.hpa:#x}",
        )

    def close(self) -> None:
        if self.handle:
            with contextlib.suppress(HostError):
                build.check(self._lib.uc_close(ctypes.c_void_p(self.handle)), "to close")
            self.handle = 0


def _hash(pc: int) -> int:
    """A block's place in the CPU's table of blocks by address."""
    mixed = pc ^ pc >> 6
    return mixed >> 6 & 0xFC0 | mixed & 0x3F


def _u64(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
