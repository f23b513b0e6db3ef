"""The one build of unicorn that hostel knows: found, checked, and its private ground by name.

Unicorn's public interface cannot do what a core needs (hidden parts of segments, the vector and error code of
an exception, all modes in one instance), so we read and write the state of its CPU where it lies. That is
safe because one version is pinned and every instance is checked before it is used: the offsets below are
compared with what the public interface wrote, and with the addresses of the library's own functions.

Offsets: ``UC_`` into ``uc_struct``, ``CPU_`` into ``CPUState``, ``TB_`` into ``TranslationBlock``; those
into ``CPUX86State`` stand in ``env.py``.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import cache
from importlib import util
from pathlib import Path
from struct import Struct

from hostel.errors import HostError
from hostel.soft.extra import INSTALL, unicorn_version

UC_CPU, UC_INVALID_ADDRESS = 0x1B8, 0x588
CPU_NEXT_FLAGS, CPU_ENV_POINTER, CPU_BLOCKS, CPU_EXCEPTION, CPU_HANDLE, CPU_ENV = (
    0x18,
    0x128,
    0x138,
    0x81A0,
    0x81A8,
    0x8A50,
)
CPU_TLB, TLB_KINDS, TLB_ENTRY_BITS, TLB_ENTRIES = 0x8A10, 3, 6, 256
"""A mask and a table for each kind of access; the size of an entry, and how many there are at first."""
TB_CODE = 0x20
BLOCK = Struct("<Q8xIHHI4xQQ")
"""pc, flags, size, number of instructions, cflags, host code, its size."""
TB_COUNT_MASK = 0x7FFF
"""The bits of ``cflags`` that cut a block to so many instructions; 0: as many as fit."""

_ARCH_X86, _MODE_64 = 4, 8
_REG_RAX = 35
_MAP_32BIT = 0x40
_MAGIC = 0x5EED_0DD5_1234_8765


def check(error: int, what: str) -> None:
    if error:
        raise HostError(f"unicorn refuses {what} (error {error})")


@cache
def library() -> ctypes.CDLL:
    """The shared library of the pinned version. Its Python bindings are not imported: they are slow to."""
    if platform.machine() != "x86_64":
        raise HostError(
            "the software hypervisor runs on x86-64 hosts only", cost="no engine soft here"
        )
    unicorn_version()
    found = util.find_spec("unicorn")
    if found is None or not found.submodule_search_locations:
        raise unknown("it is no package")
    path = Path(found.submodule_search_locations[0]) / "lib" / "libunicorn.so.2"
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise unknown(str(error)) from error


def unknown(detail: str) -> HostError:
    return HostError(
        f"this build of unicorn is not the one that hostel knows ({detail})",
        cost="no engine soft",
        cure=INSTALL,
    )


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Types for what is called often; the library's private functions are looked up here, once."""
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    lib.uc_emu_start.argtypes = pointer, u64, u64, u64, ctypes.c_size_t
    lib.uc_emu_stop.argtypes = (pointer,)
    lib.uc_mem_map_ptr.argtypes = pointer, u64, ctypes.c_size_t, ctypes.c_uint32, pointer
    lib.tlb_flush_x86_64.argtypes = (pointer,)
    lib.qemu_ram_addr_from_host_x86_64.argtypes = pointer, pointer
    lib.qemu_ram_addr_from_host_x86_64.restype = u64
    lib.tb_invalidate_phys_range_x86_64.argtypes = pointer, u64, u64
    lib.tlb_flush_page_x86_64.argtypes = pointer, u64
    for name in ("tlb_flush", "tlb_flush_page", "tb_invalidate_phys_range"):
        getattr(lib, f"{name}_x86_64").restype = None
    return lib


def open_handle(model: int) -> int:
    """A new instance of this CPU model."""
    lib, handle = library(), ctypes.c_void_p()
    check(lib.uc_open(_ARCH_X86, _MODE_64, ctypes.byref(handle)), "a new instance")
    control(handle.value or 0, 7, ctypes.c_int(model))
    return handle.value or 0


def address(function: object) -> int:
    """Of a function of the library, or of one of ours that it calls."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def low_memory(size: int) -> mmap.mmap:
    """Code and data that translated code names in 32 bits."""
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
    rights = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    try:
        return mmap.mmap(-1, size, flags=kind, prot=rights)
    except OSError as error:
        raise HostError(
            f"no executable memory below 2 GiB: {error.strerror}", cost="no engine soft"
        ) from error


def control(handle: int, number: int, *arguments: object, reads: bool = False) -> None:
    """``uc_ctl``: its number, how many arguments, and in which direction, in one word."""
    word = number | len(arguments) << 26 | (3 if reads else 1) << 30
    check(
        library().uc_ctl(ctypes.c_void_p(handle), ctypes.c_int(word), *arguments),
        f"control {number}",
    )


def find_cpu(handle: int) -> int:
    """The address of the instance's ``CPUState``, once everything about it is as we know it."""
    lib = library()
    magic = ctypes.c_uint64(_MAGIC)
    check(lib.uc_reg_write(ctypes.c_void_p(handle), _REG_RAX, ctypes.byref(magic)), "RAX")
    with open(
        "/proc/self/mem", "rb", buffering=0
    ) as memory:  # an unmapped address is an error here

        def word(address: int) -> int:
            try:
                memory.seek(address)
                return int.from_bytes(memory.read(8), "little")
            except (OSError, OverflowError, ValueError):
                raise unknown(f"nothing at {address:#x}") from None

        cpu = word(handle + UC_CPU)
        known = {
            "state": (word(cpu + CPU_ENV_POINTER), cpu + CPU_ENV),
            "handle": (word(cpu + CPU_HANDLE), handle),
            "RAX": (word(cpu + CPU_ENV), _MAGIC),
            "TLB": (word(cpu + CPU_TLB), TLB_ENTRIES - 1 << TLB_ENTRY_BITS),
        }
    for what, (seen, expected) in known.items():
        if seen != expected:
            raise unknown(f"{what} is not where it should be")
    return cpu
