"""The local APIC, from its registers (SDM vol. 3A ch. 10)."""

from __future__ import annotations

import pytest

from hostel.hypervisor import MsiMessage
from hostel.soft.irqchip import Refused
from hostel.soft.irqchip.lapic import (
    CURRENT,
    DFR,
    DIVIDE,
    EOI,
    ESR,
    ICR,
    ICR_HIGH,
    ID,
    INITIAL,
    IRR,
    ISR,
    LDR,
    LVT_TIMER,
    MSR_BASE,
    MSR_TSC_DEADLINE,
    MSR_X2APIC,
    PPR,
    SELF_IPI,
    SVR,
    TPR,
    VERSION,
)
from soft.irqchip.chips import Board

FIXED_TO = 0x4000
"""An ICR's low half: fixed, asserted, edge."""


def msi(vector: int, destination: int = 0) -> MsiMessage:
    return MsiMessage(0xFEE0_0000 | destination << 12, vector)


def in_x2apic(board: Board, id: int = 0) -> None:
    local = board.chip.lapics[id]
    local.write_msr(MSR_BASE, local.base | 1 << 10)


def test_after_reset_it_is_off() -> None:
    board = Board()
    assert board.get(0, SVR) == 0xFF
    assert board.get(0, VERSION) == 0x50014
    assert not board.chip.signal(msi(0x40))
    assert board.chip.take(0) is None


def test_highest_vector_first_and_in_service_until_eoi() -> None:
    board = Board()
    board.switch_on()
    for vector in (0x31, 0x52, 0x45):
        assert board.chip.signal(msi(vector))
    assert board.get(0, IRR + 2) == 1 << (0x52 - 64) | 1 << (0x45 - 64)
    assert board.chip.take(0) == 0x52
    assert board.get(0, ISR + 2) == 1 << (0x52 - 64)
    assert board.get(0, PPR) == 0x50
    assert board.chip.take(0) is None, "0x45 waits: its class is below what is in service"
    board.set(0, EOI, 0)
    assert board.chip.take(0) == 0x45
    board.chip.signal(msi(0x61))
    assert board.chip.take(0) == 0x61, "a higher class nests"
    board.set(0, EOI, 0)
    board.set(0, EOI, 0)
    assert board.chip.take(0) == 0x31


def test_task_priority_holds_back_its_class() -> None:
    board = Board()
    board.switch_on()
    board.set(0, TPR, 0x40)
    board.chip.signal(msi(0x4F))
    assert board.chip.take(0) is None
    board.set(0, TPR, 0x30)
    assert board.chip.take(0) == 0x4F


def test_the_task_priority_is_one_for_processor_and_register() -> None:
    board = Board()
    board.chip.lapics[0].tpr = 0x90
    assert board.get(0, TPR) == 0x90
    board.set(0, TPR, 0x5F)
    assert board.chip.lapics[0].tpr == 0x5F


def test_vectors_below_16_are_an_error() -> None:
    board = Board()
    board.switch_on()
    assert not board.chip.signal(msi(15))
    assert board.get(0, ESR) == 1 << 6
    board.set(0, ESR, 0)
    assert board.get(0, ESR) == 0


@pytest.mark.parametrize(
    ("low", "high", "receivers"),
    [
        (FIXED_TO, 2 << 24, [2]),
        (FIXED_TO, 0xFF << 24, [0, 1, 2, 3]),
        (FIXED_TO | 1 << 18, 0, [0]),
        (FIXED_TO | 2 << 18, 0, [0, 1, 2, 3]),
        (FIXED_TO | 3 << 18, 0, [1, 2, 3]),
        (FIXED_TO | 1 << 11, 0b1010 << 24, [1, 3]),
        (FIXED_TO, 9 << 24, []),
    ],
    ids=["one", "broadcast", "self", "all", "others", "logical", "nobody"],
)
def test_whom_an_ipi_reaches(low: int, high: int, receivers: list[int]) -> None:
    board = Board(4)
    board.switch_on()
    for id in range(4):
        board.set(id, LDR, 1 << id + 24)
    board.set(0, ICR_HIGH, high)
    board.set(0, ICR, low | 0x77)
    assert [id for id in range(4) if board.chip.take(id) == 0x77] == receivers
    assert board.chip.lapics[0].statistics["ipis_sent"] == 1


def test_the_cluster_model() -> None:
    board = Board(2)
    board.switch_on()
    for id, logical in ((0, 0x11), (1, 0x21)):
        board.set(id, DFR, 0x0FFF_FFFF)
        board.set(id, LDR, logical << 24)
    board.set(0, ICR_HIGH, 0x21 << 24)
    board.set(0, ICR, FIXED_TO | 1 << 11 | 0x77)
    assert [board.chip.take(id) for id in (0, 1)] == [None, 0x77]


def test_lowest_priority_is_one_of_them_in_turn() -> None:
    board = Board(3)
    board.switch_on()
    for _ in range(3):
        board.set(0, ICR, FIXED_TO | 1 << 8 | 2 << 18 | 0x60)
    assert [board.chip.take(id) for id in range(3)] == [0x60] * 3


def test_init_and_sipi() -> None:
    board = Board(2)
    board.set(0, ICR_HIGH, 1 << 24)
    board.set(0, ICR, 0xC500)
    other = board.chip.lapics[1]
    assert other.init
    other.init = False
    board.set(0, ICR, 0x8500)
    assert not other.init, "the de-assertion starts nothing"
    board.set(0, ICR, 0x4609)
    assert other.sipi == 9


def test_nmi_needs_no_enabled_apic() -> None:
    board = Board(2)
    board.set(0, ICR, 0x4400 | 3 << 18)
    assert [one.nmi for one in board.chip.lapics.values()] == [False, True]


def test_one_shot_timer() -> None:
    board = Board()
    board.switch_on()
    board.set(0, DIVIDE, 0b1011)
    board.set(0, LVT_TIMER, 0x40)
    board.set(0, INITIAL, 1000)
    assert board.chip.deadline == 1000
    board.pass_time(400)
    assert board.get(0, CURRENT) == 600
    assert board.chip.take(0) is None
    board.pass_time(600)
    assert board.chip.take(0) == 0x40
    assert board.get(0, CURRENT) == 0
    assert board.chip.deadline is None


@pytest.mark.parametrize(
    ("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_divisors(code: int, divisor: int) -> None:
    board = Board()
    board.set(0, DIVIDE, code)
    board.set(0, INITIAL, 10)
    assert board.chip.deadline == 10 * divisor


def test_periodic_timer_makes_one_tick_of_those_it_missed() -> None:
    board = Board()
    board.switch_on()
    board.set(0, DIVIDE, 0b1011)
    board.set(0, LVT_TIMER, 1 << 17 | 0x40)
    board.set(0, INITIAL, 100)
    board.pass_time(350)
    assert board.chip.take(0) == 0x40
    board.set(0, EOI, 0)
    assert board.chip.take(0) is None
    assert board.chip.deadline == 400


def test_a_masked_timer_counts_and_does_not_interrupt() -> None:
    board = Board()
    board.switch_on()
    board.set(0, DIVIDE, 0b1011)
    board.set(0, INITIAL, 100)
    board.pass_time(100)
    assert board.chip.take(0) is None
    assert board.chip.lapics[0].statistics["timer"] == 1


def test_tsc_deadline() -> None:
    board = Board()
    board.switch_on()
    local = board.chip.lapics[0]
    local.write_msr(MSR_TSC_DEADLINE, 500)
    assert local.read_msr(MSR_TSC_DEADLINE) == 0, "ignored in another mode"
    board.set(0, LVT_TIMER, 2 << 17 | 0x41)
    local.write_msr(MSR_TSC_DEADLINE, 500)
    board.set(0, INITIAL, 5)
    assert board.chip.deadline == 500
    board.pass_time(500)
    assert board.chip.take(0) == 0x41
    assert local.read_msr(MSR_TSC_DEADLINE) == 0


def test_x2apic_registers() -> None:
    board = Board(2)
    in_x2apic(board, 1)
    local = board.chip.lapics[1]
    local.write_msr(MSR_X2APIC + SVR, 0x1FF)
    assert local.read_msr(MSR_X2APIC + ID) == 1
    assert local.read_msr(MSR_X2APIC + LDR) == 2
    local.write_msr(MSR_X2APIC + SELF_IPI, 0x99)
    assert board.chip.take(1) == 0x99
    local.write_msr(MSR_X2APIC + ICR, 0 << 32 | FIXED_TO | 0x50)
    assert local.read_msr(MSR_X2APIC + ICR) == FIXED_TO | 0x50
    assert board.get(1, SVR) == 0, "the page is not there any more"


@pytest.mark.parametrize(
    ("number", "value"),
    [(ID, 1), (VERSION, 0), (LDR, 1), (DFR, 0), (EOI, 1), (TPR, 1 << 32), (0x7F, 0), (IRR, 0)],
)
def test_x2apic_refuses(number: int, value: int) -> None:
    board = Board()
    in_x2apic(board)
    with pytest.raises(Refused):
        board.chip.lapics[0].write_msr(MSR_X2APIC + number, value)


def test_x2apic_msrs_need_x2apic_mode() -> None:
    with pytest.raises(Refused):
        Board().chip.lapics[0].read_msr(MSR_X2APIC + ID)


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ([0x800, 0xC00], False),
        ([0xC00, 0x800], True),
        ([0, 0xC00], True),
        ([0xC00, 0, 0x800], False),
        ([0x400], True),
        ([0x1000_0800], True),
    ],
)
def test_which_mode_may_follow_which(path: list[int], refused: bool) -> None:
    local = Board().chip.lapics[0]
    *before, last = path
    for mode in before:
        local.write_msr(MSR_BASE, 0xFEE0_0000 | mode)
    if refused:
        with pytest.raises(Refused):
            local.write_msr(MSR_BASE, 0xFEE0_0000 + last)
    else:
        local.write_msr(MSR_BASE, 0xFEE0_0000 | last)
        assert local.base & 0xC00 == last
