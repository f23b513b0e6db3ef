"""CPUID: what this processor can show a guest, and the answer to the instruction (SDM vol. 2A, CPUID).

Only what the cores really do is named. The vendor is Intel, for the virtualization is VMX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hostel.abi.kvm import CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry2

from .paging.walk import PHYSICAL_BITS
from .state import CR4_OSXSAVE, LINEAR_BITS

VENDOR, HYPERVISOR, BRAND = b"GenuineIntel", b"hostel soft\0", b"hostel software processor"
HIGHEST, HIGHEST_EXTENDED = 0x16, 0x8000_0008
SIGNATURE = 6 << 8 | 6 << 4 | 3
"""Family 6, as the processors with VMX are."""

_OSXSAVE = 1 << 27

_LEAF_1_EDX = {
    "fpu": 0,
    "de": 2,
    "pse": 3,
    "tsc": 4,
    "msr": 5,
    "pae": 6,
    "mce": 7,
    "cx8": 8,
    "apic": 9,
    "sep": 11,
    "mtrr": 12,
    "pge": 13,
    "cmov": 15,
    "pat": 16,
    "pse36": 17,
    "clfsh": 19,
    "mmx": 23,
    "fxsr": 24,
    "sse": 25,
    "sse2": 26,
}
_LEAF_1_ECX = {"sse3": 0, "ssse3": 9, "cx16": 13, "sse41": 19, "sse42": 20, "popcnt": 23}
_LEAF_7_EBX = {"fsgsbase": 0, "smep": 7, "smap": 20}
_EXTENDED_EDX = {"syscall": 11, "nx": 20, "pdpe1gb": 26, "rdtscp": 27, "lm": 29}
_EXTENDED_ECX = {"lahf": 0}
FEATURES = frozenset({*_LEAF_1_EDX, *_LEAF_1_ECX, *_LEAF_7_EBX, *_EXTENDED_EDX, *_EXTENDED_ECX})
"""By the names that they have in these tables."""


def _bits(features: dict[str, int]) -> int:
    return sum(1 << bit for bit in features.values())


def supported() -> list[CpuidEntry2]:
    """As KVM_GET_SUPPORTED_CPUID: to be shaped by the monitor."""
    return [
        _vendor(0, HIGHEST, VENDOR),
        CpuidEntry2(
            function=1,
            eax=SIGNATURE,
            ebx=8 << 8,  # CLFLUSH: 64 bytes
            ecx=_bits(_LEAF_1_ECX),
            edx=_bits(_LEAF_1_EDX),
        ),
        CpuidEntry2(function=7, flags=CPUID_FLAG_SIGNIFCANT_INDEX, ebx=_bits(_LEAF_7_EBX)),
        _vendor(0x4000_0000, 0x4000_0000, HYPERVISOR, order="bcd"),
        CpuidEntry2(function=0x8000_0000, eax=HIGHEST_EXTENDED),
        CpuidEntry2(function=0x8000_0001, ecx=_bits(_EXTENDED_ECX), edx=_bits(_EXTENDED_EDX)),
        *_brand(),
        CpuidEntry2(function=0x8000_0008, eax=LINEAR_BITS << 8 | PHYSICAL_BITS),
    ]


def _vendor(function: int, highest: int, text: bytes, order: str = "bdc") -> CpuidEntry2:
    """Twelve characters in EBX, EDX, ECX; a hypervisor's in EBX, ECX, EDX."""
    words = (int.from_bytes(text[at : at + 4], "little") for at in (0, 4, 8))
    registers = {f"e{letter}x": word for letter, word in zip(order, words, strict=True)}
    return CpuidEntry2(function=function, eax=highest, **registers)


def _brand() -> Iterator[CpuidEntry2]:
    text = BRAND.ljust(48, b"\0")
    for index in range(3):
        words = [
            int.from_bytes(text[at : at + 4], "little")
            for at in range(index * 16, index * 16 + 16, 4)
        ]
        eax, ebx, ecx, edx = words
        yield CpuidEntry2(function=0x8000_0002 + index, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


class Cpuid:
    """The answers of one vCPU."""

    def __init__(self, entries: Iterable[CpuidEntry2]) -> None:
        self._leaves: dict[int, dict[int | None, tuple[int, int, int, int]]] = {}
        for entry in entries:
            index = entry.index if entry.flags & CPUID_FLAG_SIGNIFCANT_INDEX else None
            values = (entry.eax, entry.ebx, entry.ecx, entry.edx)
            self._leaves.setdefault(entry.function, {})[index] = values
        self._highest = self._leaves.get(0, {}).get(None, (0, 0, 0, 0))[0]

    def __call__(self, leaf: int, index: int, cr4: Callable[[], int]) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX. Leaf 1 shows CR4.OSXSAVE."""
        leaf, index = leaf & 0xFFFF_FFFF, index & 0xFFFF_FFFF
        eax, ebx, ecx, edx = self._find(leaf, index)
        if leaf == 1 and cr4() & CR4_OSXSAVE:
            ecx |= _OSXSAVE
        return eax, ebx, ecx, edx

    def _find(self, leaf: int, index: int) -> tuple[int, int, int, int]:
        """A leaf above the highest of its range is answered as the highest basic one; one that is within
        and not there, with zeros."""
        known = self._leaves.get(leaf)
        if known is None and not self._within(leaf):
            known = self._leaves.get(self._highest)
        if known is None:
            return 0, 0, 0, 0
        return known.get(index) or known.get(None) or (0, 0, 0, 0)

    def _within(self, leaf: int) -> bool:
        for base in (0x8000_0000, 0x4000_0000, 0):
            if leaf >= base:
                highest = self._leaves.get(base, {}).get(None, (base, 0, 0, 0))[0]
                return leaf <= highest
        return False
