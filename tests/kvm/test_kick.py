"""Kicks: none is lost, whenever it comes and whoever sends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from guests.tiny import TinyGuest
from hostel.hypervisor import Exit, HaltExit, Interrupted, PioExit
from hostel.kvm.kick import kick_signal

pytestmark = pytest.mark.kvm
PATIENCE = 10.0


@pytest.fixture
def spinning() -> Iterator[TinyGuest]:
    with TinyGuest("loop: inc %rax; jmp loop") as guest:
        yield guest


def in_thread(work: Callable[[], Exit]) -> tuple[threading.Thread, list[Exit]]:
    result: list[Exit] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    return thread, result


def test_a_kick_ends_a_running_guest(spinning: TinyGuest) -> None:
    thread, result = in_thread(spinning.run)
    time.sleep(0.02)
    spinning.vcpu.kick()
    thread.join(PATIENCE)
    assert result == [Interrupted()]
    assert spinning.vcpu.get_regs().rax > 0


def test_a_kick_before_the_first_run_is_kept(spinning: TinyGuest) -> None:
    spinning.vcpu.kick()
    assert spinning.run() == Interrupted()
    assert spinning.vcpu.get_regs().rax == 0


def test_a_kick_between_runs_is_kept_and_counts_once() -> None:
    with TinyGuest("out %al, $0x10; out %al, $0x11; hlt") as guest:
        assert isinstance(guest.run(), PioExit)
        guest.vcpu.kick()
        guest.vcpu.kick()
        assert guest.run() == Interrupted()
        exit = guest.run()
        assert isinstance(exit, PioExit)
        assert exit.port == 0x11


def test_a_kick_does_not_lose_the_value_of_a_read() -> None:
    with TinyGuest("in $0x10, %al; hlt") as guest:
        exit = guest.run()
        assert isinstance(exit, PioExit)
        exit.data[:] = b"\x5a"
        guest.vcpu.kick()
        assert guest.run() == Interrupted()
        assert isinstance(guest.run(), HaltExit)
        assert guest.vcpu.get_regs().rax & 0xFF == 0x5A


def test_kicks_at_random_moments_all_arrive(spinning: TinyGuest) -> None:
    """The sender waits for each answer: a lost kick would leave the guest spinning for ever."""
    answered = threading.Semaphore(0)
    rounds = 300

    def serve() -> None:
        for _ in range(rounds):
            assert spinning.run() == Interrupted()
            answered.release()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    for number in range(rounds):
        time.sleep(number % 7 * 20e-6)
        spinning.vcpu.kick()
        assert answered.acquire(timeout=PATIENCE), f"kick {number} was lost"
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_thread_with_blocked_signals_is_kicked_too(spinning: TinyGuest) -> None:
    def run_blocked() -> Exit:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return spinning.run()

    thread, result = in_thread(run_blocked)
    time.sleep(0.02)
    spinning.vcpu.kick()
    thread.join(PATIENCE)
    assert result == [Interrupted()]


def test_a_kick_after_the_thread_has_ended_does_no_harm(spinning: TinyGuest) -> None:
    spinning.vcpu.kick()
    thread, _ = in_thread(spinning.run)
    thread.join(PATIENCE)
    spinning.vcpu.kick()
    assert spinning.run() == Interrupted()  # in another thread now


def test_a_kick_of_a_closed_vcpu_does_nothing(spinning: TinyGuest) -> None:
    spinning.close()
    spinning.vcpu.kick()
    assert spinning.vcpu.fd == -1


def test_the_signal_is_a_real_time_signal_that_python_does_not_handle() -> None:
    number = kick_signal()
    assert signal.SIGRTMIN < number < signal.SIGRTMAX
    signal.raise_signal(number)  # the default action would end this process
    assert kick_signal() == number


def test_a_halted_vcpu_in_the_kernel_is_kicked() -> None:
    with TinyGuest("hlt", irqchip=True) as guest:  # the in-kernel LAPIC waits in HLT
        thread, result = in_thread(guest.run)
        time.sleep(0.02)
        assert result == []
        guest.vcpu.kick()
        thread.join(PATIENCE)
        assert result == [Interrupted()]


def test_an_application_processor_that_waits_for_its_start_is_kicked() -> None:
    with TinyGuest("hlt", irqchip=True) as guest:
        other = guest.add_vcpu()
        thread, result = in_thread(other.run)
        time.sleep(0.02)
        other.kick()
        thread.join(PATIENCE)
        assert result == [Interrupted()]
