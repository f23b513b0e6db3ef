"""What a VM exit costs: a port write handled by a Python device, against the same in C, on this host;
and a kick by ioeventfd, which ends in the kernel and reaches neither.

The guest is one loop of ``out`` in real mode, the same bytes for all; set-up is not in the time. Keys
of ``ratios``: ``exit_vs_c`` (monitor's bus and a Python device), ``bare_exit_vs_c`` (``Vcpu.run``
alone), ``kick_vs_c`` (about 1: no line of ours runs), ``kick_vs_exit`` (what an ioeventfd saves).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import interleave, ratio, report, rows

from hostel.abi import kvm as abi
from hostel.hypervisor import PioExit
from hostel.kvm import System, Vcpu, Vm
from hostel.memory import GuestMemory
from hostel.vmm.bus import Bus

LOOPS = 10_000
RUNS = 7
PORT = 0x10
ENTRY = 0x1000
# mov $LOOPS, %ecx; again: out %al, $PORT; dec %ecx; jnz again; hlt
GUEST = b"\x66\xb9" + LOOPS.to_bytes(4, "little") + bytes([0xE6, PORT]) + b"\x66\x49\x75\xfa\xf4"


class Port:
    """The smallest device: it counts."""

    count = 0

    def read(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        self.count += 1

    def reset(self) -> None:
        self.count = 0

    def save(self) -> dict[str, Any]:
        return {"count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def serve_with_bus(vcpu: Vcpu) -> int:
    bus, device = Bus(), Port()
    bus.add(PORT, 1, device, "port")
    run, handle = vcpu.run, bus.handle_pio
    while isinstance(exit := run(), PioExit):
        handle(exit)
    return device.count


def serve_bare(vcpu: Vcpu) -> int:
    count = 0
    while isinstance(vcpu.run(), PioExit):
        count += 1
    return count


def guest_time(serve: Callable[[Vcpu], int], prepare: Callable[[Vm], None], exits: int) -> float:
    """Nanoseconds a loop, of a second round: the first pays for what is made once (page tables)."""
    with System() as system, system.create_vm() as vm, GuestMemory(2 << 20) as memory:
        vm.map(0, memory.regions[0])
        prepare(vm)
        memory.write(ENTRY, GUEST)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            for _ in range(2):
                vcpu.set_regs(abi.Regs(rip=ENTRY, rflags=2))
                start = time.perf_counter_ns()
                count = serve(vcpu)
                elapsed = time.perf_counter_ns() - start
    if count != exits:
        raise SystemExit(f"{count} exits, not {exits}")
    return elapsed / LOOPS


def python_exit() -> float:
    return guest_time(serve_with_bus, lambda vm: None, LOOPS)


def bare_exit() -> float:
    return guest_time(serve_bare, lambda vm: None, LOOPS)


def python_kick() -> float:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return guest_time(serve_bare, lambda vm: vm.ioeventfd(PORT, 1, fd, pio=True), 0)
    finally:
        os.close(fd)


def compiled_peer(directory: str) -> Callable[[str], float]:
    program = Path(directory) / "exit_peer"
    source = Path(__file__).with_name("exit_peer.c")
    subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)

    def measure(kind: str) -> float:
        command = [str(program), kind, str(PORT), str(LOOPS), GUEST.hex()]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return measure


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        peer = compiled_peer(directory)
        samples = interleave(
            {
                "exit_hostel_ns": python_exit,
                "exit_c_ns": lambda: peer("exit"),
                "exit_bare_ns": bare_exit,
                "kick_hostel_ns": python_kick,
                "kick_c_ns": lambda: peer("kick"),
            },
            RUNS,
        )
    ratios = {
        "exit_vs_c": ratio(samples, "exit_hostel_ns", "exit_c_ns"),
        "bare_exit_vs_c": ratio(samples, "exit_bare_ns", "exit_c_ns"),
        "kick_vs_c": ratio(samples, "kick_hostel_ns", "kick_c_ns"),
        "kick_vs_exit": ratio(samples, "kick_hostel_ns", "exit_hostel_ns"),
    }
    compiler = subprocess.run(["cc", "--version"], check=True, capture_output=True, text=True)
    report("exit", rows(samples), ratios, versions={"cc": compiler.stdout.splitlines()[0]})


if __name__ == "__main__":
    main()
