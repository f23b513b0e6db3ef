"""What the software hypervisor costs: guest instructions a second against QEMU's translator, and one exit.

The same images (mini guests) run on engine soft's hypervisor and on ``qemu-system-x86_64 -accel tcg``, in
turn. Each runs short and long: the difference of the two is guest time only, without a start. All times
are of the processor (user and system), for other work on the host lengthens a clock's.

Rows ``compute``, ``memory``, ``calls``: guest instructions a second, by kind of paging and core.
Their ratios are to QEMU: more is better. ``exit_us``: CPUID, answered in Python. ``violation_us``: an EPT
violation that fills a 4 KiB page. ``miss_us``: a shadow's miss, that is, a #PF exit that fills one.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec
from _common import interleave, ratio, report, rows

from hostel.boot.load import load_kernel
from hostel.hypervisor import HaltExit, PioExit, Vcpu
from hostel.memory import GuestMemory, Region
from hostel.soft import mini
from hostel.soft.vm import System

RUNS = 5
WORKLOADS = {
    "compute": ({"rounds": 1_000}, {"rounds": 3_000_000}),
    "memory": ({"kib": 4096, "rounds": 2}, {"kib": 4096, "rounds": 12}),
    "calls": ({"depth": 4, "rounds": 10}, {"depth": 29, "rounds": 3_000_000}),
}
WAYS = {
    "ept_intercept": ("ept", "intercept"),
    "shadow_intercept": ("shadow", "intercept"),
    "ept_translate": ("ept", "translate"),
    "shadow_translate": ("shadow", "translate"),
}
FEW, MANY = 200, 4200
PAGE = 4096
BASE = 1 << 20
ENTRY = 0x1000
# mov $N, %esi; again: xor %eax, %eax; cpuid; dec %esi; jnz again; hlt
CPUID = b"\xbe%b\x31\xc0\x0f\xa2\x4e\x75\xf9\xf4"
# mov $N, %esi; mov $BASE, %edi; again: mov (%edi), %al; add $PAGE, %edi; dec %esi; jnz again; hlt
TOUCH = (
    b"\xbe%b\xbf" + BASE.to_bytes(4, "little") + b"\x8a\x07\x81\xc7\x00\x10\x00\x00\x4e\x75\xf5\xf4"
)


class Soft(msgspec.Struct):
    """A way to run: kind of paging, core."""

    paging: str
    trap: str

    @contextmanager
    def vcpu(self, *regions: Region) -> Iterator[Vcpu]:
        with ExitStack() as undo:
            system = System(paging=self.paging, trap=self.trap)  # type: ignore[arg-type]
            vm = system.create_vm()
            undo.callback(vm.close)
            for slot, region in enumerate(regions):
                vm.map(slot, region)
            vcpu = vm.create_vcpu(0)
            vcpu.set_cpuid(system.supported_cpuid())
            yield vcpu

    def play(self, name: str, parameters: dict[str, int]) -> tuple[float, int]:
        """Processor seconds, and guest instructions, of a mini guest."""
        guest = mini.guest(name)
        with GuestMemory(guest.memory) as memory:
            entry = load_kernel(memory, mini.image(name, **parameters))
            with self.vcpu(*memory.regions) as vcpu:
                entry.apply(vcpu)
                start = time.process_time()
                while not _left(vcpu):
                    pass
                took = time.process_time() - start
                return took, vcpu.open_stats().read()["instructions"]  # type: ignore[return-value]

    def seconds(self, name: str, parameters: dict[str, int]) -> float:
        return self.play(name, parameters)[0]

    def flat(self, code: bytes, count: int) -> float:
        """Processor seconds of a few instructions in flat 32-bit mode, until HLT.

        Memory begins at 4 KiB, so that no large page fits, and was all written before.
        """
        size = BASE + (MANY + 2) * PAGE
        with GuestMemory(size) as memory:
            memory.write(0, bytes(size))
            memory.write(ENTRY - PAGE, code % count.to_bytes(4, "little"))
            (whole,) = memory.regions
            with self.vcpu(Region(PAGE, size, whole.hva, whole.offset)) as vcpu:
                _protect(vcpu)
                start = time.process_time()
                assert isinstance(vcpu.run(), HaltExit)
                took = time.process_time() - start
                exits = vcpu.open_stats().read()["exits"]
                assert isinstance(exits, int)
                assert exits > count, f"{exits} exits of {count}"
                return took

    def each(self, code: bytes) -> float:
        """Microseconds of one more."""
        return (self.flat(code, MANY) - self.flat(code, FEW)) / (MANY - FEW) * 1e6


def _left(vcpu: Vcpu) -> bool:
    exit = vcpu.run()
    assert isinstance(exit, PioExit), exit
    return exit.is_write and exit.port == 0xF4


def _protect(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    sregs.cr0 |= 1
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.db, segment.g, segment.s = 0, 0xFFFF_FFFF, 1, 1, 1
        segment.selector, segment.type, segment.present = 8, 11 if name == "cs" else 3, 1
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = ENTRY, 2
    vcpu.set_regs(regs)


def on_qemu(name: str, parameters: dict[str, int]) -> float:
    """Processor seconds of a whole QEMU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(mini.guest(name).memory >> 20),
         "-device", "isa-debugcon,iobase=0xe9,chardev=nowhere", "-chardev", "null,id=nowhere",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-no-reboot", "-display", "none", "-nodefaults",
         "-kernel", str(mini.image(name, **parameters))],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def instructions(name: str) -> int:
    """Between the short and the long run: the same on every processor."""
    short, long = WORKLOADS[name]
    soft = Soft(*WAYS["ept_intercept"])
    return soft.play(name, long)[1] - soft.play(name, short)[1]


def speed(name: str, play: Callable[[str, dict[str, int]], float], count: int) -> float:
    short, long = WORKLOADS[name]
    return count / (play(name, long) - play(name, short))


def work() -> dict[str, Callable[[], float]]:
    pieces: dict[str, Callable[[], float]] = {}
    for name in WORKLOADS:
        count = instructions(name)
        pieces[f"{name}_qemu_per_s"] = partial(speed, name, on_qemu, count)
        for way, (paging, trap) in WAYS.items():
            pieces[f"{name}_{way}_per_s"] = partial(speed, name, Soft(paging, trap).seconds, count)
    for trap in ("intercept", "translate"):
        pieces[f"exit_{trap}_us"] = partial(Soft("ept", trap).each, CPUID)
        pieces[f"violation_{trap}_us"] = partial(Soft("ept", trap).each, TOUCH)
        pieces[f"miss_{trap}_us"] = partial(Soft("shadow", trap).each, TOUCH)
    return pieces


def main() -> None:
    samples = interleave(work(), RUNS)
    ratios = {
        f"{name}_{way}_vs_qemu": ratio(samples, f"{name}_{way}_per_s", f"{name}_qemu_per_s")
        for name in WORKLOADS
        for way in WAYS
    }
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[0]
    report("soft", rows(samples), ratios, versions={"qemu": version})


if __name__ == "__main__":
    main()
