"""Unicorn as an SVM processor: its library, its live state, and the few host instructions that we add.

::

    guest code ── JIT ──> cpu_vmexit ──> UC_HOOK_INTR ──> intr stub ──> uc_emu_stop ──> Python
                    │                         └─ an exception: x86_cpu_do_interrupt, to the guest's own IDT
                    └──> a block begins: instructions are counted down (``counter.py``)

A stub is host code (x86-64) because a hook that leaves by ``longjmp`` may not be Python, and because
it runs where Python would cost a thousand times as much. Their source stands in ``svm_stubs.py``.

All of this is unicorn's private ground, which is why one version is pinned and ``Processor`` compares
what it finds with symbols of the library before it trusts any offset.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, ClassVar

from hostel.errors import HostError
from hostel.soft.physical import Span

from . import build
from .counter import NO_DATA, Counter, Note
from .svm_stubs import CODE, ENTRY

_ARCH_X86, _MODE_64, _PROT_ALL = 4, 8, 7
_HOOK_INTR, _HOOK_INSN, _HOOK_BLOCK = 1, 2, 8
_INS_IN, _INS_OUT, _INS_SYSCALL, _INS_SYSENTER = 218, 500, 699, 700
_CTL_WRITE = 1 << 26 | 1 << 30
_CTL_USE_EXITS, _CTL_CPU_MODEL = 4 | _CTL_WRITE, 7 | _CTL_WRITE
_CTL_FLUSH_BLOCKS = 10 | 1 << 30
_MODEL_EPYC_ROME = 37

# Offsets, in unicorn's structure, in the processor's, in its registers'.
_UC_CPU = 0x1B8
_CPU_NEXT_FLAGS, _CPU_REQUEST, _CPU_ENV, _CPU_FILL, _CPU_EXEC_INTERRUPT = (
    0x18,
    0x1C,
    0x8A50,
    0xA758,
    0xA7A0,
)
_PATIENCE = 2048
"""TLB misses until the first flush that lets QEMU's TLB grow: eight times its size."""
_ENV_UC, _ENV_FEATURES = 0x1B58, 0x1600
_WITHOUT = ((1, 1 << 30 | 3 << 26), (2, 1 << 18))
"""Features that are taken away: RDRAND and RDSEED are not deterministic; XSAVE would run unasked."""
REQUEST_EVENT, REQUEST_WINDOW = 2, 0x100
"""``interrupt_request``: CPU_INTERRUPT_HARD, which our stub takes for itself, and CPU_INTERRUPT_VIRQ."""
COUNT_MASK = 0x7FFF
_PAGES = 1 << 40 - 12
"""Of all host-physical memory: a bit each, in memory that is there only where it is used."""


class Shared(Note):
    """What stubs, blocks and Python share. The offsets are in the stubs' source."""

    exit: int
    address: int
    access: int
    index: int
    fills: int
    events: int
    kind: int
    vector: int
    port: int
    size: int
    cr3: int
    """What it has to be, or all ones."""
    before: int
    """The block that ran when code was last fetched through a TLB miss."""
    _fields_: ClassVar[Sequence[tuple[str, type[Any]]]] = (
        ("exit", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("access", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("fills", ctypes.c_uint64),
        ("events", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("vector", ctypes.c_uint32),
        ("port", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("env", ctypes.c_uint64),
        ("cpu", ctypes.c_uint64),
        ("do_interrupt", ctypes.c_uint64),
        ("hardirq", ctypes.c_uint64),
        ("vmexit", ctypes.c_uint64),
        ("emu_stop", ctypes.c_uint64),
        ("tlb_fill", ctypes.c_uint64),
        ("exec_interrupt", ctypes.c_uint64),
        ("code_pages", ctypes.c_uint64),
        ("no_execute", ctypes.c_uint64),
        ("flush", ctypes.c_uint64),
        ("patience", ctypes.c_uint64),
        ("cr3", ctypes.c_uint64),
        ("before", ctypes.c_uint64),
    )


class Processor:
    """One unicorn instance with the stubs in place. ``shared`` and ``env`` are live."""

    def __init__(self) -> None:
        self._lib = _library()
        self._handle = ctypes.c_void_p()
        self._call("uc_open", _ARCH_X86, _MODE_64, ctypes.byref(self._handle))
        self._call("uc_ctl", self._handle, _CTL_CPU_MODEL, _MODEL_EPYC_ROME)
        self._call("uc_ctl", self._handle, _CTL_USE_EXITS, 1)
        self._page = build.low_memory(8192)
        self._page[: len(CODE)] = CODE
        self._base = address_of(self._page)
        self._code_pages = mmap.mmap(-1, _PAGES // 8)
        self.no_execute = mmap.mmap(-1, _PAGES // 8)
        """A bit for each page of host-physical memory that the guest may not execute."""
        self.shared = Shared.from_address(self._base + 4096)
        self._started = self._lib.uc_emu_start
        self._started.argtypes = (
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_size_t,
        )

    def prepare(self) -> None:
        """Once the first memory is mapped: find the live state, check it, put the stubs in."""
        handle = self._handle.value or 0
        self.cpu = _u64(handle + _UC_CPU).value
        self.env = self.cpu + _CPU_ENV
        lib, shared = self._lib, self.shared
        fill, execute = _u64(self.cpu + _CPU_FILL), _u64(self.cpu + _CPU_EXEC_INTERRUPT)
        found = _u64(self.env + _ENV_UC).value, fill.value, execute.value
        known = handle, _address(lib, "x86_cpu_tlb_fill"), _address(lib, "x86_cpu_exec_interrupt")
        if found != known:
            raise build.unknown("its functions are not where they should be")
        shared.env, shared.cpu = self.env, self.cpu
        shared.do_interrupt = _address(lib, "x86_cpu_do_interrupt")
        shared.hardirq = _address(lib, "do_interrupt_x86_hardirq")
        shared.vmexit = _address(lib, "cpu_vmexit")
        shared.emu_stop = ctypes.cast(lib.uc_emu_stop, ctypes.c_void_p).value or 0
        shared.code_pages, shared.no_execute = map(address_of, (self._code_pages, self.no_execute))
        shared.patience = _PATIENCE
        shared.flush = _address(lib, "tlb_flush")
        shared.tlb_fill, shared.exec_interrupt = fill.value, execute.value
        fill.value, execute.value = self._base + ENTRY["fill"], self._base + ENTRY["inject"]
        self.request = ctypes.c_uint32.from_address(self.cpu + _CPU_REQUEST)
        self._next_flags = ctypes.c_int32.from_address(self.cpu + _CPU_NEXT_FLAGS)
        for word, bits in _WITHOUT:
            _u64(self.env + _ENV_FEATURES + 8 * word).value &= ~bits
        self._flush = lib.tlb_flush_x86_64
        self._flush_page = lib.tlb_flush_page_x86_64
        self._flush.argtypes = (ctypes.c_void_p,)
        self._flush_page.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._ram_address = lib.qemu_ram_addr_from_host_x86_64
        self._ram_address.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._ram_address.restype = ctypes.c_uint64
        self._forget = lib.tb_invalidate_phys_range_x86_64
        self._forget.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
        self._hook(self._base + ENTRY["intr"], _HOOK_INTR)
        self._counter = Counter(handle, shared, lambda _block: 0)
        self._hook(self._counter.hook, _HOOK_BLOCK, NO_DATA)
        for entry, instruction in (
            ("io", _INS_IN),
            ("io", _INS_OUT),
            ("syscall", _INS_SYSCALL),
            ("sysenter", _INS_SYSENTER),
        ):
            self._hook(self._base + ENTRY[entry], _HOOK_INSN, 0, instruction)

    def _hook(self, stub: int, kind: int, data: int = 0, *extra: int) -> None:
        handle = ctypes.c_size_t()
        bounds = ctypes.c_uint64(1), ctypes.c_uint64(0)  # an empty range: everywhere
        more = [ctypes.c_int(value) for value in extra]
        self._call(
            "uc_hook_add",
            self._handle,
            ctypes.byref(handle),
            kind,
            ctypes.c_void_p(stub),
            ctypes.c_void_p(data),
            *bounds,
            *more,
        )

    def map(self, span: Span) -> None:
        self._call(
            "uc_mem_map_ptr",
            self._handle,
            ctypes.c_uint64(span.hpa),
            ctypes.c_size_t(span.size),
            _PROT_ALL,
            ctypes.c_void_p(span.hva),
        )

    def run(self, rip: int) -> None:
        """From RIP until ``shared`` says why not: ``exit``, or ``stopped``."""
        shared = self.shared
        shared.exit = shared.stopped = 0
        error = self._started(self._handle, rip, 0, 0, 0)
        self._counter.check()
        if error or shared.stopped > 1 or not (shared.exit or shared.stopped):
            raise HostError(
                f"the core stopped at {rip:#x} for no reason of the guest's (unicorn error {error})"
            )

    def limit(self, instructions: int) -> None:
        """The next block to run is cut to this many."""
        self._next_flags.value = min(instructions, COUNT_MASK)

    def flush(self, address: int | None = None) -> None:
        if address is None:
            self._flush(self.cpu)
        else:
            self._flush_page(self.cpu, address)

    def forget_code(self, hva: int, size: int) -> None:
        """Blocks translated from these bytes, which have changed."""
        start = self._ram_address(self._handle, hva)
        self._forget(self._handle, start, start + size)

    def forget_blocks(self) -> None:
        """All that is translated. Unicorn gives every large mapping the same ``ram_addr`` to start from, and
        knows blocks by that: two machines that have other code at one address would run each other's."""
        self._call("uc_ctl", self._handle, _CTL_FLUSH_BLOCKS)

    def close(self) -> None:
        if self._handle.value:
            self._call("uc_close", self._handle)
            self._handle.value = None

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._lib, name)(*arguments)
        if error:
            raise HostError(f"unicorn refuses {name} (error {error})")


def _library() -> ctypes.CDLL:
    """Functions of our own: those of ``build.library`` have the other core's argument types."""
    return ctypes.CDLL(build.library()._name)


def _address(lib: ctypes.CDLL, name: str) -> int:
    try:
        return ctypes.cast(getattr(lib, f"{name}_x86_64"), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _u64(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)
