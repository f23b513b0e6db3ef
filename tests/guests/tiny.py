"""Tiny guests: machine code from assembly at test time, and a VM that runs it in any mode.

::

    code = assemble("mov $0x42, %al; out %al, $0x10; hlt", bits=16, org=0x1000)
    with TinyGuest(code, bits=16) as guest:
        assert isinstance(guest.run(), PioExit)

AT&T syntax; ``;`` or a new line ends an instruction. Memory from 0: page tables and GDT below 0x1000 ×
5, code at 0x8000, the stack below it. 64-bit and 32-bit guests see all memory mapped one to one (64-bit:
the first GiB).
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Literal

from hostel.abi import kvm as abi
from hostel.hypervisor import Exit
from hostel.hypervisor import Vcpu as AnyVcpu
from hostel.kvm import System, Vcpu, Vm
from hostel.memory import GuestMemory

Bits = Literal[16, 32, 64]

CODE = 0x8000
STACK = 0x8000
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_PRESENT_WRITABLE, _LARGE = 3, 0x80
_PE, _PG, _PAE, _LME, _LMA = 1, 1 << 31, 1 << 5, 1 << 8, 1 << 10


@functools.cache
def assemble(source: str, *, bits: Bits = 64, org: int = CODE) -> bytes:
    """Machine code of ``source``, to be placed at ``org``."""
    with tempfile.TemporaryDirectory() as directory:
        text, thing, binary = (Path(directory) / name for name in ("a.s", "a.o", "a.bin"))
        text.write_text(f".code{bits}\n{source}\n")
        width, emulation = ("64", "elf_x86_64") if bits == 64 else ("32", "elf_i386")
        _do("as", f"--{width}", "-o", thing, text)
        _do("ld", "-m", emulation, "-Ttext", hex(org), "-e", "0", "--oformat=binary",
            "-o", binary, thing)  # fmt: skip
        return binary.read_bytes()


def _do(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr}")


class TinyGuest:
    """A VM with one vCPU (more by ``add_vcpu``) about to execute ``code``."""

    def __init__(
        self,
        code: bytes | str,
        *,
        bits: Bits = 64,
        memory: int = 4 << 20,
        irqchip: bool = False,
    ) -> None:
        self.bits = bits
        self.system = System()
        self.vm: Vm = self.system.create_vm()
        self.memory = GuestMemory(memory)
        for slot, region in enumerate(self.memory.regions):
            self.vm.map(slot, region)
        self.vm.set_identity_map_address(0xFFFB_C000)
        self.vm.set_tss_address(0xFFFB_D000)
        if irqchip:
            self.vm.create_irqchip()
        self.vcpus: list[Vcpu] = []
        self.vcpu = self.add_vcpu()
        self.load(code)

    def load(self, code: bytes | str, at: int = CODE) -> None:
        self.memory.write(
            at, assemble(code, bits=self.bits, org=at) if isinstance(code, str) else code
        )

    def add_vcpu(self, entry: int = CODE) -> Vcpu:
        vcpu = self.vm.create_vcpu(len(self.vcpus))
        self.vcpus.append(vcpu)
        vcpu.set_cpuid(self.system.supported_cpuid())
        set_mode(vcpu, self.memory, self.bits)
        vcpu.set_regs(abi.Regs(rip=entry, rflags=2, rsp=STACK - 0x1000 * vcpu.id))
        return vcpu

    def run(self) -> Exit:
        return self.vcpu.run()

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.system.close()
        self.memory.close()

    def __enter__(self) -> TinyGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def set_mode(vcpu: AnyVcpu, memory: GuestMemory, bits: Bits) -> None:
    """Real mode with all segments at 0, flat protected mode, or long mode with 2 MiB pages."""
    sregs = vcpu.get_sregs()
    if bits == 16:
        sregs.cs.base = sregs.cs.selector = 0
    else:
        _flat_segments(sregs, bits)
        sregs.cr0 |= _PE
    if bits == 64:
        _identity_map(memory)
        sregs.cr3, sregs.cr4 = _PML4, sregs.cr4 | _PAE
        sregs.cr0 |= _PG
        sregs.efer = _LME | _LMA
    vcpu.set_sregs(sregs)


def _flat_segments(sregs: abi.Sregs, bits: Bits) -> None:
    def flat(selector: int, type: int, long: bool) -> abi.Segment:
        return abi.Segment(
            limit=0xFFFF_FFFF, selector=selector, type=type, present=1, s=1, g=1,
            l=long, db=not long,
        )  # fmt: skip

    sregs.cs = flat(8, 11, bits == 64)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, flat(16, 3, False))


def _identity_map(memory: GuestMemory) -> None:
    memory.write_u64(_PML4, _PDPT | _PRESENT_WRITABLE)
    memory.write_u64(_PDPT, _PD | _PRESENT_WRITABLE)
    for index in range(512):
        memory.write_u64(_PD + 8 * index, index << 21 | _PRESENT_WRITABLE | _LARGE)
