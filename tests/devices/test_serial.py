from __future__ import annotations

from collections.abc import Callable

import pytest

from hostel.devices.serial import Serial

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


class Wire:
    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, level: bool) -> None:
        self.edges += level and not self.level
        self.level = level

    def pulse(self) -> None:
        raise AssertionError("a UART's interrupt is a level")


class Port:
    """A serial port from the driver's side."""

    def __init__(self, *, later: Callable[[Serial], None] | None = None) -> None:
        self.wire = Wire()
        self.out: list[bytes] = []
        self.host_input = bytearray()
        self.uart = Serial(self.wire, self.out.append, source=self._take, later=later)

    def _take(self, limit: int) -> bytes:
        data = bytes(self.host_input[:limit])
        del self.host_input[:limit]
        return data

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)[0]

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, bytes((value,)))


@pytest.fixture
def port() -> Port:
    return Port()


def test_registers_after_reset(port: Port) -> None:
    assert [port.get(n) for n in range(8)] == [0, 0, 1, 0, 0, 0x60, 0xB0, 0]
    assert not port.wire.level


def test_scratch_and_lcr_hold_what_is_written(port: Port) -> None:
    port.put(SCR, 0xA5)
    port.put(LCR, 0x1B)
    assert (port.get(SCR), port.get(LCR)) == (0xA5, 0x1B)


def test_divisor_latch_hides_data_and_ier(port: Port) -> None:
    port.put(IER, 0x05)
    port.put(LCR, 0x80)
    port.put(DATA, 0x34)
    port.put(IER, 0x12)
    assert (port.get(DATA), port.get(IER)) == (0x34, 0x12)
    port.put(LCR, 0x03)
    assert (port.get(DATA), port.get(IER)) == (0, 0x05)
    assert port.out == []


def test_fifo_is_recognised_as_a_16550a(port: Port) -> None:
    port.put(FCR, 0x01)
    assert port.get(IIR) == 0xC1
    port.put(FCR, 0x00)
    assert port.get(IIR) == 0x01


def test_output_is_batched_by_line() -> None:
    waiting: list[Serial] = []
    port = Port(later=waiting.append)
    for byte in b"one\ntwo":
        port.put(DATA, byte)
    assert port.out == [b"one\n"]
    assert len(waiting) == 2  # one for each batch that began
    for uart in waiting:
        uart.flush()
    assert port.out == [b"one\n", b"two"]


def test_a_long_line_is_not_kept() -> None:
    port = Port(later=lambda uart: None)
    for _ in range(600):
        port.put(DATA, 0x78)
    assert port.out == [b"x" * 256, b"x" * 256]


def test_transmitter_interrupts_when_enabled_and_after_each_byte(port: Port) -> None:
    port.put(IER, 0x02)
    assert port.wire.level
    assert port.get(IIR) == 0x02
    assert not port.wire.level
    assert port.get(IIR) == 0x01
    port.put(DATA, 0x41)
    assert port.wire.level
    assert port.get(IIR) == 0x02
    port.put(IER, 0x00)
    port.put(IER, 0x02)
    assert port.get(IIR) == 0x02  # enabling it again reports the empty transmitter again
    assert port.wire.edges == 3


def test_sixteen_bytes_in_one_interrupt_raise_the_line_once(port: Port) -> None:
    port.put(FCR, 1)
    port.put(IER, 2)
    port.get(IIR)
    for byte in b"0123456789abcdef":
        port.put(DATA, byte)
    assert port.wire.edges == 2
    assert b"".join(port.out) == b"0123456789abcdef"


def test_input_is_pulled_as_the_fifo_drains(port: Port) -> None:
    port.put(FCR, 0xC1)
    port.put(IER, 0x01)
    sent = bytes(range(100))
    port.host_input += sent
    port.uart.poll_input()
    assert len(port.host_input) == 84
    assert port.get(IIR) == 0xC4
    got = bytearray()
    while port.get(LSR) & 1:
        got.append(port.get(DATA))
    assert got == sent
    assert not port.wire.level
    assert not port.get(LSR) & 2


def test_below_the_trigger_level_it_is_a_time_out(port: Port) -> None:
    port.put(FCR, 0x41)  # four bytes
    port.put(IER, 0x01)
    port.host_input += b"abc"
    port.uart.poll_input()
    assert port.get(IIR) == 0xCC
    port.host_input += b"d"
    port.uart.poll_input()
    assert port.get(IIR) == 0xC4


def test_without_fifo_one_byte_at_a_time(port: Port) -> None:
    port.host_input += b"xyz"
    port.uart.poll_input()
    assert len(port.host_input) == 2
    assert bytes(port.get(DATA) for _ in range(3)) == b"xyz"


def test_loopback_mirrors_the_modem_lines(port: Port) -> None:
    port.put(MCR, 0x10)
    port.get(MSR)
    for output, line in ((1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80)):
        port.put(MCR, 0x10 | output)
        assert port.get(MSR) & 0xF0 == line
    port.put(MCR, 0x00)
    assert port.get(MSR) & 0xF0 == 0xB0


def test_modem_deltas_and_their_interrupt(port: Port) -> None:
    port.put(MCR, 0x10)
    port.get(MSR)
    port.put(IER, 0x08)
    port.put(MCR, 0x16)  # RTS and OUT1 rise: CTS changed; RI reports its fall only
    assert port.get(IIR) == 0x00
    assert port.get(MSR) == 0x51
    assert not port.wire.level
    port.put(MCR, 0x12)
    assert port.get(MSR) == 0x14


def test_loopback_data_and_overrun(port: Port) -> None:
    port.put(FCR, 1)
    port.put(MCR, 0x10)
    port.put(IER, 0x04)
    for byte in range(17):
        port.put(DATA, byte)
    assert port.get(IIR) == 0xC6
    assert port.get(LSR) == 0x63
    assert port.get(LSR) == 0x61
    assert [port.get(DATA) for _ in range(16)] == list(range(16))
    assert port.out == []


def test_priorities(port: Port) -> None:
    port.put(FCR, 1)
    port.put(MCR, 0x10)
    port.get(MSR)
    port.put(IER, 0x0F)
    for byte in range(17):
        port.put(DATA, byte)
    port.put(MCR, 0x11)
    assert port.get(IIR) == 0xC6
    port.get(LSR)
    assert port.get(IIR) == 0xC4
    while port.get(LSR) & 1:
        port.get(DATA)
    assert port.get(IIR) == 0xC2
    assert port.get(IIR) == 0xC0
    port.get(MSR)
    assert port.get(IIR) == 0xC1
    assert not port.wire.level


def test_clearing_the_receiver(port: Port) -> None:
    port.put(FCR, 1)
    port.host_input += b"0123456789abcdefXY"
    port.uart.poll_input()
    port.put(FCR, 3)
    assert port.get(DATA) == ord("X")


def test_state_survives_save_and_load(port: Port) -> None:
    port.put(FCR, 0x81)
    port.put(IER, 0x03)
    port.put(SCR, 7)
    port.host_input += b"abc"
    port.uart.poll_input()
    other = Port()
    other.uart.load(port.uart.save())
    assert other.uart.save() == port.uart.save()
    assert other.wire.level
    assert other.get(DATA) == ord("a")


def test_reset_hands_on_what_was_written() -> None:
    port = Port(later=lambda uart: None)
    port.put(DATA, 0x21)
    port.uart.reset()
    assert port.out == [b"!"]
    assert port.uart.save() == Port().uart.save()
