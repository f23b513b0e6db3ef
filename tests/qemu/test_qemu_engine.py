"""The QEMU engine with real QEMU processes: small multiboot guests for its life, Linux for its devices."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests import kernels
from guests.kernels import compile_kernel
from guests.killed import Victim, gone_within, lives
from hostel.errors import (
    HelperError,
    HostError,
    ImageError,
    MachineStopped,
    MissingTool,
    SpecError,
    UserError,
)
from hostel.host.runtime import Runtime, sweep
from hostel.plan import Drive, Ending, Plan
from hostel.qemu import QemuEngine, tsc
from hostel.spec import Disk, MachineSpec

pytestmark = pytest.mark.qemu
MIB = 1 << 20
MEMORY = 32 * MIB
SECONDS = 60.0

Make = Callable[..., QemuEngine]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(compile_kernel("behave", bits=32))
    return path


@pytest.fixture
def make(kernel: Path) -> Iterator[Make]:
    """An engine for a guest that behaves as its command line says; stopped at the end."""
    engines: list[QemuEngine] = []
    with Runtime() as runtime:

        def engine(
            cmdline: str = "", *, spec: dict[str, Any] | None = None, **fields: Any
        ) -> QemuEngine:
            plan = Plan(
                spec=MachineSpec(memory=MEMORY, on_reboot="stop").replace(**(spec or {})),
                engine="qemu",
                reason="a test",
                kernel=kernel,
                release="",
                initrd=None,
                cmdline=cmdline,
                disks=(),
                shares=(),
                runtime=runtime.path,
                agent=False,
                accel="tcg",
            )
            engines.append(QemuEngine(msgspec.structs.replace(plan, **fields)))
            return engines[-1]

        yield engine
        for engine_ in engines:
            engine_.stop()


@pytest.mark.parametrize(
    ("cmdline", "ending"),
    [
        ("off", Ending("poweroff")),
        ("reset", Ending("reset")),
        ("exit", Ending("debug-exit", code=0x43)),
        ("fault", Ending("crash", "triple fault")),
        ("panic reset", Ending("panic", "Kernel panic - not syncing: as told")),
        ("panic halted", Ending("panic", "Kernel panic - not syncing: as told")),
    ],
)
def test_how_it_ended(make: Make, cmdline: str, ending: Ending) -> None:
    engine = make(cmdline)
    engine.start()
    assert engine.wait(SECONDS) == ending
    assert b"hello" in engine.console.history()
    assert engine.wait() == ending


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_console_both_ways(make: Make, transport: str) -> None:
    engine = make(spec={"transport": transport})
    engine.start()
    engine.console.wait_for(b"hello", SECONDS)
    text = bytes(range(33, 127)) * 40
    engine.console.write(text)
    engine.console.wait_for(text, SECONDS)
    assert engine.wait(0) is None


def test_restart_stays_one_machine(make: Make) -> None:
    engine = make("once", spec={"on_reboot": "restart"})
    engine.start()
    engine.console.wait_for(b"hello\r\nhello", SECONDS)
    assert engine.wait(0.2) is None
    assert engine.statistics()["resets"] >= 1


@pytest.mark.parametrize("cmdline", ["panic once", "panic fault"])
def test_panic_is_no_restart(make: Make, cmdline: str) -> None:
    engine = make(cmdline, spec={"on_reboot": "restart"})
    engine.start()
    ending = engine.wait(SECONDS)
    assert ending is not None
    assert ending.kind == "panic"


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_triple_fault_is_no_restart(make: Make, transport: str) -> None:
    engine = make("fault", spec={"on_reboot": "restart", "transport": transport})
    engine.start()
    assert engine.wait(SECONDS) == Ending("crash", "triple fault")
    assert b"hello" in engine.console.history()
    assert engine.statistics()["resets"] <= 2


def test_what_only_resets_ends(make: Make) -> None:
    """As a triple fault looks where QEMU does not say so."""
    engine = make("reset", spec={"on_reboot": "restart"})
    engine.start()
    ending = engine.wait(SECONDS)
    assert ending is not None
    assert ending.kind == "crash"
    assert "reset itself 10 times in a row" in ending.detail
    assert engine.console.history().count(b"hello") >= 2  # it did start again


def test_stop_leaves_nothing(make: Make) -> None:
    make().stop()  # the helpers' own thread is there to stay
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    engine = make("flood")
    engine.start()
    engine.console.wait_for(b"0123", SECONDS)
    pid = engine.statistics()["pid"]
    assert lives(pid)
    engine.stop()
    assert not lives(pid)
    assert engine.wait(0) == Ending("stopped")
    engine.stop()
    time.sleep(0.1)
    assert threading.active_count() <= before[0] + 1  # and it
    assert len(os.listdir("/proc/self/fd")) <= before[1] + 4  # its epoll and eventfd
    left = {path.name for path in engine.plan.runtime.iterdir()}
    assert left <= {"lock", "console.log", "qemu.log"}
    with pytest.raises(MachineStopped):
        engine.console.write(b"x")


def test_ten_machines_grow_nothing(make: Make) -> None:
    def one() -> None:
        engine = make("exit")
        engine.start()
        assert engine.wait(SECONDS) is not None
        engine.stop()

    one()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        one()
    time.sleep(0.1)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_stopped_before_it_started(make: Make) -> None:
    engine = make()
    engine.stop()
    assert engine.wait(0) == Ending("stopped")
    with pytest.raises(MachineStopped):
        engine.start()


def test_killed_qemu_is_an_error_with_its_signal(make: Make) -> None:
    engine = make()
    engine.start()
    os.kill(engine.statistics()["pid"], 9)
    ending = engine.wait(SECONDS)
    assert ending is not None
    assert (ending.kind, "SIGKILL" in ending.detail) == ("error", True)


def test_disk_that_is_not_there(make: Make, tmp_path: Path) -> None:
    engine = make(disks=(Drive(Disk(path=str(tmp_path / "none.img"), format="raw")),))
    with pytest.raises(HelperError, match=r"qemu ended with 1: .*none.img.*No such file"):
        engine.start()
    assert not engine.plan.runtime.joinpath("qemu.pid").exists()


def test_disk_that_another_machine_has(make: Make, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    disks = (Drive(Disk(path=str(tmp_path / "disk.img"), format="raw")),)
    make(disks=disks).start()
    with pytest.raises(HostError) as caught:
        make(disks=disks).start()
    assert str(caught.value).startswith(
        f"disk {tmp_path}/disk.img is in use; stop the other machine"
    )


def test_what_is_no_kernel(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no kernel" * 1000)
    with pytest.raises(UserError, match="text is"):
        make(kernel=path).start()


def test_kernel_larger_than_memory(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(kernels.elf(segments=((MIB, 8, b"x"), (30 * MIB, 3 * MIB, b"x"))))
    with pytest.raises(ImageError, match=r"up to 33 MiB; the machine has 32 MiB; .*than 33 MiB"):
        make(kernel=path).start()


def test_command_line_longer_than_the_kernel_reads(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "linux"
    path.write_bytes(kernels.elf())
    with pytest.raises(SpecError, match=r"command line has 50\d\d bytes; this kernel reads 2047"):
        make("x" * 5000, kernel=path).start()


def test_initrd_larger_than_the_room(make: Make, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(MEMORY)
    with pytest.raises(SpecError, match="no room"):
        make(initrd=initrd).start()


def test_more_huge_pages_than_there_are(make: Make) -> None:
    need = int(Path("/proc/sys/vm/nr_hugepages").read_text()) + 16
    with pytest.raises(HostError, match=rf"no {need} free huge pages.*vm.nr_hugepages={need}"):
        make(spec={"memory": need << 21, "hugepages": True}).start()


@pytest.mark.parametrize("gib", [10 << 10, 999_999])
def test_more_memory_than_there_can_be(make: Make, gib: int) -> None:
    with pytest.raises(HostError, match=r"more than this host gives a guest: .*; ask for less"):
        make(spec={"memory": gib << 30}).start()


def test_memory_is_whole_mebibytes(make: Make) -> None:
    with pytest.raises(UserError, match="whole MiB"):
        make(spec={"memory": MEMORY + 4096}).start()


def test_pin_to_a_cpu_that_is_not_there(make: Make) -> None:
    with pytest.raises(SpecError, match="no pCPU 4000"):
        make(spec={"pin": (4000,)}).start()


def test_pin(make: Make) -> None:
    cpu = min(os.sched_getaffinity(0))
    engine = make(spec={"pin": (cpu,)})
    engine.start()
    pid = engine.statistics()["pid"]
    threads = [int(entry) for entry in os.listdir(f"/proc/{pid}/task")]
    assert {cpu} in [os.sched_getaffinity(thread) for thread in threads]


def test_without_qemu(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match=r"qemu-system-x86_64 is not installed.*apt-get install"):
        make().start()


KILLED = """
import sys, time
from pathlib import Path
import hostel.prepare
from hostel.host.runtime import Runtime
from hostel.host.shares import Served, share
from hostel.plan import Plan, Share
from hostel.qemu import QemuEngine, tsc
from hostel.spec import MachineSpec
runtime = Runtime("killed")
one = share(runtime.path, Served("root", Path("/"), True), memory=1 << 29)
engine = QemuEngine(Plan(
    spec=MachineSpec(memory=32 << 20), engine="qemu", reason="", kernel=Path(sys.argv[1]), release="",
    initrd=None, cmdline="", disks=(), shares=(Share("root", one.socket),), runtime=runtime.path,
    accel="tcg",
))
engine.start()
print(engine.statistics()["pid"], one.helper.pid, flush=True)
time.sleep(1000)
"""


def test_killed_hostel_leaves_no_process_and_is_swept(kernel: Path) -> None:
    with Victim(KILLED, str(kernel)) as victim:
        qemu, virtiofsd = map(int, victim.line.split())
        assert lives(qemu)
        assert lives(virtiofsd)
        victim.kill()
        assert gone_within(qemu, 1.0)
        assert gone_within(virtiofsd, 1.0)
    assert sweep() == ["killed"]


def test_rate_of_the_clock_is_steady() -> None:
    rates = [tsc.frequency_khz() or 0 for _ in range(5)]
    assert min(rates) > 100_000
    assert max(rates) - min(rates) < min(rates) / 500
