"""A boot on engine ``kvm`` against QEMU's fastest machine type: process start to the first line from
user space. The same kernel file, initramfs, command line, one vCPU, 256 MiB, both on this host's KVM.

The peer is QEMU ``-M microvm,rtc=on`` with ACPI, from the bzImage and from the unpacked ELF: its
faster one counts. Where KVM does not run Linux this starts itself again in the testbed.

Keys of ``ratios``: ``time_vs_qemu_microvm`` (medians). ``breakdown`` says where hostel's time goes,
``exits`` counts VM exits and exits to user space of one boot each, by the kernel's own tracepoints
(not in the timed runs).
"""

from __future__ import annotations

import compileall
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from _common import interleave, report, rows
from _guest import DEADLINE, MARKER, at_user_space, build_init

import hostel
from hostel.memory import HUGE_PAGE

APPEND = "quiet 8250.nr_uarts=1 pci=noearly pmtmr=0"
CMDLINE = f"console=ttyS0 panic=-1 cryptomgr.notests {APPEND}"
TRACING = Path("/sys/kernel/tracing")
RECYCLED = 512 << 20
"""Bytes: several times what a run uses, for the kernel hands out first what was given back last."""
EVENTS = ("kvm_exit", "kvm_userspace_exit")


def first_line(argv: list[str]) -> float:
    """Seconds from the start of a process to the marker on its standard output."""
    start = time.perf_counter()
    with at_user_space(argv):
        return time.perf_counter() - start


def forget_code() -> None:
    """Write the memory that the last guest gave back, before a run and outside its time.

    The testbed's emulator keeps what it translated with the memory it was translated from, and drops it when
    that is written: up to 0.8 s for the 2 MiB in which a guest's kernel lay. The next to be given those pages
    would pay for it, hostel or QEMU, in whatever thread: by chance. Hardware has nothing of the kind.
    """
    if os.environ.get("HOSTEL_TESTBED"):
        with mmap.mmap(-1, RECYCLED, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for offset in range(0, RECYCLED, HUGE_PAGE):
                memory[offset] = 1


def timed(argv: list[str]) -> float:
    forget_code()
    return first_line(argv)


def counted(argv: list[str]) -> dict[str, int] | None:
    """VM exits and exits to user space of one boot; None where there are no tracepoints."""
    if not (TRACING / "events/kvm/kvm_exit").exists():
        subprocess.run(
            ["mount", "-t", "tracefs", "tracefs", TRACING], check=False, capture_output=True
        )
    events = TRACING / "events/kvm"
    if not (events / "kvm_exit/trigger").exists():
        return None
    histogram = "hist:keys=common_type"
    for event in EVENTS:
        (events / event / "trigger").write_text(histogram)
    try:
        first_line(argv)
        return {event: _hits(events / event / "hist") for event in EVENTS}
    finally:
        for event in EVENTS:
            (events / event / "trigger").write_text(f"!{histogram}")


def _hits(histogram: Path) -> int:
    for line in histogram.read_text().splitlines():
        if line.strip().startswith("Hits:"):
            return int(line.split(":")[1])
    return 0


def breakdown(kernel: str, initrd: str, begun: float) -> None:
    """Child process: one boot by the library, with the time at each of its stations."""
    marks = {"interpreter": time.monotonic() - begun}

    def mark(name: str) -> None:
        marks[name] = time.monotonic() - begun

    from hostel.host.runtime import Runtime
    from hostel.machine import make_engine
    from hostel.prepare import prepare_raw
    from hostel.spec import MachineSpec, Root

    spec = MachineSpec(
        engine="kvm",
        kernel=kernel,
        initrd=initrd,
        append=APPEND,
        memory=256 << 20,
        root=Root(kind="none"),
    )
    mark("imports")
    with Runtime() as runtime:
        plan = prepare_raw(spec, runtime.path)
        mark("plan")
        engine = make_engine(plan)
        seen: list[float] = []
        engine.console.subscribe(lambda data: seen.append(time.monotonic() - begun))
        engine.start()
        mark("engine_started")
        while MARKER not in engine.console.history():
            time.sleep(0.001)
        marks["first_console_byte"] = seen[0]
        mark("user_space")
        statistics = engine.statistics()
        engine.stop()
    print(
        json.dumps(
            {
                "seconds": marks,
                "exits": statistics["exits"],
                "devices": statistics["devices"],
                "unclaimed": statistics["unclaimed"],
            }
        )
    )


def run_breakdown(kernel: str, initrd: str) -> Any:
    argv = [sys.executable, __file__, "--breakdown", kernel, initrd, str(time.monotonic())]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=DEADLINE)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def commands(files: Files) -> dict[str, list[str]]:
    qemu = [
        *("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "kvm", "-cpu", "host"),
        *("-m", "256", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-no-reboot", "-initrd", files.initrd, "-append", CMDLINE),
    ]
    hostel = [
        *(str(Path(sys.executable).with_name("hostel")), "boot", "--engine", "kvm", "-m", "256M"),
        *("--kernel", files.kernel, "--initrd", files.initrd, "--append", APPEND),
    ]
    return {
        "hostel": hostel,
        "qemu_microvm": [*qemu, "-kernel", files.kernel],
        "qemu_microvm_elf": [*qemu, "-kernel", files.elf],
    }


class Files:
    """What both are given: kernel, its ELF, initramfs. A context manager."""

    def __enter__(self) -> Files:
        from hostel.boot.image import vmlinux_for
        from hostel.boot.initramfs import archive
        from hostel.host.kernels import find

        self._work = tempfile.TemporaryDirectory(prefix="hostel-bench-")
        hide_development_tools(self._work.name)
        initrd = Path(self._work.name, "initrd.cpio")
        initrd.write_bytes(archive(build_init(), {}))
        self.kernel, self.initrd = str(find().image), str(initrd)
        self.elf = str(vmlinux_for(find().image))
        return self

    def __exit__(self, *_: object) -> None:
        self._work.cleanup()


def hide_development_tools(work: str) -> None:
    """mypy brings typing_extensions along. An installation has none, and msgspec imports it if it is there,
    with ``inspect`` and eight modules more."""
    Path(work, "typing_extensions.py").write_text(
        "raise ImportError('not installed with hostel')\n"
    )
    os.environ["PYTHONPATH"] = f"{work}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")


def main() -> None:
    runs = int(os.environ.get("BENCH_RUNS", "5"))
    with Files() as files:
        argvs = commands(files)
        table = rows(
            interleave({name: partial(timed, argv) for name, argv in argvs.items()}, runs), unit="s"
        )
        peer = min(table[name]["median"] for name in argvs if name != "hostel")
        report(
            "boot",
            table,
            {"time_vs_qemu_microvm": table["hostel"]["median"] / peer},
            breakdown=run_breakdown(files.kernel, files.initrd),
            exits={name: counted(argv) for name, argv in argvs.items()},
        )


def localize() -> None:
    """The testbed's files come over virtiofs, and each file that a process opens is a round trip. One whose
    times are set is moved to the memory of the overlay: both sides then start from a local disk."""
    stdlib, packages = Path(os.__file__).parent, Path(click.__file__).parent.parent
    files = [path for path in stdlib.iterdir() if path.suffix == ".py"]
    for folder in ("__pycache__", "lib-dynload", "collections", "importlib", "re", "encodings"):
        files += (stdlib / folder).rglob("*")
    for folder in ("click", "msgspec", "lz4", "zstandard"):
        files += (packages / folder).rglob("*")
    files += Path(hostel.__file__).parent.rglob("*")
    files += [Path("/usr/bin/qemu-system-x86_64"), Path(sys.executable)]
    for program in files[-2:]:
        listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        files += [Path(word) for word in listing.stdout.split() if word.startswith("/")]
    files += [
        path for folder in ("qemu", "seabios") for path in Path("/usr/share", folder).glob("*.*")
    ]
    for path in {path.resolve() for path in files if path.is_file()}:
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def compile_modules() -> None:
    """As pip does at an installation. A checkout is compiled when it is first used, and never where the
    environment forbids it (PYTHONDONTWRITEBYTECODE): a start then compiles a hundred modules."""
    compileall.compile_dir(Path(hostel.__file__).parent, quiet=1)


def here_or_in_testbed(script: str, run: Callable[[], None]) -> None:
    """Run where KVM runs Linux: here, or in the testbed."""
    from hostel.kvm.probe import probe

    compile_modules()
    if os.environ.get("HOSTEL_TESTBED"):
        localize()
    if probe().usable or os.environ.get("HOSTEL_TESTBED"):
        run()
        return
    top = Path(__file__).parent.parent
    command = [str(top / "dev"), "testbed", "--", sys.executable, script, *sys.argv[1:]]
    raise SystemExit(subprocess.call(command))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--breakdown"]:
        breakdown(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        here_or_in_testbed(__file__, main)
