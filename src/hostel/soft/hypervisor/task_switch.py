"""A task switch: no processor makes one in non-root mode, so the hypervisor does (SDM vol. 3A §7.3).

::

    JMP, CALL, IRET, a gate of the IDT ──> exit 9 ──> old TSS ◄── registers
                                                      new TSS ──> registers, LDTR, segments, CR3; CR0.TS

The processor has checked gate and TSS (``core/tasks.py``). Until ``commit`` a page fault leaves no trace, and
the instruction comes again; what is wrong behind it (a segment of the new task) is a fault in the new task.
Tasks are of 32 bits: nobody has others any more.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

from hostel.hypervisor import Exit, InternalError
from hostel.soft import register_checks
from hostel.soft.core.events import Fault, segment_of
from hostel.soft.exceptions import DB, GP, NP, SS, TS, fault
from hostel.soft.paging.virtualizer import Registers
from hostel.soft.paging.walk import pointers
from hostel.soft.register_checks import Refused
from hostel.soft.silicon import Access, Event, EventType, PageFault, VmExit
from hostel.soft.state import (
    BLOCKED_BY_NMI,
    CR0_PG,
    CR0_TS,
    RFLAGS_NT,
    RFLAGS_ONE,
    RFLAGS_RESERVED,
    RFLAGS_VM,
    RIGHTS_UNUSABLE,
    RSP,
    CpuState,
    Segment,
)

from . import guest_memory

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

CALL, IRET, JMP, IDT = range(4)
_TSS = Struct("<HH 6I I II 8I 7I HH")
"""Link; stacks of rings 0 to 2; CR3; EIP, EFLAGS; general registers; selectors; T flag, I/O map (§7.2.1)."""
_SAVED, _SAVED_AT = Struct("<10I 6I"), 0x20
"""EIP, EFLAGS, general registers, the six selectors: what the old TSS gets."""
_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
_BUSY, _WIDE, _STEP_TRAP = 2, 8, 1 << 15
_SOFTWARE = (
    EventType.SOFTWARE_INTERRUPT,
    EventType.PRIVILEGED_SOFTWARE_EXCEPTION,
    EventType.SOFTWARE_EXCEPTION,
)
_CODE, _CONFORMING, _WRITABLE, _READABLE, _ACCESSED, _DATA_KIND, _PRESENT = (
    8,
    4,
    2,
    2,
    1,
    0x10,
    0x80,
)


def handle(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    event, vcpu.event = vcpu.event, None  # its delivery is this switch
    if not exit.qualification & 0xFFFC:
        words = (
            "the core by intercept has made half of a task switch: shadow paging cannot follow it"
        )
        return InternalError(exit.reason, (exit.qualification,), words)
    try:
        switch = _Switch(vcpu, exit, event)
        if not switch.wide:
            words = f"a task of 16 bits, selector {exit.qualification & 0xFFFF:#x}, is not emulated"
            return InternalError(exit.reason, (exit.qualification,), words)
        write_out = switch.prepare()
    except PageFault as error:
        vcpu.event = event
        vcpu.inject_page_fault(error)
        return None
    write_out()
    switch.commit()
    return None


class _Switch:
    def __init__(self, vcpu: SoftVcpu, exit: VmExit, event: Event | None) -> None:
        self._vcpu, self._exit, self._event = vcpu, exit, event
        self._by = exit.qualification >> 30 & 3
        self._state = vcpu.export_state()
        self._selector = exit.qualification & 0xFFFF
        self._at = self._state.gdtr.base + (self._selector & ~7)
        self._raw = int.from_bytes(self._read(self._at, 8), "little")
        self._new = segment_of(self._selector, self._raw)

    @property
    def wide(self) -> bool:
        return bool(self._new.rights & _WIDE and self._state.tr.rights & _WIDE)

    # --- Before the point of no return ---

    def prepare(self) -> Callable[[], None]:
        """All that can be a page fault; returns what writes."""
        state = self._state
        self._image = _TSS.unpack(self._read(self._new.base, _TSS.size))
        writes = [(state.tr.base + _SAVED_AT, self._saved())]
        if self._by in (JMP, IRET):
            old = state.gdtr.base + (state.tr.selector & ~7)
            rights = self._read(old + 5, 1)[0]
            writes.append((old + 5, bytes([rights & ~_BUSY])))
        if self._by != IRET:
            writes.append((self._at + 5, bytes([self._raw >> 40 & 0xFF | _BUSY])))
        if self._by in (CALL, IDT):
            writes.append((self._new.base, state.tr.selector.to_bytes(2, "little")))
        places = [(self._pieces(at, len(data), Access.WRITE), data) for at, data in writes]

        def write_out() -> None:
            for found, data in places:
                guest_memory.write(self._vcpu, found, data)

        return write_out

    def _saved(self) -> bytes:
        state, event = self._state, self._event
        rip = state.rip
        if event is None or event.type in _SOFTWARE:
            rip += self._exit.length
        rflags = state.rflags & ~RFLAGS_NT if self._by == IRET else state.rflags
        selectors = (getattr(state, name).selector for name in _NAMES)
        general = (value & 0xFFFF_FFFF for value in state.gpr[:8])
        return _SAVED.pack(rip & 0xFFFF_FFFF, rflags & 0xFFFF_FFFF, *general, *selectors)

    def _pieces(self, linear: int, size: int, access: Access) -> list[tuple[int, int]]:
        return guest_memory.pieces(self._vcpu, linear & 0xFFFF_FFFF, size, access, user=False)

    def _read(self, linear: int, size: int) -> bytes:
        return guest_memory.read(self._vcpu, self._pieces(linear, size, Access.READ))

    # --- The new task ---

    def commit(self) -> None:
        """Registers first, then segments: a fault belongs to the new task, with what was loaded so far."""
        state, image, vcpu = self._state, self._image, self._vcpu
        state.tr = self._new
        state.tr.rights |= _BUSY
        state.rip, rflags = image[9], image[10] & ~RFLAGS_RESERVED | RFLAGS_ONE
        state.rflags = rflags | RFLAGS_NT if self._by in (CALL, IDT) else rflags
        state.gpr[:8] = image[11:19]
        state.cr0 |= CR0_TS
        state.interruptibility = self._blocked()
        selectors = dict(zip(_NAMES, image[19:25], strict=True))
        for name, selector in selectors.items():
            setattr(state, name, Segment(selector & 0xFFFF, 0, 0, RIGHTS_UNUSABLE))
        ring = selectors["cs"] & 3
        state.ss.rights |= ring << 5
        state.ldtr = Segment(image[25] & 0xFFFF, 0, 0, RIGHTS_UNUSABLE)
        trouble = self._load_cr3(image[8]) or self._load_segments(selectors, ring)
        _enterable(state, ring)
        vcpu.import_state(state)
        if trouble is not None:
            vcpu.inject(trouble)
            return
        self._push_error()
        if image[26] & 1:
            state.dr6 |= _STEP_TRAP
            vcpu.state.dr6 |= _STEP_TRAP
            vcpu.inject(fault(DB))

    def _blocked(self) -> int:
        """NMIs: blocked by one, let in again by IRET."""
        blocked = self._state.interruptibility & BLOCKED_BY_NMI
        if self._by == IRET:
            return 0
        return BLOCKED_BY_NMI if self._event and self._event.type is EventType.NMI else blocked

    def _load_cr3(self, value: int) -> Event | None:
        state, vcpu = self._state, self._vcpu
        if not state.cr0 & CR0_PG:
            return None
        now = Registers(state.cr0, state.cr3, state.cr4, state.efer)
        guest_map = vcpu.machine.guest_map
        try:
            after = register_checks.load(
                now, 3, value, lambda cr3: pointers(guest_map, cr3), code64=False
            )
        except Refused:
            return fault(GP)
        state.cr3 = after.cr3
        vcpu.import_state(state)  # descriptors are read through the new tables
        return None

    def _load_segments(self, selectors: dict[str, int], ring: int) -> Event | None:
        state = self._state
        if state.rflags & RFLAGS_VM:
            return fault(TS, selectors["cs"] & ~3)  # virtual-8086 mode is not simulated
        try:
            state.ldtr = self._ldt(state.ldtr.selector)
            for name in ("cs", "ss", "ds", "es", "fs", "gs"):
                setattr(state, name, self._segment(name, selectors[name] & 0xFFFF, ring))
        except Fault as wrong:
            return wrong.event
        except PageFault as error:
            self._vcpu.state.cr2 = error.address
            return fault(14, error.code)
        return None

    def _ldt(self, selector: int) -> Segment:
        if not selector & ~3:
            return Segment(selector, 0, 0, RIGHTS_UNUSABLE)
        raw, _ = self._descriptor(selector)
        segment = segment_of(selector, raw)
        if selector & 4 or segment.rights & 0x9F != 0x82:
            raise Fault(TS, selector & ~3)
        return segment

    def _descriptor(self, selector: int) -> tuple[int, int]:
        """Eight bytes, and where they are."""
        state, at = self._state, selector & ~7
        table = state.ldtr if selector & 4 else state.gdtr
        if (selector & 4 and not state.ldtr.usable) or at + 7 > table.limit:
            raise Fault(TS, selector & ~3)
        return int.from_bytes(self._read(table.base + at, 8), "little"), table.base + at

    def _segment(self, name: str, selector: int, ring: int) -> Segment:
        """The checks of table 7-1."""
        if not selector & ~3:
            if name in ("cs", "ss"):
                raise Fault(TS, 0)
            return Segment(selector, 0, 0, RIGHTS_UNUSABLE)
        raw, at = self._descriptor(selector)
        segment = segment_of(selector, raw)
        if not _fits(name, segment.rights, segment.dpl, selector & 3, ring):
            raise Fault(TS, selector & ~3)
        if not segment.rights & _PRESENT:
            raise Fault(SS if name == "ss" else NP, selector & ~3)
        if not segment.rights & _ACCESSED:
            segment.rights |= _ACCESSED
            found = self._pieces(at + 5, 1, Access.WRITE)
            guest_memory.write(self._vcpu, found, bytes([segment.rights & 0xFF]))
        return segment

    def _push_error(self) -> None:
        """Of the exception whose handler is this task."""
        vcpu, state, event = self._vcpu, self._state, self._event
        if event is None or event.error is None:
            return
        wide = state.ss.rights >> 14 & 1
        mask = 0xFFFF_FFFF if wide else 0xFFFF
        offset = state.gpr[RSP] - 4 & mask
        if not state.ss.rights & _CONFORMING and offset + 3 > state.ss.limit:
            vcpu.inject(fault(SS))
            return
        try:
            found = self._pieces(state.ss.base + offset, 4, Access.WRITE)
        except PageFault as error:
            vcpu.inject_page_fault(error)
            return
        guest_memory.write(vcpu, found, event.error.to_bytes(4, "little"))
        vcpu.set_register(RSP, state.gpr[RSP] & ~mask | offset)


def _fits(name: str, rights: int, dpl: int, rpl: int, ring: int) -> bool:
    if not rights & _DATA_KIND:
        return False
    code, conforming = rights & _CODE, rights & _CONFORMING
    if name == "cs":
        return bool(code) and (dpl <= rpl if conforming else dpl == rpl)
    if name == "ss":
        return not code and bool(rights & _WRITABLE) and rpl == dpl == ring
    if code and not rights & _READABLE:
        return False
    return bool(code and conforming) or dpl >= max(rpl, ring)


def _enterable(state: CpuState, ring: int) -> None:
    """A fault is delivered at once, but an entry needs a CS and an SS of some kind (§26.3.1.2)."""
    if not state.cs.usable:
        state.cs = Segment(state.cs.selector, 0, 0xFFFF_FFFF, 0xC09B | ring << 5)
    if not state.ss.usable:
        state.ss = Segment(state.cs.selector & 3 | state.ss.selector & ~3, 0, 0, RIGHTS_UNUSABLE)
        state.ss.rights |= ring << 5
