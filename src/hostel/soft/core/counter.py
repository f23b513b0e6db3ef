"""The counter: each translated block, as it begins, takes its instructions off a budget, in host code.

Unicorn's own way is a hook that it calls as each block begins, and a question after each access to memory
whether somebody wants it to stop. What it translates is::

    mov  qword ptr [rbp + 0x80], pc     # from here to ``call hook``: 33 bytes at least
    ... four arguments ...
    call hook
    mov  rdi, uc; xor esi, esi; call check_exit_request
    ... the block's instructions, and the same question after each access ...

When a block runs for the first time, the hook asks Python (a block may have to be made anew), and then
writes the count into the block itself. What begins it from then on::

            mov  eax, note              # which lies below 4 GiB
            lea  rdx, [rip + ...]       # the block: what unicorn notes about it, before its code
            sub  qword ptr [rax], count
            js   stop
            cmp  dword ptr [rax + 8], 0 # kicked?
            jne  stop
            mov  [rax + 16], rdx
            jmp  begin                  # the block's first instruction
    stop:   call hook                   # as it was, and the question behind it: so the engine stops here

The questions after accesses are filled with NOPs: we stop nowhere but at the beginning of a block. (The
answer would be yes after a store to where no memory is. One core grants no such page; the other is told
of the error when its blocks end.)

A block that does not look like that is left as it is: counted all the same, by the hook, a thousand times
as slowly.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Sequence
from struct import Struct, pack
from typing import Any, ClassVar

from . import build

STOPPED = 1
"""Why the counter stopped: no instructions left, or kicked. Other numbers are those of ``meet``."""

_QUESTION = re.compile(
    rb"(?P<uc>\xbf.{4}|\x48\x8d\x3d.{4}|\x48\xbf.{8})\x33\xf6(?P<call>\xe8.{4}|\xff\x15.{4})",
    re.DOTALL,
)
"""``mov`` or ``lea`` of the handle to RDI; ``xor esi, esi``; ``call``, or ``call [rip + ...]``."""
_NOPS = (
    b"",
    *map(bytes.fromhex, ("90", "6690", "0f1f00", "0f1f4000", "0f1f440000", "660f1f440000")),
    *map(bytes.fromhex, ("0f1f8000000000", "0f1f840000000000", "660f1f840000000000")),
)
"""Of each length up to 9 (SDM vol. 2B, NOP)."""
_CALL, _MOV_EAX = 0xE8, 0xB8
_CODE = Struct("<QQ")
_CALLED = ctypes.CFUNCTYPE(None, ctypes.c_uint64)
# mov rdi, [rsp]; jmp [rip]: the return address names the block
_HOOK = bytes.fromhex("488b3c24 ff2500000000")
NO_DATA = 0xDA7A_DA7A_DA7A_DA7A
"""The hook's fourth argument, not used. It takes ten bytes to load, which is room."""


class Note(ctypes.Structure):
    """What the blocks and Python share. The offsets of the first four are in the code."""

    budget: int
    """Instructions left."""
    kick: int
    stopped: int
    block: int
    """The one that began last, or 0."""
    _fields_: ClassVar[Sequence[tuple[str, type[Any]]]] = (
        ("budget", ctypes.c_int64),
        ("kick", ctypes.c_uint32),
        ("stopped", ctypes.c_uint32),
        ("block", ctypes.c_uint64),
    )


class Block:
    """A translated block: what unicorn notes about it, read where it lies."""

    __slots__ = ("address", "code", "code_size", "count", "flags", "length", "pc", "size")

    def __init__(self, address: int) -> None:
        self.address = address
        (self.pc, self.flags, self.size, self.count, cflags, self.code, self.code_size) = (
            build.BLOCK.unpack(ctypes.string_at(address, build.BLOCK.size))
        )
        self.length: int = cflags & build.TB_COUNT_MASK
        """The length that it was cut to, or 0."""


class Counter:
    """Of one unicorn instance. ``meet`` is shown each block as it first runs; what it returns, other than 0,
    stops the engine before the block."""

    def __init__(self, handle: int, note: Note, meet: Callable[[Block], int]) -> None:
        lib = build.library()
        self._handle, self._note, self._meet = handle, note, meet
        self._stop = lib.uc_emu_stop
        self._check = build.address(lib.helper_check_exit_request_x86_64)
        self._error: BaseException | None = None
        called = _CALLED(self._on_call)
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page[: len(_HOOK) + 8] = _HOOK + pack("<Q", build.address(called))
        self._keep = called, page
        self.hook = ctypes.addressof(ctypes.c_char.from_buffer(page))
        self._begin = pack("<BI", _MOV_EAX, ctypes.addressof(note))

    def _on_call(self, called_from: int) -> None:
        """A block begins that does not count by itself, or must not go on. Nothing may be raised."""
        note = self._note
        try:
            block = Block(_block_before(called_from))
            if ctypes.string_at(block.code, len(self._begin)) != self._begin:
                reason = self._meet(block)
                if reason:
                    self._stop_for(reason)
                    return
                self._write(block, called_from - block.code)
                note.budget -= block.count
            note.block = block.address
            if note.budget < 0 or note.kick:
                note.budget += block.count
                self._stop_for(STOPPED)
        except BaseException as error:
            self._error = error
            self._stop_for(STOPPED)

    def _stop_for(self, reason: int) -> None:
        self._note.block, self._note.stopped = 0, reason
        self._stop(self._handle)

    def check(self) -> None:
        """Raise what could not be raised inside the hook."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # --- What is written into blocks ---

    def _write(self, block: Block, called_from: int) -> None:
        """From now on this block counts by itself."""
        code = ctypes.string_at(block.code, block.code_size)
        first, *others = self._questions(block.code, code) or [range(0)]
        call = called_from - (5 if code[called_from - 5] == _CALL else 6)
        begin = self._beginning(block, call, first.stop)
        if first.start != called_from or len(begin) > call:
            return
        ctypes.memmove(block.code, begin, len(begin))
        for site in others:
            ctypes.memmove(block.code + site.start, _NOPS[9] + _NOPS[len(site) - 9], len(site))

    def _beginning(self, block: Block, call: int, body: int) -> bytes:
        """``call`` and ``body``: where the hook is called, and where the block's own code begins."""
        count = block.count
        code = self._begin + pack("<3si", b"\x48\x8d\x15", block.address - block.code - 12)
        short = count < 0x80
        code += (
            pack("<3sb", b"\x48\x83\x28", count) if short else pack("<3si", b"\x48\x81\x28", count)
        )
        at = len(code)
        code += pack("<Bb", 0x78, call - at - 2)  # js
        code += pack("<4sBb", b"\x83\x78\x08\x00", 0x75, call - at - 8)  # cmp; jne
        return code + pack("<4sBb", b"\x48\x89\x50\x10", 0xEB, body - at - 14)  # mov; jmp

    def _questions(self, base: int, code: bytes) -> list[range]:
        """Where ``check_exit_request(handle, 0)`` is called."""
        return [
            range(*found.span())
            for found in _QUESTION.finditer(code)
            if self._handle == _loaded(base, found) and self._check == _called(base, code, found)
        ]


def _loaded(base: int, found: re.Match[bytes]) -> int:
    load = found["uc"]
    if load.startswith(b"\x48\x8d"):
        return base + found.end("uc") + int.from_bytes(load[3:], "little", signed=True)
    return int.from_bytes(load[-8:] if load[0] == 0x48 else load[-4:], "little")


def _called(base: int, code: bytes, found: re.Match[bytes]) -> int:
    call = found["call"]
    at = found.end() + int.from_bytes(call[-4:], "little", signed=True)
    if call[0] == _CALL:
        return base + at
    return int.from_bytes(code[at : at + 8], "little") if at > 0 else 0


def _block_before(called_from: int) -> int:
    """What unicorn notes about a block stands before its code; both are aligned to 64 bytes at least."""
    at = called_from & ~63
    for address in range(at - 64, at - 64 * 64, -64):
        code, size = _CODE.unpack(ctypes.string_at(address + build.TB_CODE, 16))
        if 0 <= code - address <= 256 and code < called_from <= code + size:
            return address
    raise build.unknown("a block has no note before it")
