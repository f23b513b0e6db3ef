"""CPUID of the software processor: ranges, indices, and OSXSAVE."""

from __future__ import annotations

import struct

from hostel.soft.cpuid import BRAND, VENDOR, Cpuid, supported
from hostel.soft.paging.walk import PHYSICAL_BITS
from hostel.soft.state import CR4_OSXSAVE
from hostel.vmm.cpu import cpuid


def no() -> int:
    return 0


def answers(vcpu: int = 0, count: int = 2) -> Cpuid:
    table = cpuid(supported(), vcpu=vcpu, count=count, tsc_khz=1_000_000, tsc_deadline=True)
    return Cpuid(table)


def test_names() -> None:
    _, ebx, ecx, edx = answers()(0, 0, no)
    assert struct.pack("<3I", ebx, edx, ecx) == VENDOR
    brand = b"".join(struct.pack("<4I", *answers()(0x8000_0002 + n, 0, no)) for n in range(3))
    assert brand.rstrip(b"\0") == BRAND


def test_osxsave_is_the_guests_cr4() -> None:
    assert not answers()(1, 0, no)[2] >> 27 & 1
    assert answers()(1, 0, lambda: CR4_OSXSAVE)[2] >> 27 & 1


def test_a_leaf_above_its_range_is_the_highest_basic_one() -> None:
    highest = answers()(0x16, 0, no)
    assert highest[0] == 1000  # megahertz
    assert answers()(0x17, 0, no) == highest
    assert answers()(0x8000_0009, 0, no) == highest


def test_a_leaf_within_its_range_that_is_not_there_is_zeros() -> None:
    assert answers()(5, 0, no) == (0, 0, 0, 0)


def test_indices_and_upper_halves() -> None:
    core = answers(vcpu=1)(0xB, 1, no)
    assert core[1] == 2
    assert core[3] == 1
    assert answers(vcpu=1)(0xFFFF_FFFF_0000_000B, 0xAAAA_AAAA_0000_0001, no) == core
    assert answers()(0x8000_0008, 0, no)[0] & 0xFF == PHYSICAL_BITS
