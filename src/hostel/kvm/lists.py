"""Ioctl arguments with a flexible array at their end: CPUID, MSRs, GSI routes.

Each is a header with a count, then the entries; a ``bytearray`` holds both, for ``fcntl.ioctl``
refuses an immutable argument over 1024 bytes and copies the rest in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ctypes import sizeof
from struct import Struct

from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import GsiRoute, MsiMessage

from .ioctl import call

_COUNT = Struct("<II")
_COUNT_ONLY = Struct("<I")
_MSR = Struct("<IIQ")
_ENTRY = sizeof(abi.CpuidEntry2)
_ROUTE_IRQCHIP = Struct("<IIII II24x")
_ROUTE_MSI = Struct("<IIII IIII16x")


def empty_cpuid(length: int) -> bytearray:
    return bytearray(_COUNT.pack(length, 0)) + bytearray(length * _ENTRY)


def pack_cpuid(entries: Sequence[abi.CpuidEntry2]) -> bytearray:
    return bytearray(_COUNT.pack(len(entries), 0)) + b"".join(bytes(entry) for entry in entries)


def cpuid_entries(buffer: bytearray) -> list[abi.CpuidEntry2]:
    count: int = _COUNT.unpack_from(buffer)[0]
    return [
        abi.CpuidEntry2.from_buffer_copy(buffer, _COUNT.size + index * _ENTRY)
        for index in range(count)
    ]


def empty_msr_list(length: int) -> bytearray:
    return bytearray(_COUNT_ONLY.pack(length)) + bytearray(4 * length)


def msr_indices(buffer: bytearray) -> list[int]:
    count: int = _COUNT_ONLY.unpack_from(buffer)[0]
    return list(memoryview(buffer).cast("I")[1 : 1 + count])


def get_msrs(fd: int, indices: Sequence[int]) -> dict[int, int]:
    """KVM_GET_MSRS stops at the first MSR it cannot read and answers how many it has read."""
    buffer = _pack_msrs((index, 0) for index in indices)
    done = call(fd, "KVM_GET_MSRS", abi.GET_MSRS, buffer)
    if done != len(indices):
        raise KvmError(f"KVM_GET_MSRS cannot read MSR {indices[done]:#x}")
    return {index: data for index, _, data in _MSR.iter_unpack(buffer[_COUNT.size :])}


def set_msrs(fd: int, values: Mapping[int, int]) -> None:
    """KVM_SET_MSRS likewise."""
    done = call(fd, "KVM_SET_MSRS", abi.SET_MSRS, _pack_msrs(values.items()))
    if done != len(values):
        index, value = list(values.items())[done]
        raise KvmError(f"KVM_SET_MSRS cannot set MSR {index:#x} to {value:#x}")


def _pack_msrs(pairs: Iterable[tuple[int, int]]) -> bytearray:
    entries = [_MSR.pack(index, 0, value) for index, value in pairs]
    return bytearray(_COUNT.pack(len(entries), 0)) + b"".join(entries)


def pack_routes(routes: Sequence[GsiRoute]) -> bytearray:
    """KVM_SET_GSI_ROUTING's table; an entry is 48 bytes."""
    return bytearray(_COUNT.pack(len(routes), 0)) + b"".join(map(_pack_route, routes))


def _pack_route(route: GsiRoute) -> bytes:
    target = route.target
    if isinstance(target, MsiMessage):
        low, high = target.address & 0xFFFF_FFFF, target.address >> 32
        return _ROUTE_MSI.pack(route.gsi, abi.IRQ_ROUTING_MSI, 0, 0, low, high, target.data, 0)
    return _ROUTE_IRQCHIP.pack(route.gsi, abi.IRQ_ROUTING_IRQCHIP, 0, 0, *target)
