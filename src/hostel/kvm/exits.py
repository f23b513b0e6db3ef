"""From the shared page to a typed exit: the one place that knows ``kvm_run``'s exit union.

PIO and MMIO are most of all exits: ``Vcpu.run`` asks for them by name, the rest is a table.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from hostel.abi import kvm as abi
from hostel.hypervisor import (
    DebugExit,
    Exit,
    FailEntry,
    HaltExit,
    HypercallExit,
    InternalError,
    IoapicEoi,
    MmioExit,
    MsrExit,
    PioExit,
    ShutdownExit,
    SystemEvent,
    UnknownExit,
)

AT = 32
"""Where the exit union of ``kvm_run`` begins."""
MSR_DATA = AT + 16
HYPERCALL_RESULT = AT + 7 * 8

_IO = Struct("<BBHIQ").unpack_from
_MMIO = Struct("<Q8xIB").unpack_from
_DEBUG = Struct("<I4xQQQ").unpack_from
_MSR = Struct("<8xII Q").unpack_from
_HYPERCALL = Struct("<7Q").unpack_from
_INTERNAL = Struct("<II16Q").unpack_from
_U64 = Struct("<Q").unpack_from
_U32 = Struct("<I").unpack_from
_MMIO_DATA = AT + 8


def pio(page: memoryview) -> PioExit:
    direction, size, port, count, start = _IO(page, AT)
    return PioExit(port, size, count, direction == 1, page[start : start + size * count])


def mmio(page: memoryview) -> MmioExit:
    address, length, is_write = _MMIO(page, AT)
    return MmioExit(address, is_write != 0, page[_MMIO_DATA : _MMIO_DATA + length])


def _debug(page: memoryview) -> DebugExit:
    return DebugExit(*_DEBUG(page, AT))


def _msr_read(page: memoryview) -> MsrExit:
    reason, index, _ = _MSR(page, AT)
    return MsrExit(index, False, 0, reason)


def _msr_write(page: memoryview) -> MsrExit:
    reason, index, value = _MSR(page, AT)
    return MsrExit(index, True, value, reason)


def _hypercall(page: memoryview) -> HypercallExit:
    number, *arguments = _HYPERCALL(page, AT)
    return HypercallExit(number, tuple(arguments))


def _internal_error(page: memoryview) -> InternalError:
    suberror, count, *data = _INTERNAL(page, AT)
    return InternalError(suberror, tuple(data[:count]))


_PARSERS: dict[int, Callable[[memoryview], Exit]] = {
    abi.EXIT_IO: pio,
    abi.EXIT_MMIO: mmio,
    abi.EXIT_HLT: lambda page: HaltExit(),
    abi.EXIT_SHUTDOWN: lambda page: ShutdownExit(),
    abi.EXIT_SYSTEM_EVENT: lambda page: SystemEvent(_U32(page, AT)[0]),
    abi.EXIT_DEBUG: _debug,
    abi.EXIT_X86_RDMSR: _msr_read,
    abi.EXIT_X86_WRMSR: _msr_write,
    abi.EXIT_HYPERCALL: _hypercall,
    abi.EXIT_IOAPIC_EOI: lambda page: IoapicEoi(page[AT]),
    abi.EXIT_INTERNAL_ERROR: _internal_error,
    abi.EXIT_FAIL_ENTRY: lambda page: FailEntry(_U64(page, AT)[0]),
}


def parse(page: memoryview, reason: int) -> Exit:
    parser = _PARSERS.get(reason)
    return parser(page) if parser else UnknownExit(reason)
