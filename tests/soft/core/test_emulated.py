"""Instructions on pages that are no memory: the core executes them, the hypervisor answers."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.silicon import Reason, VmExit
from hostel.soft.state import RAX, RBX, RCX
from soft.core.core_rig import Bench

DEVICE, OTHER = 0x10_0000, 0x10_1000
WORD = 0x1122_3344_5566_7788


class Device:
    def __init__(self) -> None:
        self.log: list[tuple[int, int, int | None]] = []

    def read(self, gpa: int, size: int) -> int:
        self.log.append((gpa, size, None))
        return WORD & (1 << 8 * size) - 1

    def write(self, gpa: int, size: int, value: int) -> None:
        self.log.append((gpa, size, value))


def emulate(bench: Bench, device: Device, exit: VmExit, tries: int = 1) -> VmExit:
    """Violations answered, up to the exit that is none."""
    pages: dict[int, int] = {}
    while exit.reason is Reason.EPT_VIOLATION and tries:
        pages[exit.linear & ~0xFFF] = exit.physical & ~0xFFF
        again = bench.core.step_emulated(
            bench.state, bench.controls, pages, device.read, device.write
        )
        exit, tries = again or bench.run(), tries - 1
    return exit


def on_device(code: str, tries: int = 1) -> tuple[Bench, list[tuple[int, int, int | None]], VmExit]:
    device = Device()
    with Bench(code + "; hlt") as bench:
        bench.mmu.hidden = {DEVICE, OTHER}
        bench.state.gpr[RBX] = DEVICE
        exit = bench.run()
        assert (exit.reason, exit.physical & ~0xFFF) == (Reason.EPT_VIOLATION, DEVICE)
        return bench, device.log, emulate(bench, device, exit, tries)


@pytest.mark.parametrize(
    ("code", "log"),
    [
        ("mov 4(%rbx), %eax", [(4, 4, None)]),
        ("movzwl 2(%rbx), %eax", [(2, 2, None)]),
        ("mov 8(%rbx), %rax", [(8, 4, None), (12, 4, None)]),
        ("mov $7, %al; movb %al, 5(%rbx)", [(5, 1, 7)]),
        ("orb $1, 3(%rbx)", [(3, 1, None), (3, 1, 0x89)]),
        ("lock addl $1, (%rbx)", [(0, 4, None), (0, 4, 0x5566_7789)]),
        ("xchg %eax, (%rbx)", [(0, 4, None), (0, 4, 0)]),
        ("mov $2, %ecx; mov %rbx, %rdi; rep stosl", [(0, 4, 0), (4, 4, 0)]),
        ("push (%rbx)", [(0, 4, None), (4, 4, None)]),
    ],
)
def test_each_access_is_asked_for_once(code: str, log: list[tuple[int, int, int | None]]) -> None:
    _, seen, exit = on_device(code)
    assert exit.reason is Reason.HLT
    assert [(gpa - DEVICE, size, value) for gpa, size, value in seen] == log


def test_a_read_reaches_the_register() -> None:
    bench, _, _ = on_device("mov 4(%rbx), %eax")
    assert bench.state.gpr[RAX] == WORD & 0xFFFF_FFFF


def test_the_flags_are_those_of_the_instruction() -> None:
    bench, _, _ = on_device("cmpb $0x88, (%rbx); sete %cl")
    assert bench.state.gpr[RCX] == 1


def test_a_copy_between_two_devices_adds_the_second_page() -> None:
    code = "mov %rbx, %rsi; lea 0x1000(%rbx), %rdi; mov $2, %ecx; rep movsw"
    bench, seen, exit = on_device(code, tries=2)
    assert exit.reason is Reason.HLT
    assert bench.state.gpr[RCX] == 0
    assert [entry for entry in seen if entry[2] is not None] == [
        (OTHER, 2, 0x7788),
        (OTHER + 2, 2, 0x7788),
    ]


def test_afterwards_the_page_is_no_memory_again() -> None:
    _, _, exit = on_device("mov (%rbx), %eax; mov (%rbx), %eax")
    assert exit.reason is Reason.EPT_VIOLATION


def test_what_a_device_raises_is_raised() -> None:
    def broken(gpa: int, size: int) -> int:
        raise ZeroDivisionError

    with Bench("mov (%rbx), %eax; hlt") as bench:
        bench.mmu.hidden = {DEVICE}
        bench.state.gpr[RBX] = DEVICE
        exit = bench.run()
        pages = {DEVICE: exit.physical & ~0xFFF}
        with pytest.raises(ZeroDivisionError):
            bench.core.step_emulated(bench.state, bench.controls, pages, broken, Device().write)
