"""A whole machine of engine ``kvm`` around a tiny multiboot kernel, written in assembly.

::

    with machine("mov $0x3f8, %dx; mov $65, %al; out %al, %dx" + POWEROFF) as monitor:
        assert monitor.wait(PATIENCE).kind == "poweroff"

The kernel is entered in flat 32-bit protected mode, paging and interrupts off, without a stack.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from guests.kernels import elf
from guests.tiny import assemble
from hostel.monitor import Monitor
from hostel.plan import Drive, Plan
from hostel.spec import MachineSpec

PATIENCE = 20.0
LOAD = 0x10_0000
POWEROFF = "; mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx; 0: hlt; jmp 0b"
RESET = "; mov $0xfe, %al; out %al, $0x64; 0: hlt; jmp 0b"
SPIN = "; 0: jmp 0b"
_HEADER = ".long 0x1badb002, 0, -0x1badb002\n"


def kernel(source: str) -> bytes:
    """An ELF file with a multiboot header; a fact a line: ``;`` or a new line ends an instruction."""
    code = assemble(f"{_HEADER}_start: {source}", bits=32, org=LOAD)
    size = len(code) + 0x1_0000  # room for variables behind the code
    return elf(machine=3, bits=32, entry=LOAD + 12, segments=((LOAD, size, code),))


def say(text: str) -> str:
    """Assembly that writes ``text`` to the serial port."""
    return "mov $0x3f8, %dx; " + "; ".join(f"mov ${c}, %al; out %al, %dx" for c in text.encode())


@contextmanager
def planned(
    source: str,
    *,
    agent: bool = False,
    engine: Literal["kvm", "soft"] = "kvm",
    disks: tuple[Drive, ...] = (),
    **spec: Any,
) -> Iterator[Plan]:
    """The plan of such a machine."""
    with tempfile.TemporaryDirectory(prefix="hostel-test-") as directory:
        image = Path(directory) / "kernel"
        image.write_bytes(kernel(source))
        yield Plan(
            spec=MachineSpec(memory=32 << 20, on_reboot="stop").replace(engine=engine, **spec),
            engine=engine,
            reason="a test",
            kernel=image,
            release="",
            initrd=None,
            cmdline="",
            disks=disks,
            shares=(),
            runtime=Path(directory),
            agent=agent,
        )


@contextmanager
def machine(source: str, **given: Any) -> Iterator[Monitor]:
    """Started; stopped at the end. ``given`` is for ``planned``."""
    with planned(source, **given) as plan:
        monitor = Monitor(plan)
        try:
            monitor.start()
            yield monitor
        finally:
            monitor.stop()
