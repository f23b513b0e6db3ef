"""Guest memory as the hypervisor reaches it for the guest: by linear address, through the guest's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access

if TYPE_CHECKING:
    from .vcpu import SoftVcpu


def translate(vcpu: SoftVcpu, linear: int, access: Access, *, user: bool | None = None) -> int:
    """The GPA; ``PageFault`` is the guest's. ``user``: as who; by itself, as the guest runs."""
    state = vcpu.translation_state()
    return vcpu.paging.translate(state, linear, access, state.cpl == 3 if user is None else user)


def pieces(
    vcpu: SoftVcpu, linear: int, size: int, access: Access, *, user: bool | None = None
) -> list[tuple[int, int]]:
    """GPA and length of what lies in one page each; all are translated before one is touched."""
    return [
        (translate(vcpu, at, access, user=user), length) for at, length in _by_page(linear, size)
    ]


def _by_page(linear: int, size: int) -> Iterator[tuple[int, int]]:
    while size:
        length = min(size, PAGE - linear % PAGE)
        yield linear, length
        linear, size = linear + length, size - length


def peek(vcpu: SoftVcpu, gpa: int, size: int) -> bytes | None:
    """From memory; None: there is none."""
    machine = vcpu.machine
    hpa = machine.guest_map.hpa(gpa)
    return None if hpa is None else machine.host.physical.read(hpa, size)


def poke(vcpu: SoftVcpu, gpa: int, data: bytes) -> bool:
    """To memory; False: there is none, or it may not be written."""
    machine = vcpu.machine
    slot = machine.guest_map.find(gpa)
    if slot is None or slot.read_only:
        return False
    hpa = gpa - slot.gpa + slot.hpa
    machine.host.physical.write(hpa, data)
    for pcpu in machine.host.pcpus:
        pcpu.core.wrote(hpa, len(data))
    vcpu.paging.wrote(gpa, len(data))
    return True


def read(vcpu: SoftVcpu, found: list[tuple[int, int]]) -> bytes:
    """These pieces; what is no memory reads as all ones."""
    return b"".join(peek(vcpu, gpa, length) or b"\xff" * length for gpa, length in found)


def write(vcpu: SoftVcpu, found: list[tuple[int, int]], data: bytes) -> None:
    """To these pieces; what is no memory takes nothing."""
    at = 0
    for gpa, length in found:
        poke(vcpu, gpa, data[at : at + length])
        at += length
