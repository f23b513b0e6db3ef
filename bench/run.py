"""``hostel run --engine qemu -- true``, start to end, against a bare QEMU that only gets to user space.

The peer is given the same kernel, initramfs, command line but no devices: ``-M q35``
under TCG, the time from its start to the first line that a program of the guest prints. hostel does in
its time what the peer does not: find the kernel, start virtiofsd, load drivers, mount the host's root
under an overlay, run a command as the caller, end the machine.

Keys of ``ratios``: ``time_vs_qemu``, the kernel given to QEMU as it is installed (bzImage);
``time_vs_qemu_elf``, with the unpacked ELF, which hostel caches and uses itself. ``breakdown``: where
hostel's time goes, one run (seconds).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import interleave, ratio, report, rows
from _guest import DEADLINE, at_user_space, build_init

from hostel.boot.image import vmlinux_for
from hostel.boot.initramfs import archive
from hostel.machine import Machine
from hostel.spec import MachineSpec

HOSTEL = [str(Path(sys.executable).with_name("hostel")), "run", "--engine", "qemu", "--net", "none"]


def hostel() -> float:
    start = time.perf_counter()
    subprocess.run([*HOSTEL, "-q", "--", "true"], check=True, timeout=DEADLINE)
    return time.perf_counter() - start


def breakdown() -> Any:
    argv = [*HOSTEL, "--json", "--", "true"]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=DEADLINE)
    lines = (done.stderr + done.stdout).decode().splitlines()
    return next(json.loads(line) for line in lines if line.startswith("{"))["timings"]


def user_space(argv: list[str]) -> float:
    """From the start of a QEMU to the marker on its serial console."""
    start = time.perf_counter()
    with at_user_space(argv):
        return time.perf_counter() - start


def peer(kernel: Path, initrd: Path, cmdline: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-m", "512M", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", cmdline),
    ]


def main() -> None:
    runs = int(os.environ.get("BENCH_RUNS", "5"))
    plan = Machine(MachineSpec(engine="qemu")).plan
    assert plan.initrd is not None
    with tempfile.TemporaryDirectory(prefix="hostel-bench-") as folder:
        initrd = Path(folder, "initrd")  # hostel's own; a second archive puts another /init into it
        initrd.write_bytes(plan.initrd.read_bytes() + archive(build_init(), {}))
        timed = {
            "hostel_s": hostel,
            "qemu_s": lambda: user_space(peer(plan.kernel, initrd, plan.cmdline)),
            "qemu_elf_s": lambda: user_space(peer(vmlinux_for(plan.kernel), initrd, plan.cmdline)),
        }
        samples = interleave(timed, runs)
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, check=True)
    report(
        "run",
        rows(samples),
        {
            "time_vs_qemu": ratio(samples, "hostel_s", "qemu_s"),
            "time_vs_qemu_elf": ratio(samples, "hostel_s", "qemu_elf_s"),
        },
        versions={"qemu": version.stdout.decode().split("(")[0].split()[-1]},
        breakdown=breakdown(),
    )


if __name__ == "__main__":
    main()
