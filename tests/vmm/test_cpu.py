from __future__ import annotations

import pytest

from hostel.abi.kvm import CpuidEntry2, LapicState
from hostel.kvm import System
from hostel.vmm import cpu


def leaf(
    function: int, index: int = 0, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0
) -> CpuidEntry2:
    return CpuidEntry2(function=function, index=index, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def vendor(name: bytes, max_leaf: int) -> CpuidEntry2:
    b, d, c = (int.from_bytes(name[n : n + 4], "little") for n in (0, 4, 8))
    return leaf(0, eax=max_leaf, ebx=b, ecx=c, edx=d)


KVM = leaf(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D)
INTEL = [
    vendor(b"GenuineIntel", 0x1F),
    leaf(1, ebx=0x63100800, ecx=1 << 27, edx=1 << 28),
    leaf(4, 0, eax=0xFC004121),
    leaf(4, 2, eax=0xFC01C163),
    leaf(4, 3, eax=0),
    leaf(0xB, 0, eax=1, ebx=2, edx=99),
    KVM,
    leaf(0x8000_0001),
    leaf(0x8000_0008, eax=0x3027),
]
AMD = [
    vendor(b"AuthenticAMD", 0x10),
    leaf(1, ebx=0x05200800),
    KVM,
    leaf(0x8000_0001, ecx=1 << 22),
    leaf(0x8000_0008, eax=0x3030, ecx=0x700F),
    leaf(0x8000_001D, 0, eax=0x4121),
    leaf(0x8000_001D, 3, eax=0x3C163),
    leaf(0x8000_001E, eax=77, ebx=0x101, ecx=3),
]


def table(
    supported: list[CpuidEntry2],
    vcpu: int,
    count: int,
    *,
    tsc_khz: int = 2_400_000,
    deadline: bool = True,
) -> dict[tuple[int, int], CpuidEntry2]:
    entries = cpu.cpuid(supported, vcpu=vcpu, count=count, tsc_khz=tsc_khz, tsc_deadline=deadline)
    result = {(entry.function, entry.index): entry for entry in entries}
    assert len(result) == len(entries), "a leaf is there twice"
    return result


def test_hypervisor_bit_is_set_even_if_kvm_does_not_name_it() -> None:
    ecx = table(INTEL, 0, 1)[1, 0].ecx
    assert ecx >> 31 & 1
    assert ecx >> 21 & 1
    assert ecx >> 24 & 1
    assert not ecx >> 27 & 1  # follows CR4.OSXSAVE
    assert not table(INTEL, 0, 1, deadline=False)[1, 0].ecx >> 24 & 1


@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (32, 5)])
@pytest.mark.parametrize("supported", [INTEL, AMD], ids=["Intel", "AMD"])
def test_apic_ids_and_core_counts_agree(
    supported: list[CpuidEntry2], count: int, bits: int
) -> None:
    for vcpu in range(count):
        leaves = table(supported, vcpu, count)
        assert leaves[1, 0].ebx >> 24 == vcpu
        assert leaves[1, 0].ebx >> 16 & 0xFF == 1 << bits
        assert leaves[1, 0].ebx & 0xFFFF == 0x0800  # CLFLUSH stays
        assert leaves[1, 0].edx >> 28 & 1 == (count > 1)
        smt, core, end = (leaves[0xB, index] for index in range(3))
        assert (smt.eax, smt.ebx, smt.ecx) == (0, 1, 0x100)
        assert (core.eax, core.ebx, core.ecx) == (bits, count, 0x201)
        assert (end.ebx, end.ecx) == (0, 2)
        assert {smt.edx, core.edx, end.edx} == {vcpu}


def test_intel_caches() -> None:
    leaves = table(INTEL, 2, 6)
    assert leaves[4, 0].eax >> 26 == 7  # core IDs in the package, minus one
    assert leaves[4, 0].eax >> 14 & 0xFFF == 0  # L1: nobody else
    assert leaves[4, 2].eax >> 14 & 0xFFF == 7  # L3: all
    assert leaves[4, 2].eax & 0x3FFF == 0x163 & 0x3FFF | 0xC000 & 0x3FFF
    assert leaves[4, 3].eax == 0
    assert (0x1F, 1) in leaves
    assert leaves[0x8000_0008, 0].ecx == 0
    assert not leaves[0x8000_0001, 0].ecx >> 1 & 1


def test_amd_cores() -> None:
    leaves = table(AMD, 2, 6)
    assert leaves[0x8000_0008, 0].ecx == 3 << 12 | 5
    assert leaves[0x8000_0008, 0].eax == 0x3030
    assert leaves[0x8000_0001, 0].ecx == 1 << 22 | 1 << 1
    assert (leaves[0x8000_001E, 0].eax, leaves[0x8000_001E, 0].ebx, leaves[0x8000_001E, 0].ecx) == (
        2,
        2,
        0,
    )
    assert leaves[0x8000_001D, 0].eax >> 14 & 0xFFF == 0
    assert leaves[0x8000_001D, 3].eax >> 14 & 0xFFF == 5
    assert (0x15, 0) not in leaves


def test_frequencies() -> None:
    leaves = table(INTEL, 0, 1, tsc_khz=2_593_907)
    assert (leaves[cpu.KVM_TIMING_LEAF, 0].eax, leaves[cpu.KVM_TIMING_LEAF, 0].ebx) == (
        2_593_907,
        1_000_000,
    )
    assert leaves[0x4000_0000, 0].eax == cpu.KVM_TIMING_LEAF
    tsc = leaves[0x15, 0]
    assert tsc.ecx * tsc.ebx // tsc.eax == 2_593_907_000
    assert tsc.ecx == 1_000_000_000
    assert leaves[0x16, 0].eax == 2593
    assert (0x15, 0) not in table(INTEL, 0, 1, tsc_khz=0)


def test_what_kvm_supports_is_not_changed() -> None:
    before = [bytes(entry) for entry in INTEL]
    cpu.cpuid(INTEL, vcpu=1, count=4, tsc_khz=1, tsc_deadline=True)
    assert [bytes(entry) for entry in INTEL] == before


def test_boot_processor_takes_the_pic_and_nmis() -> None:
    state = cpu.wire_lapic(LapicState.from_buffer_copy(bytes(0x350) + b"\0\0\1\0" + bytes(0xAC)))
    assert bytes(state)[0x350:0x354] == b"\x00\x07\x00\x00"
    assert bytes(state)[0x360:0x364] == b"\x00\x04\x00\x00"


@pytest.mark.kvm
def test_kvm_takes_it() -> None:
    with System() as system, system.create_vm() as vm:
        vm.create_irqchip()
        supported = system.supported_cpuid()
        for id in range(3):
            with vm.create_vcpu(id) as vcpu:
                entries = cpu.cpuid(
                    supported, vcpu=id, count=3, tsc_khz=vcpu.get_tsc_khz(), tsc_deadline=True
                )
                vcpu.set_cpuid(entries)
                vcpu.set_msrs(cpu.initial_msrs())
                vcpu.set_lapic(cpu.wire_lapic(vcpu.get_lapic()))
                seen = {(entry.function, entry.index): entry for entry in vcpu.get_cpuid()}
                assert seen[0xB, 1].edx == id
                assert seen[1, 0].ecx >> 31 & 1
                assert vcpu.get_msrs([cpu.MSR_MTRR_DEF_TYPE]) == {cpu.MSR_MTRR_DEF_TYPE: 0x806}
