"""What a machine of engine ``kvm`` costs its host beside the guest's memory: private memory of the monitor
process, threads and file descriptors, beside a QEMU microvm with the same kernel, at user space.

And whether anything grows: 200 machines, one after the other, in one process. Where KVM does not run Linux
this starts itself again in the testbed.

Keys of ``ratios``: ``memory_vs_qemu_microvm``. ``growth``: threads, descriptors and private KiB after 200
machines, less what they were after the first 20 (by then every module and buffer is there).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import tempfile
from pathlib import Path

from _common import interleave, report, rows
from _guest import DEADLINE, at_user_space

from boot import Files, commands, here_or_in_testbed

MACHINES = 200
SETTLED = 20
GUEST_MEMORY = ("memfd:", "/dev/zero (deleted)", "/#")
"""How /proc/PID/smaps names the mapping of a guest's memory; QEMU is told to use a memfd."""

GROWTH = "BENCH_FOOTPRINT_GROWTH"

GUEST = """
.code32
.section .text
.long 0x1BADB002, 0, -0x1BADB002    # multiboot 1 header
.globl _start
_start:
    mov $0, %eax
    mov $0xf4, %dx
    outl %eax, %dx                  # debug exit
1:  hlt
    jmp 1b
"""


def private_kib(pid: int | str) -> int:
    """Private memory but for the guest's."""
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(
            ":"
        ):  # a mapping's first line: range, rights, offset, device, inode, path
            path = fields[5] if len(fields) > 5 else ""
            counts = not any(mark in path for mark in GUEST_MEMORY)
        elif counts and fields[0].startswith("Private_"):
            total += int(fields[1])
    return total


def measure(argv: list[str], seen: dict[str, dict[str, int]], name: str) -> float:
    """Private MiB at user space; what else it holds goes into ``seen``."""
    with at_user_space(argv) as pid:
        seen[name] = {
            "threads": len(os.listdir(f"/proc/{pid}/task")),
            "fds": len(os.listdir(f"/proc/{pid}/fd")),
        }
        return private_kib(pid) / 1024


def held() -> dict[str, int]:
    gc.collect()  # what is garbage is not held
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "fds": len(os.listdir("/proc/self/fd")),
        "private_kib": private_kib("self"),
    }


def growth() -> dict[str, int]:
    """After ``MACHINES`` machines, less what it was after ``SETTLED``."""
    from hostel.host.runtime import Runtime
    from hostel.machine import make_engine
    from hostel.plan import Plan
    from hostel.spec import MachineSpec, Root

    spec = MachineSpec(engine="kvm", memory=64 << 20, root=Root(kind="none"))
    with tempfile.TemporaryDirectory(prefix="hostel-bench-") as work:
        source, kernel = Path(work, "guest.S"), Path(work, "guest")
        source.write_text(GUEST)
        link = ["-m32", "-nostdlib", "-static", "-Wl,-n,-Ttext=0x100000,--build-id=none"]
        subprocess.run(["cc", *link, "-o", kernel, source], check=True)
        start: dict[str, int] = {}
        for count in range(MACHINES):
            if count == SETTLED:
                start = held()
            with Runtime() as runtime:
                plan = Plan(
                    spec=spec,
                    engine="kvm",
                    reason="",
                    kernel=kernel,
                    release="",
                    initrd=None,
                    cmdline="",
                    disks=(),
                    shares=(),
                    runtime=runtime.path,
                    agent=False,
                )
                engine = make_engine(plan)
                engine.start()
                ending = engine.wait(DEADLINE)
                engine.stop()
                if ending is None or ending.kind != "debug-exit":
                    raise SystemExit(f"machine {count}: {ending}")
    return {name: value - start[name] for name, value in held().items()}


def main() -> None:
    seen: dict[str, dict[str, int]] = {}
    with Files() as files:
        hostel, qemu = (commands(files)[name] for name in ("hostel", "qemu_microvm"))
        memfd = "memory-backend-memfd,id=ram,size=256M,share=on"
        qemu = [*qemu, "-object", memfd, "-machine", "memory-backend=ram"]
        work = {
            "hostel_mib": lambda: measure(hostel, seen, "hostel"),
            "qemu_microvm_mib": lambda: measure(qemu, seen, "qemu_microvm"),
        }
        table = rows(interleave(work, int(os.environ.get("BENCH_RUNS", "5"))))
    ratio = table["hostel_mib"]["median"] / table["qemu_microvm_mib"]["median"]
    grown = json.loads(os.environ[GROWTH])
    report("footprint", table, {"memory_vs_qemu_microvm": ratio}, holds=seen, growth=grown)


if __name__ == "__main__":
    # Any KVM runs the small guests of this, and 200 machines would take the testbed ten minutes.
    if GROWTH not in os.environ:
        os.environ[GROWTH] = json.dumps(growth())
    here_or_in_testbed(__file__, main)
