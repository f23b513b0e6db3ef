from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from hostel.vmm.loop import EventLoop


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def loop(errors: list[Exception]) -> Iterator[EventLoop]:
    loop = EventLoop(errors.append)
    loop.start()
    yield loop
    loop.stop()


def test_reads_are_reported(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    got, done = bytearray(), threading.Event()

    def on_ready() -> None:
        got.extend(os.read(reader, 1))
        if len(got) == 3:
            done.set()

    loop.add(reader, on_ready)
    os.write(writer, b"abc")
    assert done.wait(5)
    assert got == b"abc"
    loop.remove(reader)
    loop.remove(reader)
    os.close(reader)
    os.close(writer)


def test_an_edge_is_reported_once_and_need_not_be_read(loop: EventLoop) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    calls: list[int] = []
    os.eventfd_write(event, 1)
    loop.add(event, lambda: calls.append(1), edge=True)
    for turn in range(1, 4):
        for _ in range(5):
            loop.run_sync(lambda: None)
        assert len(calls) == turn
        os.eventfd_write(event, 1)
    loop.remove(event)
    os.close(event)


def test_write_interest_can_be_switched(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    writable = threading.Event()

    def on_ready() -> None:
        loop.modify(writer, read=False)
        writable.set()

    loop.add(writer, on_ready, read=False)
    assert not writable.wait(0.05)
    loop.modify(writer, read=False, write=True)
    assert writable.wait(5)
    loop.remove(writer)
    os.close(reader)
    os.close(writer)


def test_call_soon_runs_in_order_on_the_loop(loop: EventLoop) -> None:
    seen: list[tuple[int, str]] = []
    for n in range(100):
        loop.call_soon(lambda n=n: seen.append((n, threading.current_thread().name)))  # type: ignore[misc]
    loop.run_sync(lambda: None)
    assert seen == [(n, "hostel-loop") for n in range(100)]


def test_call_later_keeps_time_and_order(loop: EventLoop) -> None:
    seen: list[tuple[str, float]] = []
    done, start = threading.Event(), time.monotonic()
    loop.call_later(0.1, lambda: seen.append(("late", time.monotonic())))
    loop.call_later(0.1, done.set)
    loop.call_later(0.02, lambda: seen.append(("early", time.monotonic())))
    assert done.wait(5)
    assert [name for name, _ in seen] == ["early", "late"]
    assert seen[0][1] - start >= 0.02
    assert seen[1][1] - start >= 0.1


def test_error_is_reported_and_the_loop_goes_on(loop: EventLoop, errors: list[Exception]) -> None:
    loop.call_soon(lambda: [1].remove(2))
    ran = threading.Event()
    loop.call_soon(ran.set)
    assert ran.wait(5)
    assert [type(error) for error in errors] == [ValueError]


def test_callback_may_remove_another_in_the_same_round(loop: EventLoop) -> None:
    pipes = [os.pipe() for _ in range(2)]
    calls: list[int] = []

    def on_ready(n: int) -> None:
        calls.append(n)
        for reader, _ in pipes:
            loop.remove(reader)

    def prepare() -> None:
        for n, (reader, writer) in enumerate(pipes):
            os.write(writer, b"x")
            loop.add(reader, lambda n=n: on_ready(n))  # type: ignore[misc]

    loop.run_sync(prepare)
    for _ in range(3):
        loop.run_sync(lambda: None)
    assert len(calls) == 1
    for ends in pipes:
        for fd in ends:
            os.close(fd)


def test_stop_is_idempotent_and_leaks_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    loop = EventLoop()
    loop.start()
    loop.stop()
    loop.stop()
    loop.call_soon(lambda: None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_stop_from_the_loop_itself() -> None:
    loop = EventLoop()
    loop.start()
    loop.call_soon(loop.stop)
    loop._thread.join(5)
    assert not loop._thread.is_alive()
    loop.stop()


def test_a_loop_that_never_ran_can_be_stopped() -> None:
    loop = EventLoop()
    called: list[int] = []
    loop.run_sync(lambda: called.append(1))
    loop.stop()
    assert called == [1]


def test_in_a_thread_that_is_there_already() -> None:
    loop = EventLoop()
    threads: list[threading.Thread] = []
    loop.call_soon(lambda: threads.append(threading.current_thread()))
    loop.call_soon(loop.stop)
    loop.run()
    assert threads == [threading.current_thread()]


def test_what_a_callback_raises_ends_run() -> None:
    loop = EventLoop()
    loop.call_soon(lambda: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.run()
    loop.stop()
