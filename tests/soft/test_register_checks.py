"""Random values for control registers and MSRs: KVM, the software hypervisor and its bare cores agree on what
is a #GP, and on what is in the register after it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import get_args

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import CODE, STACK, assemble, set_mode
from hostel.abi import kvm as abi
from hostel.hypervisor import HaltExit, System
from hostel.kvm import System as KvmSystem
from hostel.memory import GuestMemory
from hostel.soft import register_checks
from hostel.soft.paging.virtualizer import Registers
from hostel.soft.register_checks import CR4_OFFERED, Refused
from hostel.soft.silicon import Primary, Reason
from hostel.soft.state import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PGE,
    CR4_PVI,
    CR4_TSD,
    CR4_VME,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    MSR_CSTAR,
    MSR_DEBUGCTL,
    MSR_EFER,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_MTRR_DEF_TYPE,
    MSR_PAT,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_ESP,
    MSR_TSC_AUX,
    RAX,
    RCX,
    RDX,
)
from hostel.soft.vm import System as SoftSystem
from hostel.spec import Paging, Trap
from soft.core.core_rig import Bench
from soft.core.svm_rig import SvmGuest

ROOT, GDT, IDT, HANDLER = 0x1000, 0x4000, 0x5000, 0xF000
FAULTED = 0xDEAD
ROUNDS = 25
TO_CR = "mov %rax, %cr{0}; mov %cr{0}, %rax; hlt"
TO_MSR = "wrmsr; rdmsr; hlt"
CONTROL = (0, 3, 4, 8)
NOT_COMPARED = CR4_VME | CR4_PVI | 1 << 11 | CR4_VMXE | CR4_OSXSAVE
"""KVM takes some of these whatever CPUID says, and bare cores VMXE. Nor are the upper halves of CR0 and CR4:
where KVM interprets, it drops them unlooked at."""
MSRS = (
    *(MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK, MSR_PAT),
    *(MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE, MSR_SYSENTER_CS, MSR_MTRR_DEF_TYPE),
)
WAYS = [(paging, trap) for paging in get_args(Paging) for trap in get_args(Trap)]
Load = Callable[[str, int, int], int | None]
"""Code, RAX and RDX together, RCX: what the register holds after it; None if it was a #GP."""


# --- Values: near to what is right, or the bits that matter would never be met ---


def values(number: int, control: bool) -> list[int]:
    chance = random.Random(number)
    make = _control if control else _msr
    return [make(chance, number) for _ in range(ROUNDS)]


def _flip(chance: random.Random, value: int, bits: int) -> int:
    for _ in range(chance.randrange(4)):
        value ^= 1 << chance.randrange(bits)
    return value


def _control(chance: random.Random, number: int) -> int:
    if number == 0:
        return _flip(chance, CR0_PE | CR0_PG | CR0_ET, 32) | chance.choice((0, 0, CR0_CD))
    if number == 3:
        return ROOT | chance.choice((0, 0x18, 1 << chance.randrange(40, 64)))
    if number == 4:
        return _flip(chance, CR4_PAE, 32) & ~NOT_COMPARED
    return _flip(chance, 0, 6)


def _msr(chance: random.Random, index: int) -> int:
    if index == MSR_EFER:
        return _flip(chance, EFER_LME | EFER_LMA | EFER_NXE, 16) & ~EFER_LMA
    if index in (MSR_PAT, MSR_MTRR_DEF_TYPE):
        return int.from_bytes(
            bytes(chance.choice((0, 1, 4, 6, 7)) for _ in range(8)), "little"
        ) >> (chance.choice((0, 48, 56)) if index == MSR_MTRR_DEF_TYPE else 0)
    return (
        chance.getrandbits(chance.choice((16, 32, 47, 48, 64)))
        | chance.choice((0, -1 << 47)) & 2**64 - 1
    )


# --- Who loads ---


@contextmanager
def on(system: System) -> Iterator[Load]:
    """64-bit code on a vCPU; CPUID is the software processor's on all."""
    with closing(system), GuestMemory(4 << 20) as memory, closing(system.create_vm()) as vm:
        vm.map(0, memory.regions[0])
        with closing(vm.create_vcpu(0)) as vcpu, closing(SoftSystem()) as soft:
            vcpu.set_cpuid(soft.supported_cpuid())
            set_mode(vcpu, memory, 64)
            base = vcpu.get_sregs()
            base.idt.base, base.idt.limit, base.gdt.base, base.gdt.limit = IDT, 0xFFF, GDT, 0xF
            memory.write(HANDLER, assemble(f"mov ${FAULTED}, %ebx; hlt", org=HANDLER))
            memory.write_u64(IDT + 16 * 13, HANDLER | 8 << 16 | 0x8E << 40)
            memory.write_u64(GDT + 8, 0x00AF_9B00_0000_FFFF)
            places = Places(memory)

            def load(code: str, value: int, index: int) -> int | None:
                vcpu.set_sregs(base)
                rax, rdx = _halves(code, value)
                rip = places.of(code)
                vcpu.set_regs(abi.Regs(rip=rip, rflags=2, rsp=STACK, rax=rax, rdx=rdx, rcx=index))
                assert isinstance(exit := vcpu.run(), HaltExit), exit
                regs = vcpu.get_regs()
                return None if regs.rbx == FAULTED else _whole(code, regs.rax, regs.rdx)

            yield load


class Places:
    """Each piece of code has its own: a core may hold translations of what was there before."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._known: dict[str, int] = {}

    def of(self, code: str) -> int:
        at = self._known.setdefault(code, CODE + 64 * len(self._known))
        self._memory.write(at, assemble(code))
        return at


def _halves(code: str, value: int) -> tuple[int, int]:
    return (value & 0xFFFF_FFFF, value >> 32) if code == TO_MSR else (value, 0)


def _whole(code: str, rax: int, rdx: int) -> int:
    return rdx << 32 | rax if code == TO_MSR else rax


@contextmanager
def bare(trap: str) -> Iterator[Load]:
    """A core, with nothing intercepted but #GP."""
    machine: Bench | SvmGuest = Bench() if trap == "translate" else SvmGuest("nop")
    machine.controls.primary = Primary.HLT | Primary.MSR_BITMAPS
    if trap == "intercept":
        machine.controls.primary |= Primary.SECONDARY
    machine.controls.msr_bitmap = machine.physical.allocate()
    machine.controls.exception_bitmap = 1 << 13
    start, places = copy.deepcopy(machine.state), Places(machine.memory)

    def load(code: str, value: int, index: int) -> int | None:
        machine.state = state = copy.deepcopy(start)
        state.rip = places.of(code)
        state.gpr[RAX], state.gpr[RDX] = _halves(code, value)
        state.gpr[RCX] = index
        exit = machine.run()
        if exit.reason is Reason.EXCEPTION_NMI:
            return None
        assert exit.reason is Reason.HLT, exit
        return _whole(code, state.gpr[RAX], state.gpr[RDX])

    with machine:
        yield load


@pytest.fixture(scope="module")
def kvm() -> Iterator[Load]:
    with on(KvmSystem()) as load:
        yield load


@pytest.fixture(
    scope="module",
    params=[*WAYS, "translate", "intercept"],
    ids=lambda way: way if isinstance(way, str) else "-".join(way),
)
def soft(request: pytest.FixtureRequest) -> Iterator[Load]:
    """The hypervisor with its cores, and these alone."""
    if isinstance(request.param, str):
        with bare(request.param) as load:
            yield load
        return
    paging, trap = request.param
    with on(SoftSystem(paging=paging, trap=trap)) as load:
        yield load


@pytest.mark.kvm
@pytest.mark.parametrize("number", CONTROL)
def test_control_registers(kvm: Load, soft: Load, number: int) -> None:
    code, tried = TO_CR.format(number), values(number, True)
    expected = {hex(value): kvm(code, value, 0) for value in tried}
    assert {hex(value): soft(code, value, 0) for value in tried} == expected
    assert None in expected.values()
    assert any(value is not None for value in expected.values())


@pytest.mark.kvm
@pytest.mark.parametrize("index", MSRS, ids=hex)
def test_msrs(kvm: Load, soft: Load, index: int, request: pytest.FixtureRequest) -> None:
    if index == MSR_MTRR_DEF_TYPE and request.node.callspec.params["soft"] in (
        "translate",
        "intercept",
    ):
        pytest.skip("MTRRs are the hypervisor's")
    tried = values(index, False)
    expected = {hex(value): kvm(TO_MSR, value, index) for value in tried}
    assert {hex(value): soft(TO_MSR, value, index) for value in tried} == expected


# --- What KVM is not asked for ---

LONG = Registers(CR0_PE | CR0_PG, ROOT, CR4_PAE, EFER_LME | EFER_LMA)
PAE = Registers(CR0_PE | CR0_PG, ROOT, CR4_PAE, 0)
FLAT = Registers(CR0_PE, ROOT, 0, 0)
NOT_WELL = 1 << 1
"""Reserved in a directory pointer."""


def _try(
    now: Registers, number: int, value: int, entry: int = 1, code64: bool = False
) -> Registers | None:
    try:
        return register_checks.load(now, number, value, lambda _: [0, entry, 0, 0], code64=code64)
    except Refused:
        return None


@pytest.mark.parametrize(
    ("now", "number", "value"),
    [
        (FLAT, 0, 1 << 32),
        (FLAT, 0, CR0_PG),
        (FLAT, 0, CR0_PE | CR0_NW),
        (LONG, 4, 0),
        (LONG, 4, CR4_PAE | CR4_VMXE),
        (LONG, 4, CR4_PAE | 1 << 40),
        (LONG, 3, 1 << 40),
        (Registers(CR0_PE, ROOT, 0, EFER_LME), 0, CR0_PE | CR0_PG),
    ],
)
def test_refused(now: Registers, number: int, value: int) -> None:
    assert _try(now, number, value) is None


def test_paging_ends_in_compatibility_mode_only() -> None:
    assert _try(LONG, 0, CR0_PE, code64=True) is None
    after = _try(LONG, 0, CR0_PE)
    assert after is not None
    assert not after.efer & EFER_LMA


def test_long_mode_begins_with_paging() -> None:
    after = _try(Registers(CR0_PE, ROOT, CR4_PAE, EFER_LME), 0, CR0_PE | CR0_PG)
    assert after is not None
    assert after.efer & EFER_LMA


@pytest.mark.parametrize(
    ("now", "number", "value"),
    [
        (PAE, 3, ROOT),
        (Registers(CR0_PE, ROOT, CR4_PAE, 0), 0, CR0_PE | CR0_PG),
        (PAE, 0, PAE.cr0 | CR0_CD),
        (PAE, 4, CR4_PAE | CR4_PGE),
    ],
)
def test_what_reads_the_pointers_of_pae(now: Registers, number: int, value: int) -> None:
    """SDM vol. 3A §4.4.1."""
    assert _try(now, number, value) is not None
    assert _try(now, number, value, 1 | NOT_WELL) is None
    assert _try(now, number, value, 1 | 1 << 63) is None
    assert _try(now, number, value, NOT_WELL) is not None, "one that is not present"


@pytest.mark.parametrize(
    ("now", "number", "value"),
    [(LONG, 3, ROOT), (FLAT, 3, ROOT), (PAE, 0, PAE.cr0 | CR0_TS), (PAE, 4, CR4_PAE | CR4_TSD)],
)
def test_what_does_not(now: Registers, number: int, value: int) -> None:
    assert _try(now, number, value, 1 | NOT_WELL) is not None


def test_paged_real_mode_is_kept_but_not_entered() -> None:
    """APM vol. 2 §15.19: what a hypervisor gives a guest, the guest cannot give itself."""
    given = Registers(CR0_PG, ROOT, CR4_PAE, 0)
    assert _try(given, 0, CR0_PG | CR0_TS) is not None
    assert _try(FLAT, 0, CR0_PG) is None


def test_a_guest_may_set_what_cpuid_shows() -> None:
    shown = {name for need in register_checks.CR4_NEEDS.values() for name in [need] if name}
    assert {"smep", "smap", "fsgsbase", "vmx", "xsave"} <= shown
    assert not CR4_OFFERED & (CR4_VMXE | CR4_OSXSAVE | CR4_VME)
    assert CR4_OFFERED & (CR4_PAE | CR4_PGE) == CR4_PAE | CR4_PGE


@pytest.mark.parametrize(
    ("index", "right", "wrong"),
    [
        (MSR_TSC_AUX, 0xFFFF_FFFF, 1 << 32),
        (MSR_DEBUGCTL, 3, 4),
        (MSR_SYSENTER_ESP, 0x7FFF_FFFF_FFFF, 1 << 47),
        (MSR_PAT, 0x0007_0406_0007_0406, 2),
        (MSR_MTRR_DEF_TYPE, 0xC06, 0x1000),
    ],
)
def test_an_msr(index: int, right: int, wrong: int) -> None:
    assert register_checks.msr(index, right) == right
    with pytest.raises(Refused):
        register_checks.msr(index, wrong)
