"""One machine of ``bench io``, in a process of its own: it starts, and then measures what it is told to.

::

    io_.py ── a window's name, a line ──────────────► stdin
           ◄─ "ready"; then a window's result, JSON ── stdout

A *window* is one measurement of some seconds. While one machine has its window the others are up and idle.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hostel import Disk, Machine, Volume, prepare
from hostel.host import kernels
from hostel.host.runtime import Runtime
from hostel.host.storage import Daemon
from hostel.spec import Nic

SECONDS = int(os.environ.get("BENCH_SECONDS", "3"))
INTERVAL = 0.2
FILE_SIZE = 128 << 20
VSOCK_SIZE = 64 << 20
VSOCK_PORT = 7000
DEBUG, TRACING = Path("/sys/kernel/debug"), Path("/sys/kernel/tracing")
USER_EXITS = TRACING / "events/kvm/kvm_userspace_exit"

MACHINES: dict[str, dict[str, Any]] = {
    "hostel_python": {"engine": "kvm", "net": "python", "disk": "python", "vsock": "python"},
    "qemu_user": {"engine": "qemu", "net": "python", "disk": "auto"},
    "hostel_vhost": {"engine": "kvm", "net": "vhost", "disk": "vhost-user", "vsock": "vhost"},
    "qemu_vhost": {"engine": "qemu", "net": "vhost", "disk": "vhost-user", "vsock": "vhost"},
    "hostel_e1000": {"engine": "kvm", "net": "python", "model": "e1000"},
    "qemu_e1000": {"engine": "qemu", "net": "python", "model": "e1000"},
}

FIO = {
    "read_1m_qd1": ("read", "1M", 1),
    "write_1m_qd1": ("write", "1M", 1),
    "read_1m_qd32": ("read", "1M", 32),
    "randread_4k_qd1": ("randread", "4k", 1),
    "randread_4k_qd32": ("randread", "4k", 32),
    "randwrite_4k_qd32": ("randwrite", "4k", 32),
}

WINDOWS = {
    "network": ("tcp_out", "tcp_in", "round_trip"),
    "disk": tuple(f"disk_{name}" for name in FIO),
    "files": ("virtiofs_write", "virtiofs_read"),
    "vsock": ("vsock_out",),
}
"""By what part of the machine they measure."""


def parts_of(name: str) -> set[str]:
    """What the machine of this name has."""
    setup = MACHINES[name]
    disk = {"disk", "files"} if "disk" in setup else set()
    return {"network"} | disk | ({"vsock"} & setup.keys())


class Meter:
    """What the host has counted while the block ran, read every ``INTERVAL`` by a thread of its own."""

    counters = ("exits", "irq_injections")

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Meter:
        self._readings = [(time.monotonic(), self._read())]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._readings.append((time.monotonic(), self._read()))

    def whole(self, megabytes: float) -> dict[str, float]:
        """A MB, from the first reading to the last: of a transfer whose size is known."""
        return self._per_mb(self._readings[0][1], self._readings[-1][1], megabytes)

    def steady(self, megabytes_per_second: float) -> dict[str, float]:
        """A MB, of the stretch that lies inside of a tool's ``SECONDS``: neither its start, with what it
        reads from the root, nor its ramp and its end are in it."""
        end = self._readings[-1][0]
        inside = [
            reading
            for reading in self._readings
            if end - SECONDS <= reading[0] <= end - SECONDS / 3
        ]
        (begun, first), (ended, last) = inside[0], inside[-1]
        return self._per_mb(first, last, megabytes_per_second * (ended - begun))

    def _per_mb(
        self, first: dict[str, float], last: dict[str, float], megabytes: float
    ) -> dict[str, float]:
        used = {name: (last[name] - value) / megabytes for name, value in first.items()}
        return {"cpu_seconds_per_gb": used.pop("cpu_seconds") * 1000} | {
            f"{name}_per_mb": value for name, value in used.items()
        }

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._readings.append((time.monotonic(), self._read()))

    def _read(self) -> dict[str, float]:
        counts: dict[str, float] = {"cpu_seconds": busy_seconds()}
        for name in self.counters:
            with suppress(OSError):
                counts[name] = int((DEBUG / "kvm" / name).read_text())
        with suppress(OSError, AttributeError):
            hits = re.search(r"Hits: (\d+)", (USER_EXITS / "hist").read_text())
            counts["user_exits"] = int(hits[1]) if hits else 0
        if exits := self._vm.statistics().get("exits"):
            counts["python_exits"] = sum(sum(of_vcpu.values()) for of_vcpu in exits)
        return counts


def busy_seconds() -> float:
    """All CPUs of the host (proc(5), /proc/stat): all but idle and iowait."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Probe:
    """A machine that runs; each method is a kind of window, and gives its sample and its counts."""

    def __init__(self, vm: Machine, host: str, guest: str) -> None:
        self.vm = vm
        self._host = host
        self._samples: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._windows: dict[str, Callable[[], None]] = {
            "tcp_out": partial(self._tcp, "tcp_out"),
            "tcp_in": partial(self._tcp, "tcp_in", "-R"),
            "round_trip": self._round_trip,
            "virtiofs_write": self._write_file,
            "virtiofs_read": self._read_file,
            "vsock_out": self._vsock,
        }
        for name in FIO:
            self._windows[f"disk_{name}"] = partial(self._disk, name)
        nic = next(name for name in self.run("ls", "/sys/class/net").split() if name != "lo")
        self.run("ip", "address", "add", f"{guest}/24", "dev", nic)
        self.run("ip", "link", "set", nic, "up")
        self.run("ping", "-c", "1", "-W", "10", host)

    def window(self, name: str) -> dict[str, dict[str, float]]:
        self._samples, self._counts = {}, {}
        self._windows[name]()
        return {"samples": self._samples, "counts": self._counts}

    def run(self, *argv: str, timeout: float = 120) -> str:
        done = self.vm.exec(argv, user="root", timeout=timeout)
        if done.exit_code:
            raise SystemExit(
                f"{argv[0]} in the guest: {done.stderr.decode()}{done.stdout.decode()}"
            )
        return done.stdout.decode()

    # -- network ------------------------------------------------------------------------------

    def _tcp(self, name: str, *options: str) -> None:
        with Meter(self.vm) as meter:
            text = self.run(
                *("iperf3", "-J", "-c", self._host, "-t", str(SECONDS), "-O", "1", *options)
            )
        result = json.loads(text)["end"]
        self._samples[f"{name}_gbit_per_s"] = result["sum_received"]["bits_per_second"] / 1e9
        self._counts = meter.steady(result["sum_received"]["bits_per_second"] / 8e6)

    def _round_trip(self) -> None:
        text = self.run("ping", "-q", "-c", "100", "-i", "0.02", self._host)
        self._samples["round_trip_us"] = 1000 * float(text.split("rtt ")[1].split("/")[4])

    # -- disk ---------------------------------------------------------------------------------

    def _disk(self, name: str) -> None:
        kind, size, depth = FIO[name]
        with Meter(self.vm) as meter:
            text = self.run(
                *("fio", "--name=x", "--filename=/dev/vda", "--direct=1", "--ioengine=libaio"),
                *(f"--rw={kind}", f"--bs={size}", f"--iodepth={depth}", "--time_based"),
                *(f"--runtime={SECONDS}", "--output-format=json", "--fallocate=none"),
            )
        job = json.loads(text[text.index("{") :])["jobs"][0]
        result = job["read" if "read" in kind else "write"]
        self._samples[f"disk_{name}_per_s"] = result["iops"]
        self._counts = meter.steady(result["bw_bytes"] / 1e6)

    # -- sockets ------------------------------------------------------------------------------

    def _vsock(self) -> None:
        code = (
            "import socket;s=socket.socket(socket.AF_VSOCK);s.connect((2,%d));"
            "b=bytes(1<<20);[s.sendall(b) for _ in range(%d)];s.shutdown(1);s.recv(1)"
        )
        with self.vm.vsock_listen(VSOCK_PORT) as listener:
            taken: list[float] = []
            thread = threading.Thread(target=drain, args=(listener, taken))
            thread.start()
            with Meter(self.vm) as meter:
                self.run("python3", "-c", code % (VSOCK_PORT, VSOCK_SIZE >> 20))
                thread.join()
        self._samples["vsock_out_mb_per_s"] = VSOCK_SIZE / 1e6 / taken[0]
        self._counts = meter.whole(VSOCK_SIZE / 1e6)

    # -- files --------------------------------------------------------------------------------

    def _write_file(self) -> None:
        megabytes = FILE_SIZE >> 20
        self._dd("write", f"dd if=/dev/zero of=/bench/new bs=1M count={megabytes} conv=fsync 2>&1")

    def _read_file(self) -> None:
        forget = "echo 3 >/proc/sys/vm/drop_caches"
        self._dd("read", f"{forget}; dd if=/bench/file of=/dev/null bs=1M 2>&1")

    def _dd(self, name: str, command: str) -> None:
        with Meter(self.vm) as meter:
            text = self.run("sh", "-c", command)
        seconds = float(re.findall(r", ([\d.e-]+) s,", text)[-1])
        self._samples[f"virtiofs_{name}_mb_per_s"] = FILE_SIZE / 1e6 / seconds
        self._counts = meter.whole(FILE_SIZE / 1e6)


def drain(listener: socket.socket, taken: list[float]) -> None:
    """Seconds from the first byte to the last."""
    connection, _ = listener.accept()
    with connection:
        buffer = bytearray(1 << 20)
        connection.recv_into(buffer)
        started = time.monotonic()
        while connection.recv_into(buffer):
            pass
        taken.append(time.monotonic() - started)


# -- the machine --------------------------------------------------------------------------------


@contextmanager
def running(name: str, work: Path, tap: str) -> Iterator[Machine]:
    setup = MACHINES[name]
    model = setup.get("model", "virtio")
    with ExitStack() as undo:
        disks: tuple[Disk, ...] = ()
        if plane := setup.get("disk"):
            disks = (Disk(path=str(work / "disk.raw"), format="raw", plane=plane),)
        if plane == "vhost-user" and setup["engine"] == "qemu":
            undo.enter_context(beside_qemu(*disks))
        machine = Machine(
            engine=setup["engine"],
            memory=512 << 20,
            nics=(Nic(mode="tap", target=tap, plane=setup["net"], model=model),),
            disks=disks,
            vsock=setup.get("vsock", "none"),
            volumes=(Volume(source=str(work / "share"), target="/bench"),),
            kernel=kernel_with_e1000() if model == "e1000" else "",
        )
        vm = undo.enter_context(machine)
        vm.wait_ready(300)
        yield vm


@contextmanager
def beside_qemu(disk: Disk) -> Iterator[None]:
    """The daemon that engine ``kvm`` has, for machines on QEMU, which would open the disk itself."""
    by_us = prepare.prepare

    def with_daemon(*arguments: Any, **options: Any) -> prepare.Preparation:
        prepared = by_us(*arguments, qemu_args=qemu_args, **options)
        return msgspec.structs.replace(
            prepared, plan=msgspec.structs.replace(prepared.plan, disks=())
        )

    with Runtime() as runtime:
        daemon = Daemon(disk, runtime.path / "disk.sock")
        device = "vhost-user-blk-pci,disable-legacy=on,chardev=bench,num-queues=1"
        chardev = f"socket,id=bench,path={daemon.socket}"
        qemu_args = ("-chardev", chardev, "-device", device)
        try:
            daemon.wait_up()
            prepare.prepare = with_daemon
            yield
        finally:
            prepare.prepare = by_us
            daemon.stop()


def kernel_with_e1000() -> str:
    """A release whose modules have the driver, or nothing: Debian's cloud kernels lack it."""
    for kernel in kernels.survey():
        if kernel.modules and list(kernel.modules.rglob("e1000.ko*")):
            return kernel.release
    return ""


def main(name: str, work: str, tap: str, host: str, guest: str) -> None:
    with running(name, Path(work), tap) as vm:
        probe = Probe(vm, host, guest)
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(probe.window(line.strip())), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
