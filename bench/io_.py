"""Network, disk, sockets and files of a Linux guest, against QEMU on the same KVM.

    row              hostel_python   hostel_vhost   hostel_e1000   qemu_user   qemu_vhost   qemu_e1000
    NIC on a tap     Python plane    vhost-net      emulated       QEMU's own  vhost-net    emulated
    disk (raw file)  Python plane    vhost-user     –              threads     vhost-user   –
    vsock            Python plane    vhost-vsock    –              –           vhost-vsock  –
    virtiofs         the same daemon in every row

One kernel, one agent, one root: only the monitor differs, and by vhost-user the disk's daemon is the same
too. The machines of a pair are up together and take turns, window by window (``_io_machine.py``), each round
in the other order: what slows the host slows both. ``BENCH_RUNS`` rounds (5) after one that does not count,
``BENCH_SECONDS`` a window (3). Where KVM does not run Linux this runs in the testbed.

Ratios are hostel by QEMU, of the medians: above 1 is better for throughput, below 1 for round-trip times.
``spread`` has the least and the greatest of the rounds' own ratios. ``counts`` says what a transfer cost,
medians too: VM exits, interrupts injected and exits to user space a MB (the kernel's own counters, for both),
exits that reached Python a MB, and CPU seconds of the whole host a GB, guest and both ends of the transfer
included; of TCP and the disk in the steady stretch of a window, of sockets and files in a whole transfer.

    ./dev bench io [ROW…] [PART…] [WINDOW…]     some rows; of the parts network, disk, files, vsock; or
                                                single measurements: tcp_out, disk_randread_4k_qd32 …
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from _common import report, rows
from _io_machine import (
    DEBUG,
    FILE_SIZE,
    FIO,
    MACHINES,
    TRACING,
    USER_EXITS,
    WINDOWS,
    kernel_with_e1000,
    parts_of,
)

from boot import here_or_in_testbed

TAP = "hostel-bench{}"
DISK_SIZE = 256 << 20
STOP_SECONDS = 60.0

PAIRS = (
    ("hostel_python", "qemu_user"),
    ("hostel_vhost", "qemu_vhost"),
    ("hostel_e1000", "qemu_e1000"),
)
"""Ours and the peer."""

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
    f"disk_{plane}_{name}_vs_qemu": (*pair, f"disk_{name}_per_s")
    for plane, pair in (("python", PAIRS[0]), ("vhost_user", PAIRS[1]))
    for name in FIO
}


class Peer:
    """A machine in a process of its own, with its tap and the TCP server on it."""

    def __init__(self, name: str, number: int, work: Path, undo: ExitStack) -> None:
        """What it leaves is put back by ``undo``."""
        self.name = name
        tap, subnet = TAP.format(number), f"10.99.{77 + number}"
        host = f"{subnet}.1"
        undo.enter_context(tap_and_server(tap, host))
        script = str(Path(__file__).with_name("_io_machine.py"))
        argv = [sys.executable, script, name, str(prepared(work)), tap, host, f"{subnet}.2"]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        undo.callback(self.stop)

    def wait_ready(self) -> None:
        self._line()

    def measure(self, window: str) -> dict[str, dict[str, float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(window + "\n")
        self._process.stdin.flush()
        result: dict[str, dict[str, float]] = json.loads(self._line())
        figures = result["samples"] | result["counts"]
        told = ", ".join(f"{what} {value:.4g}" for what, value in figures.items())
        print(f"{self.name}: {told}", file=sys.stderr)
        return result

    def _line(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} could not be measured")
        return line

    def stop(self) -> None:
        """It ends with its input."""
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate(timeout=STOP_SECONDS)
        self._process.kill()
        self._process.wait()


@contextmanager
def tap_and_server(tap: str, host: str) -> Iterator[None]:
    subprocess.run(["ip", "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"], check=True)
    try:
        subprocess.run(["ip", "address", "add", f"{host}/24", "dev", tap], check=True)
        subprocess.run(["ip", "link", "set", tap, "up"], check=True)
        server = subprocess.Popen(["iperf3", "-s", "-B", host], stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            server.kill()
            server.wait()
    finally:
        subprocess.run(["ip", "link", "delete", tap], check=True)


def prepared(work: Path) -> Path:
    """The disk and the share of one machine."""
    block = os.urandom(1 << 20)
    (work / "share").mkdir(parents=True)
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


class Samples:
    """What was measured, by machine and then by name; one value a round."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.counts: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, machine: str, window: str, result: dict[str, dict[str, float]]) -> None:
        for what, value in result["samples"].items():
            self.values[f"{machine}.{what}"].append(value)
        for key, value in result["counts"].items():
            self.counts[machine][window][key].append(value)

    def medians_of_counts(self) -> dict[str, dict[str, dict[str, float]]]:
        return {
            machine: {
                window: {key: round(statistics.median(of), 2) for key, of in counts.items()}
                for window, counts in windows.items()
            }
            for machine, windows in self.counts.items()
        }

    def ratios(self) -> Iterator[tuple[str, float, list[float]]]:
        """Each with the rounds' own."""
        for key, (ours, theirs, what) in RATIOS.items():
            mine, peer = self.values.get(f"{ours}.{what}"), self.values.get(f"{theirs}.{what}")
            if mine and peer:
                by_round = [a / b for a, b in zip(mine, peer, strict=True)]
                yield key, statistics.median(mine) / statistics.median(peer), by_round


def measure(names: Sequence[str], windows: Sequence[str], samples: Samples) -> None:
    """The machines ``names``, up together."""
    runs = int(os.environ.get("BENCH_RUNS", "5"))
    with ExitStack() as undo:
        folder = tempfile.TemporaryDirectory(prefix="hostel-bench-", dir="/dev/shm")
        work = Path(undo.enter_context(folder))
        peers = [Peer(name, i, work / name, undo) for i, name in enumerate(names)]
        for peer in peers:
            peer.wait_ready()
        for number in range(runs + 1):
            for window in windows:
                part = next(part for part, of in WINDOWS.items() if window in of)
                for peer in peers[:: -1 if number % 2 else 1]:
                    if part in parts_of(peer.name):
                        result = peer.measure(window)
                        if number:
                            samples.add(peer.name, window, result)


def main() -> None:
    if missing := [tool for tool in ("iperf3", "fio", "ip", "ping") if not shutil.which(tool)]:
        raise SystemExit(
            f"bench io needs {', '.join(missing)}: apt-get install iperf3 fio iputils-ping"
        )
    names, left_out = chosen(MACHINES), {}
    if not kernel_with_e1000():
        for name in [name for name in names if name.endswith("e1000")]:
            names.remove(name)
            left_out[name] = (
                "no kernel here has the e1000 driver: hostel kernel fetch linux-image-amd64"
            )
    samples = Samples()
    with counted():
        for pair in PAIRS:
            if of_pair := [name for name in pair if name in names]:
                measure(of_pair, chosen_windows(), samples)
    found = list(samples.ratios())
    report(
        "io",
        rows(samples.values),
        {key: value for key, value, _ in found},
        spread={key: [round(min(of), 3), round(max(of), 3)] for key, _, of in found},
        counts=samples.medians_of_counts(),
        left_out=left_out,
    )


def chosen(known: Iterable[str]) -> list[str]:
    """Those that the command line names, or all of them."""
    known = list(known)
    return [name for name in known if name in sys.argv[1:]] or known


def chosen_windows() -> list[str]:
    """Of the named parts, and those named one by one; all of them where neither is."""
    named = [
        window
        for part, windows in WINDOWS.items()
        for window in windows
        if part in sys.argv[1:] or window in sys.argv[1:]
    ]
    return named or [window for windows in WINDOWS.values() for window in windows]


if __name__ == "__main__":
    here_or_in_testbed(__file__, main)
