"""Guests of random bytes, with random descriptor tables and registers: each entry ends, and ends in time."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("unicorn", reason="the extra 'soft' is not installed")

from hostel.soft.silicon import Event, EventType, Pin, Reason, VmExit
from hostel.soft.state import RBX, RSP
from soft.core.svm_rig import CODE, GDT, IDT, STACK, TSS, SvmGuest

_DIGITS = """
    0f00 0f01 0f20 0f22 0f21 0f23 0f30 0f32 0f05 0f07 0f34 0f35 0fa2 0fc7 0fae 0fb2 0f0b 0f78
    cd cf 48cf e4 6c f36e 8e ff 9d fb f4 c8 ca ea 9a f1 cc ce f0 d9 db
"""
OPENINGS = [bytes.fromhex(digits) for digits in _DIGITS.split()]
"""Of instructions that do more than compute."""
TIMER = 5000


def code(chance: random.Random) -> bytes:
    return b"".join(
        (chance.choice(OPENINGS) if chance.random() < 0.5 else b"")
        + chance.randbytes(chance.randrange(1, 5))
        for _ in range(40)
    )


def prepare(guest: SvmGuest, chance: random.Random) -> None:
    for at in (GDT, IDT, TSS):
        if chance.random() < 0.5:
            guest.memory.write(at, chance.randbytes(512))
    if chance.random() < 0.3:
        guest.memory.write(0x6000 + 8 * chance.randrange(512), chance.randbytes(8))
    guest.memory.write(CODE, code(chance))
    state = guest.state
    state.gpr[:] = [chance.choice((0, 0x9000, GDT, chance.getrandbits(64))) for _ in state.gpr]
    state.gpr[RSP] = STACK
    state.rflags |= chance.getrandbits(17) & 0x7FD5
    guest.controls.exception_bitmap = chance.choice((0, chance.getrandbits(32)))
    guest.controls.pin, guest.controls.timer = int(Pin.PREEMPTION_TIMER), TIMER


def go_on(guest: SvmGuest, exit: VmExit, chance: random.Random) -> Event | None:
    """As some hypervisor might."""
    guest.state.rip = guest.state.rip + (exit.length or chance.randrange(2)) & (1 << 64) - 1
    guest.state.activity = 0
    event = chance.choice((None, exit.vectoring, exit.interruption))
    return None if event is not None and event.type is EventType.NMI else event


@pytest.mark.parametrize("seed", range(40))
def test_every_entry_ends(seed: int) -> None:
    chance = random.Random(seed)
    bits = chance.choice((16, 32, 64))
    with SvmGuest("nop", bits=bits, ept=bits == 16 or chance.random() < 0.7) as guest:  # type: ignore[arg-type]
        prepare(guest, chance)
        event = None
        for _ in range(15):
            before = guest.core.statistics.instructions
            exit = guest.run(event)
            assert guest.core.statistics.instructions - before <= TIMER
            if exit.reason is Reason.TRIPLE_FAULT:
                break
            event = go_on(guest, exit, chance)


@pytest.mark.parametrize("instruction", ["cpuid", "hlt", "rdmsr", "in %dx, %al", "rdtsc", "int3"])
def test_a_lock_where_none_may_be_is_undefined(instruction: str) -> None:
    with SvmGuest(f".byte 0xf0; {instruction}") as guest:
        guest.gate(6, "mov $6, %ebx; hlt")
        guest.controls.exception_bitmap = 1 << 3
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 6


@pytest.mark.parametrize("instruction", ["cpuid", "int $0x30", "vmcall", "in %dx, %al", "rdtsc"])
def test_an_instruction_whose_page_has_left_the_tables(instruction: str) -> None:
    """The block runs on; whoever fetches again meets the fault. No exit says a length of 0, no event is made
    of nothing. Other pages of the same place in QEMU's TLB, and in the one behind, put this one out."""
    others = "; ".join(f"mov {n << 20 | CODE:#x}, %al" for n in range(1, 15))
    with SvmGuest(f"movq $0, 0x6000 + 8 * 8; {others}; {instruction}") as guest:
        guest.gate(14, "mov $14, %ebx; mov (%rsp), %rcx; mov %cr2, %rdx; hlt")
        guest.controls.exception_bitmap = 1 << 3
        exit = guest.run()
        assert (exit.reason, guest.state.gpr[RBX]) == (Reason.HLT, 14)


@pytest.mark.parametrize("selectors", [0, 0x0010_0008])
@pytest.mark.parametrize("by", ["lcall $0x28, $0", "int $0x30"])
def test_a_task_switch_loads_no_cr3_of_the_guests_choice(by: str, selectors: int) -> None:
    """Nothing intercepts it. Without EPT, CR3 is the hypervisor's: the guest gets no further, be it to its
    new task or to the handler of what is wrong there."""
    with SvmGuest(f"{by}; hlt", bits=32, ept=False) as guest:
        guest.memory.write_u64(GDT + 0x28, 0x8900_9000_0067)
        guest.memory.write_u64(GDT + 0x30, 0x8900_4800_0067)
        guest.memory.write_u64(IDT + 8 * 0x30, 0x8500_0028_0000)
        guest.memory.write(0x9000, bytes(0x68))
        guest.memory.write_u32(0x901C, 0xBAD000)
        guest.memory.write_u32(0x904C, selectors & 0xFFFF)
        guest.memory.write_u32(0x9050, selectors >> 16)
        guest.state.tr.rights = 0x8B
        before = guest.state.cr3
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.TASK_SWITCH, 0)
        assert guest.state.cr3 == before
