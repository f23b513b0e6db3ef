"""Record and replay: what was typed, the time of day, sleeping; a machine that is another; a log that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guests.machine import PATIENCE, RESET, SPIN, machine, planned
from hostel.errors import HostelError, SpecError, UserError
from hostel.monitor import Monitor
from hostel.plan import Ending
from hostel.soft import mini
from hostel.soft.record import log
from hostel.spec import Disk, MachineSpec, Soft

WAYS = [Soft(), Soft(paging="shadow", trap="intercept")]

# Sleeps; says each byte that is typed, how many of the PIT's ticks there were, and the RTC's second.
LISTEN = """
    mov $stack, %esp; lidt idtr
    mov $on_tick, %eax; mov %ax, tick; shr $16, %eax; mov %ax, tick + 6
    mov $on_key, %eax; mov %ax, key; shr $16, %eax; mov %ax, key + 6
    mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21
    mov $4, %al; out %al, $0x21; mov $1, %al; out %al, $0x21; mov $0xee, %al; out %al, $0x21
    mov $0x34, %al; out %al, $0x43; mov $0xff, %al; out %al, $0x40; out %al, $0x40
    mov $0x3fa, %dx; mov $1, %al; out %al, %dx
    mov $0x3fc, %dx; mov $8, %al; out %al, %dx
    mov $0x3f9, %dx; mov $1, %al; out %al, %dx
    mov $'>', %al; out %al, $0xe9
1:  sti; hlt; jmp 1b
on_tick: push %eax; incl ticks; mov $0x20, %al; out %al, $0x20; pop %eax; iret
on_key: pusha
2:  mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 3f
    mov $0x3f8, %dx; in %dx, %al; out %al, $0xe9; mov %al, %bl
    mov ticks, %eax; and $15, %al; add $'A', %al; out %al, $0xe9
    xor %al, %al; out %al, $0x70; in $0x71, %al; out %al, $0xe9
    cmp $'q', %bl; jne 2b; mov $7, %al; out %al, $0xf4
3:  mov $0x20, %al; out %al, $0x20; popa; iret
    .balign 8
idt: .fill 0x20, 8, 0
tick: .word 0, 0x10, 0x8e00, 0
    .fill 3, 8, 0
key: .word 0, 0x10, 0x8e00, 0
idtr: .word 0x25 * 8 - 1; .long idt
ticks: .long 0
    .fill 256, 1, 0
stack:
"""


@contextmanager
def made(source: str, soft: Soft, **given: Any) -> Iterator[Monitor]:
    with machine(source, engine="soft", soft=soft, **given) as monitor:
        yield monitor


def recording(soft: Soft, path: Path) -> Soft:
    return msgspec.structs.replace(soft, record=str(path))


def replaying(soft: Soft, path: Path) -> Soft:
    return msgspec.structs.replace(soft, replay=str(path))


def replay(source: str, soft: Soft, path: Path, **given: Any) -> tuple[Ending | None, bytes]:
    with made(source, replaying(soft, path), **given) as monitor:
        ending = monitor.wait(PATIENCE)
        return ending, monitor.console.history()


@pytest.mark.parametrize("soft", WAYS, ids=["ept-translate", "shadow-intercept"])
def test_what_was_typed(soft: Soft, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with made(LISTEN, recording(soft, path)) as monitor:
        monitor.console.wait_for(b">", PATIENCE)
        for word in (b"a", b"some words at once, more than its FIFO takes", b"b", b"q"):
            monitor.console.write(word)
            time.sleep(0.05)
        ended, said = monitor.wait(PATIENCE), monitor.console.history()
    assert ended == Ending("debug-exit", code=15)
    kinds = {entry.kind for entry in log.read(path).entries}
    assert kinds >= {"on", "idle", "input", "typed", "clock", "off"}
    for _ in range(2):
        begun = time.monotonic()
        assert replay(LISTEN, soft, path) == (ended, said)
        assert time.monotonic() - begun < PATIENCE / 2  # it does not sleep


def test_who_types_during_a_replay_is_not_heard(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with made(LISTEN, recording(Soft(), path)) as monitor:
        monitor.console.write(b"q")
        ended, said = monitor.wait(PATIENCE), monitor.console.history()
    with made(LISTEN, replaying(Soft(), path)) as monitor:
        monitor.console.write(b"zzz")
        assert (monitor.wait(PATIENCE), monitor.console.history()) == (ended, said)


def test_a_machine_of_several_vcpus(tmp_path: Path) -> None:
    path, traces = tmp_path / "log", (tmp_path / "one", tmp_path / "other")
    kernel = mini.image("migrate", cpus=4)
    for how, file in zip((Soft(record=str(path)), Soft(replay=str(path))), traces, strict=True):
        soft = msgspec.structs.replace(how, trace=str(file))
        with planned("", engine="soft", soft=soft, cpus=4) as plan:
            monitor = Monitor(msgspec.structs.replace(plan, kernel=kernel))
            try:
                monitor.start()
                assert monitor.wait(PATIENCE) == Ending("debug-exit", code=1)
            finally:
                monitor.stop()
    assert traces[0].read_text() == traces[1].read_text()


@pytest.mark.parametrize("source", ["cli" + SPIN, LISTEN], ids=["spins", "sleeps"])
def test_a_machine_that_was_stopped_stops_there_again(source: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with made(source, recording(Soft(), path), cpus=2) as monitor:
        time.sleep(0.1)
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 2
    assert replay(source, Soft(), path, cpus=2)[0] == Ending("stopped")


def test_a_triple_fault(tmp_path: Path) -> None:
    path, source = tmp_path / "log", "lidt none; int3; none: .word 0; .long 0"
    with made(source, recording(Soft(), path)) as monitor:
        ended = monitor.wait(PATIENCE)
    assert ended is not None
    assert ended.kind == "crash"
    assert replay(source, Soft(), path)[0] == ended


def test_resets(tmp_path: Path) -> None:
    """Each power-on is in the log."""
    path = tmp_path / "log"
    source = (
        "mov $8, %al; out %al, $0x70; in $0x71, %al"  # nothing but a question
        "; mov $0x90, %al; out %al, $0x70; in $0x71, %al; out %al, $0xe9" + RESET
    )
    with made(source, recording(Soft(), path), on_reboot="restart") as monitor:
        while monitor.restarts < 3:
            time.sleep(0.01)
    said = monitor.console.history()
    assert replay(source, Soft(), path, on_reboot="restart") == (Ending("stopped"), said)
    assert [entry.kind for entry in log.read(path).entries].count("on") >= 3


@pytest.mark.parametrize("source", [RESET, "; lidt none; int3; none: .word 0; .long 0"])
def test_a_stop_that_came_before_the_guests_own_ending(source: str, tmp_path: Path) -> None:
    """In the same slice: it is let run to its end."""
    path = tmp_path / "log"
    slow = "mov $'>', %al; out %al, $0xe9; mov $4000000, %ecx; 1: dec %ecx; jnz 1b"
    with made(slow + source, recording(Soft(), path)) as monitor:
        monitor.console.wait_for(b">", PATIENCE)
        monitor.stop()
        assert monitor.wait(0) == Ending("stopped")
    last = log.read(path).entries[-1]
    assert last.instructions > 8_000_000  # it did get to its ending
    assert replay(slow + source, Soft(), path) == (Ending("stopped"), b">")


def test_who_stopped_it_is_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with made("cli; hlt", recording(Soft(), path)) as monitor:
        time.sleep(0.1)
        monitor.stop(124)
        ended = monitor.wait(0)
    assert ended is not None
    assert (ended.kind, ended.code) == ("stopped", 124)
    assert replay("cli; hlt", Soft(), path)[0] == ended


def test_a_stop_between_two_power_ons_keeps_its_code() -> None:
    """Nearly always there is no board when it comes: the guest does nothing but reset."""
    for _ in range(4):
        with made(RESET, Soft(), on_reboot="restart") as monitor:
            while monitor.restarts < 3:
                time.sleep(0.001)
            monitor.stop(124)
            ended = monitor.wait(0)
        assert ended is not None
        assert (ended.kind, ended.code) == ("stopped", 124)


# -- what is not the same ---------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    with made(LISTEN, recording(Soft(), path)) as monitor:
        monitor.console.wait_for(b">", PATIENCE)
        while not monitor.statistics()["soft"]["vcpus"][0].get("hlt"):
            time.sleep(0.001)
        monitor.console.write(b"a")
        monitor.console.wait_for(b"a", PATIENCE)
        monitor.console.write(b"q")
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=15)
    return path


def sealed(lines: list[bytes]) -> bytes:
    """A log of these lines that nobody sees was changed."""
    text = b"".join(lines)
    return text + b"seal " + blake2b(text).hexdigest().encode() + b"\n"


def change(path: Path, old: bytes, new: bytes) -> None:
    """In the log's first entry that has ``old``."""
    lines = path.read_bytes().splitlines(keepends=True)[:-1]
    at = next(at for at, line in enumerate(lines) if old in line)
    lines[at] = lines[at].replace(old, new)
    path.write_bytes(sealed(lines))


CHANGES: list[tuple[bytes, bytes, str]] = [
    (b'"typed","a"', b'"typed","b"', "its turns or its writes to devices until here were others"),
    (b'"typed","a"', b'"typed",3', "it typed 3 where the serial port has room for"),
    (b'"typed","a"', b'"clock",3', "it has 'clock' where this one asks for 'typed'"),
    (b'"code":15', b'"code":13', "it ended by debug-exit 13, this one by debug-exit 15"),
    (b'"vcpus":["', b'"vcpus":["f', "it left vCPU 0 with other registers"),
    (b',"memory":"', b',"memory":"f', "it left other bytes in memory"),
    (b'"kind":"debug-exit"', b'"kind":"poweroff"', "it ended by poweroff"),
    (b'"idle",', b'"idle",-', "it has -"),
]


@pytest.mark.parametrize(("old", "new", "words"), CHANGES)
def test_a_replay_that_leaves_the_log(recorded: Path, old: bytes, new: bytes, words: str) -> None:
    change(recorded, old, new)
    ending, _ = replay(LISTEN, Soft(), recorded)
    assert ending is not None
    assert ending.kind == "error"
    assert "the replay leaves the log at instruction " in ending.detail
    assert words in ending.detail


def test_entries_that_are_missing(recorded: Path) -> None:
    lines = recorded.read_bytes().splitlines(keepends=True)[:-1]
    recorded.write_bytes(sealed(lines[:-1]))
    ending, _ = replay(LISTEN, Soft(), recorded)
    assert ending is not None
    assert "it ends before" in ending.detail or "it went on" in ending.detail
    recorded.write_bytes(sealed(lines[:1]))
    assert "it has no further power-on" in refused(lambda: replay(LISTEN, Soft(), recorded))


def test_a_log_that_was_changed(recorded: Path) -> None:
    recorded.write_bytes(recorded.read_bytes().replace(b'"typed","a"', b'"typed","b"'))
    assert "was changed after it was recorded" in refused(lambda: replay(LISTEN, Soft(), recorded))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no log of a machine"),
        (b"\xff\n", "is no log of a machine"),
        (b'{"format":1,"spec":{}}\n', "has no end: its recording was cut off"),
        (b'{"format":2,"spec":{}}\n', "is of format 2, this hostel's is 1"),
        (sealed([b'{"format":1,"spec":{}}\n', b"[1]\n"]), "is no log of a machine"),
    ],
)
def test_what_is_no_log(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "log").write_bytes(data)
    assert words in refused(lambda: log.read(tmp_path / "log"))


def test_another_machine(recorded: Path) -> None:
    words = refused(lambda: replay(LISTEN, Soft(), recorded, cpus=2))
    assert "the log is of a machine with another cpus: 1, not 2" in words
    words = refused(lambda: replay(LISTEN + "nop", Soft(), recorded))
    assert "its memory differs at power-on" in words


def refused(do: Callable[[], object]) -> str:
    with pytest.raises(HostelError) as raised:
        do()
    return str(raised.value)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(SpecError, match="a machine with a disk cannot be recorded"):
        MachineSpec(engine="soft", soft=Soft(record="x"), disks=(Disk(path="x"),))
    with pytest.raises(SpecError, match="recorded or replayed, not both"):
        MachineSpec(engine="soft", soft=Soft(record="x", replay="y"))
    with pytest.raises(SpecError, match="words of engine soft"):
        MachineSpec(engine="kvm", soft=Soft(record="x"))


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "none" / "log"
    with (
        pytest.raises(UserError, match="cannot be written: No such file"),
        made(SPIN, recording(Soft(), path)),
    ):
        pass


def test_a_full_disk() -> None:
    words = refused(lambda: made(SPIN, recording(Soft(), Path("/dev/full"))).__enter__())
    assert words == "the log /dev/full cannot be written: No space left on device"


def test_a_recording_that_is_killed_is_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with made(LISTEN, recording(Soft(), path)) as monitor:
        monitor.console.wait_for(b">", PATIENCE)
        so_far = path.read_bytes()
    path.write_bytes(so_far)
    assert "has no end: its recording was cut off" in refused(lambda: log.read(path))


def test_a_slice_that_does_not_end_is_cut(tmp_path: Path) -> None:
    """Each instruction of it is Python's work for the core: the slice would take longer than a stop may."""
    path = tmp_path / "log"
    source = "0: mov %cr3, %eax; mov %eax, %cr3; jmp 0b"
    with made(source, recording(Soft(), path)) as monitor:
        time.sleep(0.1)
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 4
    assert monitor.wait(0) == Ending("stopped")
    last = log.read(path).entries[-1].value
    assert isinstance(last, log.End)
    assert last.vcpus == ()


def test_a_replay_can_be_stopped(tmp_path: Path) -> None:
    path, source = tmp_path / "log", "cli" + SPIN
    with made(source, recording(Soft(), path)) as monitor:
        time.sleep(0.5)
    with made(source, replaying(Soft(), path)) as monitor:
        monitor.stop()
        assert monitor.wait(0) == Ending("stopped")
