"""Engine ``soft`` under the monitor: the machines of ``tests/test_monitor.py``, on our own hypervisor."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests.kernels import compile_kernel
from guests.machine import PATIENCE, POWEROFF, RESET, SPIN, machine, planned, say
from hostel.errors import SpecError
from hostel.monitor import Monitor
from hostel.plan import Drive, Ending
from hostel.soft import mini
from hostel.spec import Disk, MachineSpec, Soft

WAYS = [
    Soft(paging=paging, trap=trap)
    for paging in ("ept", "shadow")
    for trap in ("translate", "intercept")
]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.paging}-{way.trap}")
def way(request: pytest.FixtureRequest) -> Soft:
    found: Soft = request.param
    return found


@contextmanager
def soft(source: str, way: Soft, **given: Any) -> Iterator[Monitor]:
    with machine(source, engine="soft", soft=way, **given) as monitor:
        yield monitor


def ending(monitor: Monitor) -> Ending:
    result = monitor.wait(PATIENCE)
    assert result is not None, "the machine did not end"
    return result


def test_serial_output_then_poweroff(way: Soft) -> None:
    with soft(say("hello\nworld") + POWEROFF, way) as monitor:
        assert ending(monitor) == Ending("poweroff")
        assert monitor.console.history() == b"hello\nworld"


def test_reset(way: Soft) -> None:
    with soft(RESET, way) as monitor:
        assert ending(monitor) == Ending("reset")


def test_debug_ports(way: Soft) -> None:
    source = "in $0xe9, %al; out %al, $0xe9; mov $0x10, %al; out %al, $0xf4" + SPIN
    with soft(source, way) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=33)
        assert monitor.console.history() == b"\xe9"


def test_rep_outs_is_one_exit(way: Soft) -> None:
    source = "mov $text, %esi; mov $5, %ecx; mov $0xe9, %dx; cld; rep outsb" + POWEROFF
    with soft(source + '; text: .ascii "hallo"', way) as monitor:
        assert ending(monitor) == Ending("poweroff")
        assert monitor.console.history() == b"hallo"
        assert monitor.statistics()["exits"][0]["PioExit"] == 2


# -- hostile guests ---------------------------------------------------------------------------


def test_triple_fault(way: Soft) -> None:
    with soft("lidt none; int3; none: .word 0; .long 0", way) as monitor:
        found = ending(monitor)
        assert found.kind == "crash"
        assert "triple fault" in found.detail


def test_endless_loop_stops_at_once(way: Soft) -> None:
    with soft("cli" + SPIN, way) as monitor:
        time.sleep(0.1)
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 2
        assert ending(monitor) == Ending("stopped")


def test_jump_to_nowhere(way: Soft) -> None:
    with soft("mov $0xd0000000, %eax; jmp *%eax", way) as monitor:
        found = ending(monitor)
        assert found.kind == "crash"
        assert "no memory" in found.detail


@pytest.mark.parametrize("instruction", ["vmcall", "vmxoff", "vmlaunch", "vmread %eax, %ebx"])
def test_vmx_is_undefined_in_a_guest(way: Soft, instruction: str) -> None:
    with soft(WITH_UD_GATE.format(instruction), way) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=2 * 6 + 1)


WITH_UD_GATE = (
    "mov $stack, %esp; mov $handler, %eax; mov %ax, gate; shr $16, %eax; mov %ax, gate + 6; lidt idtr; {}"
    "; handler: mov $6, %al; out %al, $0xf4" + SPIN + "\n"
    ".balign 8\nidt: .fill 48, 1, 0\ngate: .word 0, 0x10, 0x8e00, 0\nidtr: .word gate + 7 - idt; .long idt\n"
    ".fill 256, 1, 0\nstack:"
)  # fmt: skip


def test_rings_1_and_2(way: Soft) -> None:
    """IRET to ring 2, INT to ring 1 on the stack that the TSS has for it, IRET back, HLT: #GP in ring 0."""
    with soft(RINGS_1_AND_2, way) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=2 * 0b100110 + 1)


RINGS_1_AND_2 = """
    lgdt gdtr; lidt idtr; ljmp $0x08, $1f
1:  mov $0x10, %ax; mov %ax, %ds; mov %ax, %ss; mov $stack0, %esp
    mov $tss, %eax; mov %ax, tss_gate + 2; shr $16, %eax; mov %al, tss_gate + 4; mov %ah, tss_gate + 7
    mov $0x18, %ax; ltr %ax
    mov $refused, %eax; mov %ax, gates + 13 * 8; shr $16, %eax; mov %ax, gates + 13 * 8 + 6
    mov $ring1, %eax; mov %ax, gates + 14 * 8; shr $16, %eax; mov %ax, gates + 14 * 8 + 6
    push $0x3a; push $stack2; push $2; push $0x32; push $ring2; iret
ring2: mov %cs, %ebx; and $3, %ebx; int $14; hlt
ring1: mov %cs, %edx; and $3, %edx; mov 4(%esp), %ecx; and $3, %ecx; mov %ss, %esi; mov %esp, %edi; iret
refused: mov 8(%esp), %eax; and $3, %eax
    shl $2, %eax; or %edx, %eax; shl $2, %eax; or %ecx, %eax   # 2, 1, 2: where it came from, was, had been
    cmp $2, %ebx; jne 2f; cmp $0x29, %esi; jne 2f; cmp $stack1 - 20, %edi; jne 2f
    out %al, $0xf4
2:  xor %eax, %eax; out %al, $0xf4
    .balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
tss_gate: .quad 0x0000890000000067
    .quad 0x00cfba000000ffff, 0x00cfb2000000ffff, 0x00cfda000000ffff, 0x00cfd2000000ffff
gdtr: .word 63; .long gdt
idtr: .word gates + 15 * 8 - 1 - gates; .long gates
gates: .fill 13, 8, 0
    .word 0, 0x08, 0x8e00, 0, 0, 0x21, 0xee00, 0
tss: .long 0, stack0, 0x10, stack1, 0x29
    .fill 0x68, 1, 0
    .fill 64, 1, 0
stack1: .fill 64, 1, 0
stack2: .fill 64, 1, 0
stack0:
"""


# -- a description ----------------------------------------------------------------------------


def test_words_of_soft_are_for_engine_soft() -> None:
    with pytest.raises(SpecError, match="words of engine soft"):
        MachineSpec(engine="kvm", soft=Soft(paging="shadow"))


# -- devices ----------------------------------------------------------------------------------


def test_a_guest_drives_a_disk(way: Soft, tmp_path: Path) -> None:
    """Its own virtio driver: MMIO is emulated, its notification is an eventfd, the answer an interrupt."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"sixteen letters.".ljust(4096, b"x"))
    image = tmp_path / "kernel"
    image.write_bytes(compile_kernel("virtio", bits=32))
    drive = Drive(Disk(path=str(disk), format="raw", plane="python"))
    with planned("", engine="soft", soft=way, transport="mmio", disks=(drive,)) as plan:
        monitor = Monitor(msgspec.structs.replace(plan, kernel=image))
        try:
            monitor.start()
            assert ending(monitor) == Ending("debug-exit", code=3)
        finally:
            monitor.stop()
    assert monitor.console.history().decode().splitlines() == [
        *("masks=0", "found=1", "features ok=1", "sectors=8"),
        *("status=0", "sixteen letters.", "status=0", "interrupts=1"),
    ]
    assert disk.read_bytes()[512 : 512 + 16] == b"SIXTEEN LETTERS."


def test_config_space_is_memory_that_cannot_be_written(way: Soft) -> None:
    """Reading it is no exit; a write to it (read-only memory) is, and moves a BAR."""
    source = (
        "movl 0xe0008000, %eax; cmp $0x1af4, %ax; jne bad"
        "; movl $0xffffffff, 0xe0008010; movl 0xe0008010, %eax; cmp $0xffffffff, %eax; je bad"
        "; mov $7, %al; jmp end; bad: mov $1, %al; end: out %al, $0xf4"
    )
    with soft(source + SPIN, way) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=15)


def test_two_processors(way: Soft) -> None:
    """The mini guest of IPIs, under the monitor."""
    with planned("", engine="soft", soft=way, cpus=2) as plan:
        monitor = Monitor(msgspec.structs.replace(plan, kernel=mini.image("ipi")))
        try:
            monitor.start()
            assert ending(monitor).kind == "debug-exit"
        finally:
            monitor.stop()
    assert monitor.console.history().decode() == mini.guest("ipi").console


def test_nothing_is_left_behind(way: Soft) -> None:
    def left() -> tuple[int, int, int]:
        mapped = Path("/proc/self/maps").read_text().count("hostel-guest-memory")
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped

    def once() -> None:
        with soft(say("x") + POWEROFF, way) as monitor:
            assert ending(monitor) == Ending("poweroff")
        gc.collect()

    once()
    before = left()
    for _ in range(3):
        once()
    assert left() == before
