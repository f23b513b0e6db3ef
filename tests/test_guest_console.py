from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hostel import console as module
from hostel.console import Console
from hostel.errors import MachineStopped, MachineTimeout


def test_history_is_bounded() -> None:
    console = Console(history=1000)
    for n in range(1000):
        console.feed(b"%07d\n" % n)
        assert len(console._history) <= 1125 + 8
    assert console.history() == b"".join(b"%07d\n" % n for n in range(875, 1000))
    assert console.total == 8000


def test_tail_is_safe_to_print() -> None:
    console = Console()
    console.feed(
        b"first\r\n\r\n\x1b[2J\x1b]0;evil title\x07\x1b[31mred\x1b[0m\tx\x00\x9b\r\nla\xc2\x9bst \xff"
    )
    assert console.tail() == "first\nred x�\nlast �"
    assert console.tail(1) == "last �"


def test_tail_limits_the_length_of_lines() -> None:
    console = Console()
    console.feed(b"x" * 100_000)
    assert len(console.tail()) == 400


def test_subscribers_in_order_with_replay() -> None:
    console = Console()
    console.feed(b"a")
    got: list[bytes] = []
    cancel = console.subscribe(got.append, replay=True)
    console.feed(b"b")
    cancel()
    cancel()
    console.feed(b"c")
    assert got == [b"a", b"b"]


def test_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT", 10)
    console = Console(log=tmp_path / "console.log")
    for _ in range(5):
        console.feed(b"1234")
    console.close()
    console.close()
    assert (tmp_path / "console.log").read_bytes() == b"1234123412"


def test_a_full_disk_does_not_end_the_machine() -> None:
    Console(log=Path("/no/such/folder/console.log")).feed(b"no log")
    console = Console(log=Path("/dev/full"))
    console.feed(b"still here")
    assert console.history() == b"still here"


def test_input_is_held_until_taken() -> None:
    console = Console()
    woken: list[int] = []
    console.on_input = lambda: woken.append(1)
    console.write(b"hello")
    assert woken == [1]
    assert console.take(3) == b"hel"
    assert console.take(16) == b"lo"
    assert console.take(16) == b""


def test_write_waits_for_a_guest_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INPUT_LIMIT", 4)
    console = Console()
    writer = threading.Thread(target=console.write, args=(b"0123456789",))
    writer.start()
    writer.join(0.1)
    assert writer.is_alive()
    got = b""
    while len(got) < 10:
        got += console.take(3)
    writer.join(5)
    assert not writer.is_alive()
    assert got == b"0123456789"


def test_close_wakes_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INPUT_LIMIT", 4)
    console = Console()
    threading.Timer(0.05, console.close).start()
    with pytest.raises(MachineStopped):
        console.write(b"0123456789")


def test_wait_for() -> None:
    console = Console()
    threading.Timer(0.05, console.feed, (b"login: ",)).start()
    console.wait_for(b"login:", 5)
    with pytest.raises(MachineTimeout, match="no b'never' on the console"):
        console.wait_for(b"never", 0.02)
    console.close()
    with pytest.raises(MachineStopped) as caught:
        console.wait_for(b"never", 5)
    assert caught.value.console == "login:"
