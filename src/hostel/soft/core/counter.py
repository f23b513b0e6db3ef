"""The counter: host code (x86-64) that unicorn calls as each block begins, and what it shares with Python.

``rdi`` is unicorn's handle, ``rsi`` the block's address, ``rcx`` the ``Note``; the return address names the
block. Source, in Intel's syntax::

            mov  r8, [rsp]
    again:  mov  rax, r8                # the table: 0x4000 pairs of a return address and a count
            shr  rax, 4
            and  eax, 0x3fff
            shl  rax, 4
            add  rax, [rcx + 40]
            cmp  [rax], r8
            jne  miss
            mov  r9, [rax + 8]
            cmp  dword ptr [rcx + 8], 0
            jne  stop
            sub  [rcx], r9
            js   over
            mov  [rcx + 16], rsi
            mov  [rcx + 24], r8
            mov  [rcx + 32], r9
            ret
    over:   add  [rcx], r9
    stop:   mov  dword ptr [rcx + 12], 1
            jmp  [rcx + 56]             # uc_emu_stop(handle)
    miss:   push rdi; push rsi; push rdx; push rcx; push r8
            mov  rax, [rcx + 48]
            mov  rcx, r8
            call rax                    # miss(handle, address, size, return address)
            pop  r8; pop rcx; pop rdx; pop rsi; pop rdi
            cmp  dword ptr [rcx + 12], 0
            je   again
            ret
"""

from __future__ import annotations

import ctypes

CODE = bytes.fromhex(
    "4c8b04244c89c048c1e80425ff3f000048c1e004480341284c390075294c8b48"
    "088379080075154c2909780d488971104c8941184c894920c34c0109c7410c01"
    "000000ff6138575652514150488b41304c89c1ffd04158595a5e5f83790c0074a3c3"
)
ENTRIES = 0x4000


class Note(ctypes.Structure):
    budget: int
    """Instructions left."""
    kick: int
    stopped: int
    pc: int
    """Of the block that began last: its address, what names it, its length."""
    block: int
    count: int
    _fields_ = (
        ("budget", ctypes.c_int64),
        ("kick", ctypes.c_uint32),
        ("stopped", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("block", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("table", ctypes.c_uint64),
        ("miss", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
    )
