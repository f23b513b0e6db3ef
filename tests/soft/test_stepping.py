"""Single steps through the contract: after each instruction the monitor sees where the guest is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from guests.tiny import assemble
from hostel.abi import kvm as abi
from hostel.errors import HostError
from hostel.hypervisor import DebugExit, HaltExit, MmioExit, PioExit, System, Vcpu
from hostel.memory import GuestMemory
from hostel.soft.vm import System as SoftSystem
from hostel.spec import Paging, Trap

CODE = 0x1000
STEP = abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP

SOURCE = """
    nop
    mov $2, %cx
1:  loop 1b
    xor %eax, %eax; cpuid
    mov %ax, 0x3000
    out %al, $0x10
    in $0x11, %al
    mov %al, 0x3002
    mov 0x0c, %dx
    push %ax; popf
    int $3
    mov $0xf000, %bx; mov %bx, %ds
    incb 0xe000
    hlt
back: iret
"""


@contextmanager
def guest(system: System) -> Iterator[tuple[Vcpu, GuestMemory]]:
    """In real mode at CODE, as after power-on; no memory above 640 KiB."""
    with closing(system), GuestMemory(1 << 20, low_end=0xC000_0000) as memory:
        vm = system.create_vm()
        with closing(vm):
            region = memory.regions[0]
            vm.map(0, type(region)(region.gpa, 0xA_0000, region.hva, region.offset))
            code = assemble(SOURCE, bits=16, org=CODE)
            memory.write(CODE, code)
            memory.write_u32(3 * 4, CODE + len(code) - 1)
            vcpu = vm.create_vcpu(0)
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(abi.Regs(rip=CODE, rsp=0x8000, rflags=2))
            vcpu.set_cpuid(system.supported_cpuid())
            vcpu.set_guest_debug(STEP)
            yield vcpu, memory


def steps(vcpu: Vcpu) -> list[str]:
    """Each exit, to the HLT; reads are answered with 0x40."""
    seen: list[str] = []
    while len(seen) < 100:
        match exit := vcpu.run():
            case DebugExit(exception=1, pc=pc, dr6=dr6):
                assert dr6 & 1 << 14
                seen.append(f"{pc - CODE:x}")
            case PioExit(is_write=write, data=data) | MmioExit(is_write=write, data=data):
                seen.append(f"{type(exit).__name__} {'out' if write else 'in'}")
                if not write:
                    data[:] = b"\x40" * len(data)
            case HaltExit():
                return [*seen, "halt"]
            case _:
                raise AssertionError(exit)
    raise AssertionError(seen)


EXPECTED = [
    *("1", "4", "4", "6", "9", "b", "e"),
    *("PioExit out", "10", "PioExit in", "12", "15", "19", "1a"),
    *("1b", "26", "1c", "1f", "21", "MmioExit in", "MmioExit out", "25", "halt"),
]


@pytest.mark.parametrize("trap", ["translate", "intercept"])
@pytest.mark.parametrize("paging", ["ept", "shadow"])
def test_each_instruction(paging: Paging, trap: Trap) -> None:
    for _ in range(2):
        with guest(SoftSystem(paging=paging, trap=trap)) as (vcpu, memory):
            assert steps(vcpu) == EXPECTED
            assert memory.read(0x3002, 1) == b"\x40"


def test_stepping_ends() -> None:
    with guest(SoftSystem()) as (vcpu, _):
        assert isinstance(vcpu.run(), DebugExit)
        vcpu.set_guest_debug(0)
        assert isinstance(vcpu.run(), PioExit)


def test_there_are_no_breakpoints() -> None:
    with guest(SoftSystem()) as (vcpu, _), pytest.raises(HostError, match="no breakpoints"):
        vcpu.set_guest_debug(abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_SW_BP)
