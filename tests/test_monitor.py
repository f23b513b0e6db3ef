"""The monitor on real KVM, with kernels of a few instructions."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest

from guests.machine import PATIENCE, POWEROFF, RESET, SPIN, machine, planned, say
from hostel.errors import HostelError, ImageError, MachineStopped, SpecError
from hostel.monitor import Monitor
from hostel.monitor.board import Board
from hostel.plan import Drive, Ending
from hostel.spec import Disk
from hostel.vmm.pci import PciBus, PciFunction

pytestmark = pytest.mark.kvm


def ending(monitor: Monitor) -> Ending:
    result = monitor.wait(PATIENCE)
    assert result is not None, "the machine did not end"
    return result


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# -- endings ----------------------------------------------------------------------------------


def test_serial_output_then_poweroff() -> None:
    with machine(say("hello\nworld") + POWEROFF) as monitor:
        assert ending(monitor) == Ending("poweroff")
        assert monitor.console.history() == b"hello\nworld"
        log = monitor.plan.runtime / "console.log"
        assert log.read_bytes() == b"hello\nworld"


@pytest.mark.parametrize(
    "how",
    [RESET, "mov $0xcf9, %dx; mov $6, %al; out %al, %dx" + SPIN],
    ids=["i8042", "reset register"],
)
def test_reset(how: str) -> None:
    with machine(how) as monitor:
        assert ending(monitor) == Ending("reset")


def test_debug_ports() -> None:
    source = "in $0xe9, %al; out %al, $0xe9; mov $0x10, %al; out %al, $0xf4" + SPIN
    with machine(source) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=33)
        assert monitor.console.history() == b"\xe9"


def test_triple_fault_is_a_crash_with_registers() -> None:
    # No IDT, so an undefined instruction is an exception without a handler, thrice.
    with machine("mov $0x1234, %eax; lidt empty; ud2; empty: .word 0; .long 0") as monitor:
        result = ending(monitor)
    assert result.kind == "crash"
    assert "\n" not in result.detail
    assert "vCPU 0: triple fault; rip=0x1000" in result.detail
    assert "rax=0x1234" in result.detail


def test_jump_into_the_void_is_a_crash() -> None:
    with machine("mov $0xd0000000, %eax; jmp *%eax") as monitor:
        result = ending(monitor)
    assert result.kind == "crash"
    assert "rip=0x" in result.detail


def test_panic_then_reset() -> None:
    text = "[    1.0] Kernel panic - not syncing: no \x1bpoint\n[    1.1] Call Trace:\n"
    with machine(say(text) + RESET, on_reboot="restart") as monitor:
        assert ending(monitor) == Ending("panic", "Kernel panic - not syncing: no point")


def test_panic_then_silence() -> None:
    text = "Kernel panic - not syncing: why\n---[ end Kernel panic - not syncing: why ]---\n"
    with machine(say(text) + SPIN) as monitor:
        assert ending(monitor) == Ending("panic", "Kernel panic - not syncing: why")


def test_words_of_a_panic_do_not_end_a_machine_that_goes_on() -> None:
    text = "Kernel panic - not syncing: why\n---[ end Kernel panic - not syncing: why ]---\n# "
    with machine(say(text) + SPIN) as monitor:
        assert monitor.wait(3) is None


# -- restart ----------------------------------------------------------------------------------

COUNT_IN_CMOS = (
    # CMOS is new at each power-on as memory is; the console is not.
    "mov $0x40, %al; out %al, $0x70; in $0x71, %al; test %al, %al; jnz 1f;"
    "cmpl $0, variable; jnz 1f; movl $1, variable;" + say("boot\n")
)


def test_reset_restarts_with_fresh_memory() -> None:
    source = f"{COUNT_IN_CMOS} {RESET}; 1: {say('dirty')} {POWEROFF}; variable: .long 0"
    with machine(source, on_reboot="restart") as monitor:
        monitor.console.wait_for(b"boot\nboot\nboot\n", PATIENCE)
        assert monitor.restarts >= 2
        monitor.stop()
        assert monitor.wait(0) == Ending("stopped")
        assert b"dirty" not in monitor.console.history()


def test_restarts_leak_nothing() -> None:
    with machine(say("up\n") + RESET, on_reboot="restart") as monitor:
        monitor.console.wait_for(b"up\n" * 3, PATIENCE)
        time.sleep(0.2)
        first = len(open_files())
        monitor.console.wait_for(b"up\n" * 20, PATIENCE)
        assert len(open_files()) <= first + 40  # one board's, being built


# -- stop and failures -------------------------------------------------------------------------


@pytest.mark.parametrize("body", [SPIN, "cli; hlt", "0: in $0x80, %al; jmp 0b"])
def test_stop_in_bounded_time(body: str) -> None:
    with machine(body) as monitor:
        time.sleep(0.1)
        start = time.monotonic()
        monitor.stop()
        assert time.monotonic() - start < 2
        monitor.stop()
        assert monitor.wait(0) == Ending("stopped")


def test_stop_with_cpus_that_wait_for_their_start() -> None:
    with machine(SPIN, cpus=4) as monitor:
        monitor.stop()
        assert monitor.wait(0) == Ending("stopped")


def test_stop_from_many_threads() -> None:
    with machine(SPIN) as monitor:
        threads = [threading.Thread(target=monitor.stop) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert ending(monitor) == Ending("stopped")


def test_nothing_is_left_open() -> None:
    with machine(POWEROFF):
        pass  # what is cached at first use
    before, threads = open_files(), threading.active_count()
    for _ in range(5):
        with machine(say("x") + POWEROFF, agent=True, cpus=2) as monitor:
            ending(monitor)
    assert open_files() == before
    assert threading.active_count() == threads


def test_a_kernel_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    with planned(SPIN) as plan:
        nonsense = tmp_path / "nonsense"
        nonsense.write_bytes(b"no kernel" * 1000)
        before = open_files()
        monitor = Monitor(msgspec.structs.replace(plan, kernel=nonsense))
        with pytest.raises(ImageError):
            monitor.start()
        monitor.stop()
        monitor = Monitor(plan)
        monitor.stop()
        with pytest.raises(MachineStopped):
            monitor.start()
        assert open_files() == before


def test_stop_while_the_devices_are_seated(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset, for the first ``start`` is waited for."""
    seat, close = Board._seat_virtio, Board.close
    closed: list[Board] = []

    def slow_seat(self: Board) -> None:
        time.sleep(0.2)
        seat(self)

    def slow_close(self: Board, ending: Ending) -> str:
        result = close(self, ending)
        time.sleep(0.2)
        closed.append(self)
        return result

    monkeypatch.setattr(Board, "_seat_virtio", slow_seat)
    monkeypatch.setattr(Board, "close", slow_close)
    with machine(RESET, on_reboot="restart") as monitor:
        deadline = time.monotonic() + PATIENCE
        while monitor.restarts < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        while (board := monitor._board) is None or monitor._report is not None:
            time.sleep(0.005)
            assert time.monotonic() < deadline
        monitor.stop()
        assert board in closed
        assert monitor.wait(0) == Ending("stopped")


def test_pinning_to_a_cpu_that_is_not_there() -> None:
    with planned(SPIN, pin=(4095,)) as plan, pytest.raises(SpecError, match="no pCPU 4095"):
        Monitor(plan).start()


def test_pinned_thread_runs_there() -> None:
    pcpu = max(os.sched_getaffinity(0))
    with machine(SPIN, pin=(pcpu,)) as monitor:
        assert monitor._board is not None
        thread = monitor._board.threads[0]
        deadline = time.monotonic() + PATIENCE
        while not thread.exits and not thread.tid and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert os.sched_getaffinity(thread.tid) == {pcpu}
        assert os.sched_getaffinity(0) != {pcpu} or os.cpu_count() == 1


def test_a_bug_in_a_device_ends_the_machine_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hostel.devices.debug import DebugConsole

    def broken(self: DebugConsole, offset: int, data: bytes) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(DebugConsole, "write", broken)
    with machine("out %al, $0xe9" + SPIN) as monitor:
        result = ending(monitor)
    assert result.kind == "error"
    assert result.detail.startswith("a bug in hostel: RuntimeError: on purpose at test_monitor.py:")


# -- exits, input, statistics ------------------------------------------------------------------


def test_unclaimed_accesses_read_as_ones_and_are_counted() -> None:
    source = (
        "mov $0x5678, %dx; in %dx, %eax; cmp $-1, %eax; jne 1f;"
        "mov 0xd0000000, %eax; cmp $-1, %eax; jne 1f;"
        "movl $0, 0xd0000004;"
        "mov $0, %al; out %al, $0xf4; 1: mov $1, %al; out %al, $0xf4"
    )
    with machine(source) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=1)
        unclaimed = monitor.statistics()["unclaimed"]
    assert unclaimed == {"ports": {"0x5678": 1}, "mmio": {"0xd0000000": 1, "0xd0000004": 1}}


def test_string_io() -> None:
    source = """
        cld; mov $0x3f8, %dx; mov $text, %esi; mov $11, %ecx; rep outsb
        mov $0xe9, %dx; mov $there, %edi; mov $16, %ecx; rep insb
        mov $0x3f8, %dx; mov $there, %esi; mov $16, %ecx; rep outsb
    """
    with machine(f'{source} {POWEROFF}; text: .ascii "hello again"; there: .skip 16') as monitor:
        ending(monitor)
        statistics = monitor.statistics()
        assert monitor.console.history() == b"hello again" + b"\xe9" * 16
    assert statistics["devices"]["debug console"] == {"reads": 16, "writes": 0}
    assert statistics["exits"][0]["PioExit"] < 11 + 16 + 16 + 1  # rep ins: many items in one exit


CONSOLE = 0xE000_0000 + (1 << 15)  # config space of the first virtio function, by ECAM


def test_reading_pci_config_space_is_no_exit() -> None:
    source = f"""
        mov $32, %ecx; mov $0xe0000000, %esi
    0:  mov (%esi), %eax; add $0x8000, %esi; dec %ecx; jnz 0b
        cmp $-1, %eax; jne 1f                                   # slot 31 is empty
        movl $-1, {CONSOLE + 0x10:#x}; mov {CONSOLE + 0x10:#x}, %eax
        cmp $0xffffc000, %eax; jne 1f                           # the BAR tells its size
        cmpl $0x10431af4, {CONSOLE:#x}; jne 1f
        mov $0, %al; out %al, $0xf4; 1: mov $1, %al; out %al, $0xf4
    """
    with machine(source) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=1)
        statistics = monitor.statistics()
    assert statistics["devices"]["pci"]["writes"] == 1
    assert statistics["devices"]["pci"]["reads"] <= 1  # this guest may come before the bus is there


def test_the_window_in_pci_config_space_reads_through() -> None:
    # virtio 1.2 §4.1.4.9: the capability of type 5 is looked for; it reads device_status, then more.
    source = f"""
        movzbl {CONSOLE + 0x34:#x}, %esi
    0:  add ${CONSOLE:#x}, %esi
        cmpb $5, 3(%esi); je 1f
        movzbl 1(%esi), %esi; jmp 0b
    1:  movb $0, 4(%esi); movl $1, 12(%esi)
        movl $0, 8(%esi); mov 16(%esi), %al; out %al, $0xe9     # the low byte of feature_select
        movl $20, 8(%esi); movb $3, 16(%esi); mov 16(%esi), %al; out %al, $0xe9
        mov $0, %al; out %al, $0xf4
    """
    with machine(source) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=1)
        assert monitor.console.history() == b"\0\3"


def test_a_guest_that_comes_early_waits_for_the_whole_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    add = PciBus.add

    def slowly(self: PciBus, function: PciFunction) -> int:
        time.sleep(0.1)
        return add(self, function)

    monkeypatch.setattr(PciBus, "add", slowly)
    rng = CONSOLE + (1 << 15)
    source = f"""
        cmpl $0x10431af4, {CONSOLE:#x}; jne 1f; cmpl $0x10441af4, {rng:#x}; jne 1f
        mov $0, %al; out %al, $0xf4; 1: mov $1, %al; out %al, $0xf4
    """
    with machine(source) as monitor:
        assert ending(monitor) == Ending("debug-exit", code=1)


ECHO = """
    mov $0x3f8, %dx
0:  add $5, %edx; 1: in %dx, %al; test $1, %al; jz 1b
    sub $5, %edx; in %dx, %al; out %al, %dx
    cmp $'q', %al; jne 0b
"""


def test_input_arrives_whole_however_much_it_is() -> None:
    sent = bytes(range(0x20, 0x71)) * 40
    with machine(ECHO + POWEROFF) as monitor:
        monitor.console.write(sent + b"q")
        assert ending(monitor).kind == "poweroff"
        assert monitor.console.history() == sent + b"q"


def test_serial_interrupt_wakes_a_halted_cpu() -> None:
    source = """
        mov $stack, %esp
        movl $handler, %eax; mov %ax, gate; movw $0x10, gate+2; movw $0x8e00, gate+4
        shr $16, %eax; mov %ax, gate+6
        lidt pointer
        mov $0x11, %al; out %al, $0x20; out %al, $0xa0
        mov $0x20, %al; out %al, $0x21; mov $0x28, %al; out %al, $0xa1
        mov $4, %al; out %al, $0x21; mov $2, %al; out %al, $0xa1
        mov $1, %al; out %al, $0x21; out %al, $0xa1
        mov $0xef, %al; out %al, $0x21; mov $0xff, %al; out %al, $0xa1
        mov $0x3f9, %dx; mov $1, %al; out %al, %dx
        mov $0x3f8, %dx; mov $'?', %al; out %al, %dx
    1:  sti; hlt; jmp 1b
    handler:
        mov $0x3f8, %dx; in %dx, %al; out %al, %dx
    """
    tables = "; .balign 8; idt: .skip 36*8; gate: .skip 8; pointer: .word 37*8-1; .long idt; .skip 64; stack:"
    with machine(source + POWEROFF + tables) as monitor:
        monitor.console.wait_for(b"?", PATIENCE)
        monitor.console.write(b"!")
        assert ending(monitor) == Ending("poweroff")
        assert monitor.console.history() == b"?!"


def test_a_flood_on_the_console_is_bounded() -> None:
    flood = (
        "mov $0x3f8, %dx; mov $text, %esi; 0: mov $text, %esi; mov $4000, %ecx; rep outsb; jmp 0b"
    )
    with machine(flood + "; text: .skip 4000, 65") as monitor:
        deadline = time.monotonic() + PATIENCE
        while monitor.console.total < 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert monitor.console.total >= 100_000
        start = time.monotonic()
        monitor.stop()
        assert time.monotonic() - start < 3


def test_statistics_of_a_running_machine() -> None:
    with machine(say("x\n") + SPIN, cpus=2) as monitor:
        monitor.console.wait_for(b"x", PATIENCE)
        start = time.monotonic()
        statistics = monitor.statistics()
        assert time.monotonic() - start < 1
    assert statistics["engine"] == "kvm"
    assert statistics["exits"][0]["PioExit"] == 2
    assert statistics["devices"]["serial"]["writes"] == 2
    assert statistics["kvm"]["vcpus"][0]["exits"] >= 2
    assert len(statistics["kvm"]["vcpus"]) == 2
    assert statistics["threads"] >= 4
    assert statistics["memory"] == 32 << 20


def test_the_agents_stream_ends_with_the_machine() -> None:
    with machine(SPIN, agent=True) as monitor:
        agent = monitor.agent
        agent.settimeout(PATIENCE)
        assert agent.family == socket.AF_UNIX
        monitor.stop()
        assert agent.recv(1) == b""
        agent.close()


def test_no_agent() -> None:
    with machine(SPIN) as monitor, pytest.raises(ValueError, match="without agent"):
        _ = monitor.agent


def test_too_many_disks_for_the_transport(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with planned(SPIN, transport="mmio") as plan:
        many = msgspec.structs.replace(
            plan, disks=(Drive(Disk(path=str(disk), read_only=True)),) * 15
        )
        with pytest.raises(HostelError, match="17 virtio devices; mmio has room for 16"):
            Monitor(many).start()


@pytest.mark.parametrize("body", [SPIN, POWEROFF])
def test_a_disk_that_cannot_be_opened_leaves_nothing(body: str, tmp_path: Path) -> None:
    """The guest runs already when its disks are opened, and may have ended by then."""
    disk = tmp_path / "disk"
    with planned(body) as plan:
        bad = msgspec.structs.replace(plan, disks=(Drive(Disk(path=str(disk))),))
        for _ in range(2):  # the first time some things are cached
            before = open_files()
            monitor = Monitor(bad)
            outcome = attempt(monitor)
            assert str(disk) in outcome or (body, outcome) == (POWEROFF, "poweroff")
            monitor.stop()
            assert monitor.wait(0) is not None
        assert not [t for t in threading.enumerate() if t.name.startswith("hostel-vcpu")]
        assert open_files() == before


def attempt(monitor: Monitor) -> str:
    try:
        monitor.start()
    except HostelError as error:
        return str(error)
    return ending(monitor).kind
