"""Network, disk, sockets and files of a Linux guest, against QEMU on the same KVM.

    row              hostel_python   hostel_vhost   hostel_e1000   qemu_user   qemu_vhost
    NIC on a tap     Python plane    vhost-net      emulated       QEMU's own  vhost-net
    disk (raw file)  Python plane    vhost-user     –              threads     –
    vsock            Python plane    vhost-vsock    –              –           vhost-vsock
    virtiofs         the same daemon in every row

One kernel, one agent, one root, one tap, one file: only the monitor differs. Each machine is started
by the library in a process of its own, takes every measurement in its turn, and goes; then the next
one; ``BENCH_RUNS`` rounds of that (3). Where KVM does not run Linux this runs in the testbed.

Ratios are hostel by QEMU: above 1 is better for throughput, below 1 for round-trip times.
``counts`` says what a transfer cost, medians too: VM exits, interrupts injected and exits to user space
a MB (the kernel's own counters, for both), exits that reached Python a MB, and CPU seconds of the whole
host, guest and both ends of the transfer included, a GB.

    ./dev bench io [ROW…] [PART…]     some rows, some of: network, disk, files, vsock
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from _common import report, rows

from boot import here_or_in_testbed
from hostel import Disk, Machine, Volume
from hostel.host import kernels
from hostel.spec import Nic

TAP, HOST, GUEST = "hostel-bench0", "10.99.77.1", "10.99.77.2"
SECONDS = 4
DISK_SIZE = 256 << 20
FILE_SIZE = 128 << 20
VSOCK_SIZE = 64 << 20
VSOCK_PORT = 7000
DEBUG, TRACING = Path("/sys/kernel/debug"), Path("/sys/kernel/tracing")
USER_EXITS = TRACING / "events/kvm/kvm_userspace_exit"

MACHINES: dict[str, dict[str, Any]] = {
    "hostel_python": {"engine": "kvm", "net": "python", "disk": "python", "vsock": "python"},
    "qemu_user": {"engine": "qemu", "net": "python", "disk": "auto"},
    "hostel_vhost": {"engine": "kvm", "net": "vhost", "disk": "vhost-user", "vsock": "vhost"},
    "qemu_vhost": {"engine": "qemu", "net": "vhost", "vsock": "vhost"},
    "hostel_e1000": {"engine": "kvm", "net": "python", "model": "e1000"},
    "qemu_e1000": {"engine": "qemu", "net": "python", "model": "e1000"},
}

PARTS = ("network", "disk", "files", "vsock")

FIO = {
    "read_1m_qd1": ("read", "1M", 1),
    "write_1m_qd1": ("write", "1M", 1),
    "read_1m_qd32": ("read", "1M", 32),
    "randread_4k_qd1": ("randread", "4k", 1),
    "randread_4k_qd32": ("randread", "4k", 32),
    "randwrite_4k_qd32": ("randwrite", "4k", 32),
}

RATIOS = {
    "net_vhost_throughput_vs_qemu_vhost": ("hostel_vhost", "qemu_vhost", "tcp_out_gbit_per_s"),
    "net_vhost_receive_vs_qemu_vhost": ("hostel_vhost", "qemu_vhost", "tcp_in_gbit_per_s"),
    "net_vhost_round_trip_vs_qemu_vhost": ("hostel_vhost", "qemu_vhost", "round_trip_us"),
    "net_python_throughput_vs_qemu_user": ("hostel_python", "qemu_user", "tcp_out_gbit_per_s"),
    "net_python_receive_vs_qemu_user": ("hostel_python", "qemu_user", "tcp_in_gbit_per_s"),
    "net_python_round_trip_vs_qemu_user": ("hostel_python", "qemu_user", "round_trip_us"),
    "net_e1000_throughput_vs_qemu_e1000": ("hostel_e1000", "qemu_e1000", "tcp_out_gbit_per_s"),
    "vsock_vhost_vs_qemu_vhost": ("hostel_vhost", "qemu_vhost", "vsock_out_mb_per_s"),
    "virtiofs_read_vs_qemu": ("hostel_python", "qemu_user", "virtiofs_read_mb_per_s"),
    "virtiofs_write_vs_qemu": ("hostel_python", "qemu_user", "virtiofs_write_mb_per_s"),
} | {
    f"disk_{plane}_{name}_vs_qemu": (f"hostel_{machine}", "qemu_user", f"disk_{name}_per_s")
    for plane, machine in (("python", "python"), ("vhost_user", "vhost"))
    for name in FIO
}


class Meter:
    """What the host has counted between ``with`` and its end."""

    counters = ("exits", "irq_injections")

    def __init__(self, vm: Machine) -> None:
        self._vm = vm

    def __enter__(self) -> Meter:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._read()
        self.used = {name: after[name] - value for name, value in self._before.items()}

    def per_mb(self, megabytes: float) -> dict[str, float]:
        counts = {
            f"{name}_per_mb": value / megabytes
            for name, value in self.used.items()
            if name != "cpu_seconds"
        }
        return counts | {"cpu_seconds_per_gb": self.used["cpu_seconds"] / megabytes * 1000}

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
    """One machine and what was measured in it."""

    def __init__(self, vm: Machine, setup: dict[str, Any]) -> None:
        self.vm = vm
        self.setup = setup
        self.samples: dict[str, float] = {}
        self.counts: dict[str, dict[str, float]] = {}

    def run(self, *argv: str, timeout: float = 120) -> str:
        done = self.vm.exec(argv, user="root", timeout=timeout)
        if done.exit_code:
            raise SystemExit(
                f"{argv[0]} in the guest: {done.stderr.decode()}{done.stdout.decode()}"
            )
        return done.stdout.decode()

    # -- network ------------------------------------------------------------------------------

    def network(self) -> None:
        nic = next(name for name in self.run("ls", "/sys/class/net").split() if name != "lo")
        self.run("ip", "address", "add", f"{GUEST}/24", "dev", nic)
        self.run("ip", "link", "set", nic, "up")
        self.run("ping", "-c", "1", "-W", "10", HOST)
        self._tcp("tcp_out")
        self._tcp("tcp_in", "-R")
        text = self.run("ping", "-q", "-c", "100", "-i", "0.02", HOST)
        self.samples["round_trip_us"] = 1000 * float(text.split("rtt ")[1].split("/")[4])

    def _tcp(self, name: str, *options: str) -> None:
        with Meter(self.vm) as meter:
            text = self.run("iperf3", "-J", "-c", HOST, "-t", str(SECONDS), "-O", "1", *options)
        result = json.loads(text)["end"]
        self.samples[f"{name}_gbit_per_s"] = result["sum_received"]["bits_per_second"] / 1e9
        self.counts[name] = meter.per_mb(result["sum_sent"]["bytes"] / 1e6)

    # -- disk ---------------------------------------------------------------------------------

    def disk(self) -> None:
        for name, (kind, size, depth) in FIO.items():
            with Meter(self.vm) as meter:
                text = self.run(
                    *("fio", "--name=x", "--filename=/dev/vda", "--direct=1", "--ioengine=libaio"),
                    *(f"--rw={kind}", f"--bs={size}", f"--iodepth={depth}", "--time_based"),
                    *(f"--runtime={SECONDS}", "--output-format=json", "--fallocate=none"),
                )
            job = json.loads(text[text.index("{") :])["jobs"][0]
            result = job["read" if "read" in kind else "write"]
            self.samples[f"disk_{name}_per_s"] = result["iops"]
            self.counts[f"disk_{name}"] = meter.per_mb(result["io_bytes"] / 1e6)

    # -- sockets ------------------------------------------------------------------------------

    def vsock(self) -> None:
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
        self.samples["vsock_out_mb_per_s"] = VSOCK_SIZE / 1e6 / taken[0]
        self.counts["vsock_out"] = meter.per_mb(VSOCK_SIZE / 1e6)

    # -- files --------------------------------------------------------------------------------

    def files(self) -> None:
        megabytes = FILE_SIZE >> 20
        write = f"dd if=/dev/zero of=/bench/new bs=1M count={megabytes} conv=fsync 2>&1"
        read = "echo 3 >/proc/sys/vm/drop_caches; dd if=/bench/file of=/dev/null bs=1M 2>&1"
        for name, command in (("write", write), ("read", read)):
            with Meter(self.vm) as meter:
                text = self.run("sh", "-c", command)
            seconds = float(re.findall(r", ([\d.e-]+) s,", text)[-1])
            self.samples[f"virtiofs_{name}_mb_per_s"] = FILE_SIZE / 1e6 / seconds
            self.counts[f"virtiofs_{name}"] = meter.per_mb(FILE_SIZE / 1e6)


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


def measure(name: str, work: Path, parts: list[str]) -> dict[str, Any]:
    """In a process of its own: one machine, everything that its row has and is asked for."""
    setup = MACHINES[name]
    disks = (Disk(path=str(work / "disk.raw"), plane=setup["disk"]),) if "disk" in setup else ()
    model = setup.get("model", "virtio")
    machine = Machine(
        engine=setup["engine"],
        memory=512 << 20,
        nics=(Nic(mode="tap", target=TAP, plane=setup["net"], model=model),),
        disks=disks,
        vsock=setup.get("vsock", "none"),
        volumes=(Volume(source=str(work / "share"), target="/bench"),),
        kernel=kernel_with_e1000() if model == "e1000" else "",
    )
    with machine as vm:
        vm.wait_ready(300)
        probe = Probe(vm, setup)
        has = {
            "network": True,
            "disk": bool(disks),
            "files": bool(disks),
            "vsock": "vsock" in setup,
        }
        for part in parts:
            if has[part]:
                getattr(probe, part)()
        return {"samples": probe.samples, "counts": probe.counts}


def kernel_with_e1000() -> str:
    """A release whose modules have the driver, or nothing: Debian's cloud kernels lack it."""
    for kernel in kernels.survey():
        if kernel.modules and list(kernel.modules.rglob("e1000.ko*")):
            return kernel.release
    return ""


# -- the host's side ----------------------------------------------------------------------------


@contextmanager
def host_side() -> Iterator[Path]:
    """The tap, the TCP server, the disk and the share; all gone at the end."""
    if missing := [tool for tool in ("iperf3", "fio", "ip", "ping") if not shutil.which(tool)]:
        raise SystemExit(
            f"bench io needs {', '.join(missing)}: apt-get install iperf3 fio iputils-ping"
        )
    command = ["ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"]
    subprocess.run(command, check=True)
    server = None
    try:
        subprocess.run(["ip", "address", "add", f"{HOST}/24", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
        server = subprocess.Popen(["iperf3", "-s", "-B", HOST], stdout=subprocess.DEVNULL)
        with tempfile.TemporaryDirectory(prefix="hostel-bench-", dir="/dev/shm") as work:
            yield prepared(Path(work))
    finally:
        if server is not None:
            server.kill()
            server.wait()
        subprocess.run(["ip", "link", "delete", TAP], check=True)


def prepared(work: Path) -> Path:
    block = os.urandom(1 << 20)
    (work / "share").mkdir()
    for path, size in ((work / "disk.raw", DISK_SIZE), (work / "share/file", FILE_SIZE)):
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
    return work


@contextmanager
def counted() -> Iterator[None]:
    """The kernel's counters, where it has them."""
    for kind, where in (("debugfs", DEBUG), ("tracefs", TRACING)):
        if not any(where.iterdir()):
            subprocess.run(["mount", "-t", kind, kind, where], check=False, capture_output=True)
    trigger, histogram = USER_EXITS / "trigger", "hist:keys=common_type"
    if not trigger.exists():
        yield
        return
    trigger.write_text(histogram)
    try:
        yield
    finally:
        trigger.write_text(f"!{histogram}")


def main() -> None:
    names, parts = chosen(MACHINES), chosen(PARTS)
    runs = int(os.environ.get("BENCH_RUNS", "3"))
    left_out = {}
    if not kernel_with_e1000():
        for name in [name for name in names if name.endswith("e1000")]:
            names.remove(name)
            left_out[name] = (
                "no kernel here has the e1000 driver: hostel kernel fetch linux-image-amd64"
            )
    samples: dict[str, list[float]] = {}
    counts: dict[str, dict[str, dict[str, list[float]]]] = {}
    with counted(), host_side() as work:
        for _ in range(runs):
            for name in names:
                collect(name, in_a_child(name, work, parts), samples, counts)
    report(
        "io",
        rows(samples),
        dict(ratios(samples)),
        counts={name: medians(of) for name, of in counts.items()},
        left_out=left_out,
    )


def chosen(known: Iterable[str]) -> list[str]:
    """Those that the command line names, or all of them."""
    known = list(known)
    return [name for name in known if name in sys.argv[1:]] or known


def in_a_child(name: str, work: Path, parts: list[str]) -> dict[str, Any]:
    argv = [sys.executable, __file__, "--machine", name, str(work), *parts]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(f"{name} could not be measured")
    result: dict[str, Any] = json.loads(done.stdout)
    told = ", ".join(f"{what} {value:.4g}" for what, value in result["samples"].items())
    print(f"{name}: {told}", file=sys.stderr)
    return result


def collect(
    name: str,
    result: dict[str, Any],
    samples: dict[str, list[float]],
    counts: dict[str, dict[str, dict[str, list[float]]]],
) -> None:
    for what, value in result["samples"].items():
        samples.setdefault(f"{name}.{what}", []).append(value)
    for what, counted_ in result["counts"].items():
        for key, value in counted_.items():
            of = counts.setdefault(name, {}).setdefault(what, {})
            of.setdefault(key, []).append(value)


def medians(counts: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {
        what: {key: round(statistics.median(values), 2) for key, values in of.items()}
        for what, of in counts.items()
    }


def ratios(samples: dict[str, list[float]]) -> Iterator[tuple[str, float]]:
    for key, (ours, theirs, what) in RATIOS.items():
        mine, peer = samples.get(f"{ours}.{what}"), samples.get(f"{theirs}.{what}")
        if mine and peer:
            yield key, statistics.median(mine) / statistics.median(peer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--machine"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])))
    else:
        here_or_in_testbed(__file__, main)
