"""PIC, PIT and IOAPIC, and the wires between them."""

from __future__ import annotations

import pytest

from hostel.hypervisor import GsiRoute, MsiMessage
from hostel.soft.irqchip.lapic import EOI, LVT_LINT0
from soft.irqchip.chips import Board

LEVEL = 1 << 15
SECOND = 1_000_000_000


def with_pic(mask: int = 0) -> Board:
    """Initialized as every kernel does: vectors 0x20 and 0x28."""
    board = Board()
    board.out(0x20, 0x11)
    board.out(0x21, 0x20, 4, 1, mask & 0xFF)
    board.out(0xA0, 0x11)
    board.out(0xA1, 0x28, 2, 1, mask >> 8)
    return board


def edge(board: Board, gsi: int) -> None:
    board.chip.irq_line(gsi, True)
    board.chip.irq_line(gsi, False)


def test_pic_vectors_and_priority() -> None:
    board = with_pic()
    for gsi in (12, 4, 1):
        edge(board, gsi)
    assert board.chip.take(0) == 0x21
    assert board.chip.take(0) is None, "lower ones wait for its EOI"
    board.out(0x20, 0x20)
    assert board.chip.take(0) == 0x2C, "the slave hangs on pin 2"
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    assert board.chip.take(0) == 0x24


def test_pic_masks() -> None:
    board = with_pic(mask=1 << 4)
    edge(board, 4)
    assert board.chip.take(0) is None
    board.out(0x21, 0)
    assert board.chip.take(0) == 0x24
    assert board.chip.read_port(0x21) == 0


def test_pic_reads_requests_and_services() -> None:
    board = with_pic()
    edge(board, 3)
    board.out(0x20, 0x0A)
    assert board.chip.read_port(0x20) == 8
    board.chip.take(0)
    board.out(0x20, 0x0B)
    assert board.chip.read_port(0x20) == 8
    board.out(0x20, 0x63)  # specific EOI
    assert board.chip.read_port(0x20) == 0


def test_pic_level_asks_until_the_wire_falls() -> None:
    board = with_pic()
    board.out(0x4D1, 1 << 3)
    board.chip.irq_line(11, True)
    assert board.chip.take(0) == 0x2B
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    assert board.chip.take(0) == 0x2B
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    board.chip.irq_line(11, False)
    assert board.chip.take(0) is None


def test_pic_rotates() -> None:
    board = with_pic()
    edge(board, 0)
    assert board.chip.take(0) == 0x20
    board.out(0x20, 0xA0)  # rotate on EOI: pin 0 is the lowest now
    edge(board, 0)
    edge(board, 5)
    assert board.chip.take(0) == 0x25


def test_pic_automatic_eoi() -> None:
    board = with_pic()
    board.out(0x20, 0x11)
    board.out(0x21, 0x20, 4, 3, 0)
    edge(board, 1)
    edge(board, 3)
    assert [board.chip.take(0), board.chip.take(0)] == [0x21, 0x23]


def test_a_masked_lint0_cuts_the_pic_off() -> None:
    board = with_pic()
    board.set(0, LVT_LINT0, 1 << 16)
    edge(board, 4)
    assert board.chip.take(0) is None


def test_pit_ticks_at_its_rate() -> None:
    board = with_pic()
    board.out(0x43, 0x34)
    board.out(0x40, 11932 & 0xFF, 11932 >> 8)
    for _ in range(100):
        assert board.chip.deadline is not None
        board.pass_time(board.chip.deadline - board.now)
        assert board.chip.take(0) == 0x20
        board.out(0x20, 0x20)
    assert board.now == pytest.approx(SECOND, rel=0.001)


def test_pit_one_shot() -> None:
    board = with_pic()
    board.out(0x43, 0x30)
    board.out(0x40, 100, 0)
    board.pass_time(83_000)
    assert board.chip.take(0) is None
    board.pass_time(1000)
    assert board.chip.take(0) == 0x20
    assert board.chip.deadline is None


def test_pit_latch_and_read_back() -> None:
    board = Board()
    board.out(0x43, 0x34)
    board.out(0x40, 0, 0x10)
    board.pass_time(SECOND // 1000)
    board.out(0x43, 0)
    board.pass_time(SECOND // 1000)
    low, high = board.chip.read_port(0x40), board.chip.read_port(0x40)
    assert low is not None
    assert high is not None
    assert 0x1000 - (high << 8 | low) == 1193
    board.out(0x43, 0xE2)  # status of channel 0
    assert board.chip.read_port(0x40) == 0x80 | 0x30 | 2 << 1


def test_pit_keeps_what_was_latched_first() -> None:
    """However often a guest latches: one status, then one count, then the counter as it is."""
    board = Board()
    board.out(0x43, 0x34)
    board.out(0x40, 0, 0x10)
    board.out(0x43, *[0xC2] * 1000)
    board.pass_time(SECOND // 1000)
    assert [board.chip.read_port(0x40) for _ in range(3)] == [0x80 | 0x30 | 2 << 1, 0, 0x10]
    low, high = board.chip.read_port(0x40), board.chip.read_port(0x40)
    assert (low, high) == ((0x1000 - 1193) & 0xFF, 0x1000 - 1193 >> 8)


def test_calibration_by_channel_2() -> None:
    """What kernels do: gate on, mode 0, wait for its output at port 0x61."""
    board = Board()
    board.out(0x61, 1)
    board.out(0x43, 0xB0)
    board.out(0x42, 0xFF, 0x2E)
    polls = 0
    while not (board.chip.read_port(0x61) or 0) & 0x20:
        board.pass_time(10_000)
        polls += 1
    assert board.now == pytest.approx(0x2EFF * SECOND / 1_193_182, abs=10_001)


def test_ioapic_edge() -> None:
    board = Board(2)
    board.switch_on()
    board.pin(4, 1 << 56 | 0x44)
    edge(board, 4)
    assert board.chip.take(0) is None
    assert board.chip.take(1) == 0x44
    board.set(1, EOI, 0)
    assert board.chip.take(1) is None


def test_ioapic_level_until_the_wire_falls() -> None:
    board = Board()
    board.switch_on()
    board.pin(10, LEVEL | 0x50)
    board.chip.irq_line(10, True)
    assert board.chip.take(0) == 0x50
    assert board.io_read(0x10 + 20) & 1 << 14, "remote IRR"
    assert board.chip.take(0) is None
    board.set(0, EOI, 0)
    assert board.chip.take(0) == 0x50, "still high: again"
    board.chip.irq_line(10, False)
    board.set(0, EOI, 0)
    assert board.chip.take(0) is None
    assert not board.io_read(0x10 + 20) & 1 << 14


def test_ioapic_masked_edge_is_lost_and_level_is_not() -> None:
    board = Board()
    board.switch_on()
    board.chip.irq_line(5, True)
    board.chip.irq_line(6, True)
    board.pin(5, 0x55)
    board.pin(6, LEVEL | 0x66)
    assert [board.chip.take(0), board.chip.take(0)] == [0x66, None]


def test_ioapic_identifies_itself() -> None:
    board = Board()
    assert board.io_read(1) == 0x170020
    board.io(0, 0xFFFF_FFFF)
    assert board.io_read(0) == 0x0F00_0000
    assert board.io_read(0x3F) == 0
    assert board.io_read(0x40) == 0, "no such pin"


def test_the_pit_is_pin_2_of_the_ioapic() -> None:
    board = Board()
    board.switch_on()
    board.pin(2, 0x30)
    edge(board, 0)
    assert board.chip.take(0) == 0x30


def test_routes_to_messages() -> None:
    board = Board()
    board.switch_on()
    board.chip.set_routes([GsiRoute(30, MsiMessage(0xFEE0_0000, 0x71))])
    edge(board, 30)
    edge(board, 4)
    assert [board.chip.take(0), board.chip.take(0)] == [0x71, None]


def test_ports_and_pages_of_others() -> None:
    board = Board()
    assert board.chip.read_port(0x3F8) is None
    assert not board.chip.write_port(0x3F8, 0)
    assert board.chip.read_mmio(0, 0xFED0_0000, 4) is None
    assert not board.chip.write_mmio(0, 0xFED0_0000, bytes(4))
