"""IN, OUT, INS, OUTS (exit reason 30): to the chips of the machine, an ioeventfd, or the monitor.

Qualification: SDM vol. 3C table 27-5. ``rep ins`` and ``outs`` go out as one exit with a count, for as many
items as lie in one page; what is left of RCX is the next exit, for RIP stays at the instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hostel.hypervisor import Exit, PioExit
from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access, PageFault, VmExit
from hostel.soft.state import RCX, RDI, RFLAGS_DF, RSI
from hostel.soft.vmx.fields import Field

from . import guest_memory

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

_SIZE, _IN, _STRING, _REP = 7, 1 << 3, 1 << 4, 1 << 5
_ADDRESS_SIZE = (0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1)
"""Of INS and OUTS, by the instruction information (SDM vol. 3C table 27-9)."""


class Transfer(msgspec.Struct):
    """One exit's worth of a string instruction."""

    size: int
    count: int
    linear: int
    """Of the lowest item."""
    index: int
    """RSI or RDI."""
    mask: int
    rep: bool
    backwards: bool


def handle(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    qualification = exit.qualification
    port, size = qualification >> 16 & 0xFFFF, (qualification & _SIZE) + 1
    if qualification & _STRING:
        return _string(vcpu, exit, port, size)
    if qualification & _IN:
        return _in(vcpu, exit, port, size)
    data = (vcpu.register(0) & (1 << 8 * size) - 1).to_bytes(size, "little")
    vcpu.skip(exit)
    return write_port(vcpu, port, size, 1, data)


def _in(vcpu: SoftVcpu, exit: VmExit, port: int, size: int) -> Exit | None:
    def finish(data: bytes) -> None:
        value = int.from_bytes(data, "little")
        keep = 0 if size == 4 else vcpu.register(0) & ~((1 << 8 * size) - 1)
        vcpu.set_register(0, keep | value)
        vcpu.skip(exit)

    data = read_chips(vcpu, port, size)
    if data is not None:
        finish(data)
        return None
    return vcpu.ask_pio(port, size, 1, finish)


def _string(vcpu: SoftVcpu, exit: VmExit, port: int, size: int) -> Exit | None:
    transfer = _transfer(vcpu, exit, size)
    if not transfer.count:  # rep with RCX = 0
        vcpu.skip(exit)
        return None
    length = transfer.size * transfer.count
    reading = bool(exit.qualification & _IN)
    try:
        access = Access.WRITE if reading else Access.READ
        pieces = guest_memory.pieces(vcpu, transfer.linear, length, access)
    except PageFault as error:
        vcpu.inject_page_fault(error)
        return None
    if not reading:
        data = guest_memory.read(vcpu, pieces)
        _advance(vcpu, exit, transfer)
        return write_port(vcpu, port, size, transfer.count, data)

    def finish(data: bytes) -> None:
        """Another vCPU may have changed the tables while the monitor answered: they are not asked again."""
        guest_memory.write(vcpu, pieces, data)
        _advance(vcpu, exit, transfer)

    if (first := read_chips(vcpu, port, size)) is not None:
        rest = (read_chips(vcpu, port, size) or b"" for _ in range(transfer.count - 1))
        finish(b"".join((first, *rest)))
        return None
    return vcpu.ask_pio(port, size, transfer.count, finish)


def _transfer(vcpu: SoftVcpu, exit: VmExit, size: int) -> Transfer:
    mask = _ADDRESS_SIZE[min(exit.instruction_info >> 7 & 7, 2)]
    rep = bool(exit.qualification & _REP)
    backwards = bool(vcpu.read(Field.GUEST_RFLAGS) & RFLAGS_DF)
    wanted = vcpu.register(RCX) & mask if rep else 1
    room = 1 if backwards else max((PAGE - exit.linear % PAGE) // size, 1)
    index = RDI if exit.qualification & _IN else RSI
    return Transfer(size, min(wanted, room), exit.linear, index, mask, rep, backwards)


def _advance(vcpu: SoftVcpu, exit: VmExit, transfer: Transfer) -> None:
    step = -transfer.size if transfer.backwards else transfer.size
    _add(vcpu, transfer.index, step * transfer.count, transfer.mask)
    if transfer.rep:
        _add(vcpu, RCX, -transfer.count, transfer.mask)
    if not (transfer.rep and vcpu.register(RCX) & transfer.mask):
        vcpu.skip(exit)


def _add(vcpu: SoftVcpu, register: int, change: int, mask: int) -> None:
    """By the instruction's address size: 32 bits clear the upper half, 16 leave the rest."""
    old = vcpu.register(register)
    keep = old & ~mask if mask == 0xFFFF else 0
    vcpu.set_register(register, keep | old + change & mask)


def read_chips(vcpu: SoftVcpu, port: int, size: int) -> bytes | None:
    """From the interrupt controllers and the PIT, which are eight bits wide; None: not theirs."""
    chips = vcpu.machine.irqchip
    first = chips.read_port(port) if vcpu.machine.has_chips else None
    if first is None:
        return None
    rest = (chips.read_port(port + at) for at in range(1, size))
    return bytes((first, *(0xFF if value is None else value for value in rest)))


def write_port(vcpu: SoftVcpu, port: int, size: int, count: int, data: bytes) -> Exit | None:
    """RIP is behind the instruction already: a monitor that ends the machine here leaves it so."""
    machine = vcpu.machine
    if machine.has_chips and machine.irqchip.write_port(port, data[0]):
        for at in range(1, size * count):
            machine.irqchip.write_port(port + at % size, data[at])
        return None
    if count == 1 and machine.ioeventfds.write(port, data, pio=True):
        return None
    return PioExit(port, size, count, True, memoryview(data))
