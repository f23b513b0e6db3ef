"""What a vCPU is: its CPUID, its model-specific registers, its local APIC. Pure functions of what
KVM supports and of the machine's shape.

The machine is one package of ``count`` cores with one thread each; a core's x2APIC ID is its number.
Four leaves say so in four ways (SDM vol. 3A §9.9; APM vol. 3 appendix E):

::

    leaf            who reads it    what it says
    1               all             initial APIC ID, logical processors, HTT
    4 / 8000_001D   Intel / AMD     which cores share a cache: L3 all, the others none
    B, 1F           all             x2APIC ID and how many of its bits name the core
    8000_0008, _1E  AMD             how many cores; core and node of this one

Time: KVM's own leaves (4000_0000 …) give kvm-clock; 4000_0010 gives the TSC's and the APIC bus's
frequency, and on Intel 15H and 16H do so for kernels that do not know KVM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import gcd

import msgspec

from hostel.abi.kvm import CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry2, LapicState

HYPERVISOR, TSC_DEADLINE, X2APIC = 1 << 31, 1 << 24, 1 << 21  # leaf 1 ECX
OSXSAVE = 1 << 27
HTT = 1 << 28  # leaf 1 EDX
CMP_LEGACY = 1 << 1  # leaf 8000_0001 ECX
KVM_LEAF, KVM_TIMING_LEAF = 0x4000_0000, 0x4000_0010
APIC_BUS_KHZ = 1_000_000
"""KVM's LAPIC timer counts nanoseconds (api.rst, KVM_CAP_X86_APIC_BUS_CYCLES_NS)."""

LEVEL_SMT, LEVEL_CORE = 1, 2
OURS = frozenset({0xB, 0x15, 0x16, 0x1F, KVM_TIMING_LEAF})
"""Leaves written from nothing; what KVM says of them is the host's."""

MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING = 0x1A0, 1
MSR_MTRR_DEF_TYPE, MTRR_ENABLE, MTRR_WRITE_BACK = 0x2FF, 1 << 11, 6

LVT_LINT0, LVT_LINT1 = 0x350, 0x360
LVT_MODE, LVT_MASKED, LVT_NMI, LVT_EXTINT = 7 << 8, 1 << 16, 4 << 8, 7 << 8


class Shape(msgspec.Struct, frozen=True):
    """The machine, as one of its vCPUs sees it."""

    vcpu: int
    count: int
    vendor: str
    max_leaf: int
    tsc_khz: int
    tsc_deadline: bool

    @property
    def id_bits(self) -> int:
        """How many bits of an APIC ID name the core."""
        return (self.count - 1).bit_length()


def cpuid(
    supported: Iterable[CpuidEntry2],
    *,
    vcpu: int,
    count: int,
    tsc_khz: int,
    tsc_deadline: bool,
) -> list[CpuidEntry2]:
    """The CPUID table of ``vcpu``, from what KVM supports."""
    entries = [CpuidEntry2.from_buffer_copy(entry) for entry in supported]
    first = next(entry for entry in entries if entry.function == 0)
    shape = Shape(vcpu, count, _vendor(first), first.eax, tsc_khz, tsc_deadline)
    entries = [entry for entry in entries if entry.function not in OURS]
    for entry in entries:
        if change := _CHANGES.get(entry.function):
            change(entry, shape)
    has_kvm = any(entry.function == KVM_LEAF for entry in entries)
    return [*entries, *_topology(shape), *_frequencies(shape, has_kvm)]


def _vendor(leaf: CpuidEntry2) -> str:
    text = b"".join(int(part).to_bytes(4, "little") for part in (leaf.ebx, leaf.edx, leaf.ecx))
    return text.decode("latin-1")


def _features(entry: CpuidEntry2, shape: Shape) -> None:
    """KVM_GET_SUPPORTED_CPUID need not name itself: without the hypervisor bit a guest does not look
    for kvm-clock. It never names the TSC deadline timer (api.rst §4.46). OSXSAVE follows CR4."""
    threads = 1 << shape.id_bits
    entry.ebx = entry.ebx & 0xFF00 | threads << 16 | shape.vcpu << 24
    entry.ecx = (entry.ecx | HYPERVISOR | X2APIC) & ~(OSXSAVE | TSC_DEADLINE)
    entry.ecx |= TSC_DEADLINE if shape.tsc_deadline else 0
    entry.edx = entry.edx & ~HTT | (HTT if shape.count > 1 else 0)


def _intel_cache(entry: CpuidEntry2, shape: Shape) -> None:
    if entry.eax & 0x1F:  # not the end of the list
        sharing = (1 << shape.id_bits) - 1 if entry.eax >> 5 & 7 >= 3 else 0
        entry.eax = entry.eax & 0x3FFF | sharing << 14 | ((1 << shape.id_bits) - 1) << 26


def _amd_cache(entry: CpuidEntry2, shape: Shape) -> None:
    if entry.eax & 0x1F:
        sharing = shape.count - 1 if entry.eax >> 5 & 7 >= 3 else 0
        entry.eax = entry.eax & 0x3FFF | sharing << 14


def _kvm_signature(entry: CpuidEntry2, shape: Shape) -> None:
    entry.eax = max(entry.eax, KVM_TIMING_LEAF)


def _amd_features(entry: CpuidEntry2, shape: Shape) -> None:
    if shape.vendor != "GenuineIntel":
        entry.ecx = entry.ecx & ~CMP_LEGACY | (CMP_LEGACY if shape.count > 1 else 0)


def _amd_cores(entry: CpuidEntry2, shape: Shape) -> None:
    if shape.vendor != "GenuineIntel":
        entry.ecx = shape.id_bits << 12 | shape.count - 1


def _amd_identity(entry: CpuidEntry2, shape: Shape) -> None:
    entry.eax, entry.ebx, entry.ecx = shape.vcpu, shape.vcpu, 0


_CHANGES: dict[int, Callable[[CpuidEntry2, Shape], None]] = {
    0x1: _features,
    0x4: _intel_cache,
    KVM_LEAF: _kvm_signature,
    0x8000_0001: _amd_features,
    0x8000_0008: _amd_cores,
    0x8000_001D: _amd_cache,
    0x8000_001E: _amd_identity,
}


def _topology(shape: Shape) -> Iterator[CpuidEntry2]:
    """Extended topology (SDM vol. 2A, CPUID leaf 0BH): one thread a core, all cores in one package."""
    levels = ((0, 1, LEVEL_SMT), (shape.id_bits, shape.count, LEVEL_CORE), (0, 0, 0))
    for leaf in (0xB, 0x1F):
        if leaf <= shape.max_leaf:
            for index, (shift, processors, level) in enumerate(levels):
                yield CpuidEntry2(
                    function=leaf,
                    index=index,
                    flags=CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax=shift,
                    ebx=processors,
                    ecx=level << 8 | index,
                    edx=shape.vcpu,
                )


def _frequencies(shape: Shape, has_kvm: bool) -> Iterator[CpuidEntry2]:
    """15H says TSC = crystal × EBX ÷ EAX, and that the LAPIC timer counts the crystal, which in KVM
    ticks at 1 GHz."""
    if not shape.tsc_khz:
        return
    if has_kvm:
        yield CpuidEntry2(function=KVM_TIMING_LEAF, eax=shape.tsc_khz, ebx=APIC_BUS_KHZ)
    if shape.vendor == "GenuineIntel" and shape.max_leaf >= 0x16:
        divisor = gcd(shape.tsc_khz, APIC_BUS_KHZ)
        yield CpuidEntry2(
            function=0x15,
            eax=APIC_BUS_KHZ // divisor,
            ebx=shape.tsc_khz // divisor,
            ecx=APIC_BUS_KHZ * 1000,
        )
        megahertz = shape.tsc_khz // 1000
        yield CpuidEntry2(function=0x16, eax=megahertz, ebx=megahertz)


def initial_msrs() -> dict[int, int]:
    """What firmware leaves behind and the architecture's reset does not: fast string operations on,
    and memory cached without MTRR ranges to say so (SDM vol. 3A §12.11.2.1)."""
    return {
        MSR_MISC_ENABLE: MISC_ENABLE_FAST_STRING,
        MSR_MTRR_DEF_TYPE: MTRR_ENABLE | MTRR_WRITE_BACK,
    }


def wire_lapic(lapic: LapicState) -> LapicState:
    """The boot processor's pins: LINT0 to the PIC, LINT1 to NMI ("virtual wire mode", MP spec §3.6.2.2)."""
    state = bytearray(lapic)
    for offset, mode in ((LVT_LINT0, LVT_EXTINT), (LVT_LINT1, LVT_NMI)):
        entry = int.from_bytes(state[offset : offset + 4], "little")
        entry = entry & ~(LVT_MODE | LVT_MASKED) | mode
        state[offset : offset + 4] = entry.to_bytes(4, "little")
    return LapicState.from_buffer_copy(state)
