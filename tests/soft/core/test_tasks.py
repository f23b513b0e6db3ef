"""What the processor checks of a task switch before it exits (SDM vol. 3C §25.4.2); what the exit says."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.exceptions import GP, NP, TS
from hostel.soft.silicon import Event, EventType, Reason
from hostel.soft.state import CR0_PE, RFLAGS_NT
from soft.core.core_rig import GDT, IDT, TSS, Bench

FREE, BUSY_ONE, GATE, GONE, SHORT, SIXTEEN, PRIVATE = range(0x40, 0x78, 8)
DESCRIPTORS = {
    FREE: 0x8900_0000_0067,
    BUSY_ONE: 0x8B00_0000_0067,
    GATE: 0x8500 << 32 | FREE << 16,
    GONE: 0x0900_0000_0067,
    SHORT: 0x8900_0000_0066,
    SIXTEEN: 0x8100_0000_002B,
    PRIVATE: 0x8500 << 32 | GONE << 16,
}
BY_CALL, BY_IRET, BY_JMP, BY_IDT = range(4)
ALL = (1 << 32) - 1


def bench(code: str) -> Bench:
    made = Bench(code, bits=32)
    for selector, raw in DESCRIPTORS.items():
        made.memory.write_u64(GDT + selector, raw)
    made.state.gdtr.limit = 0x7F
    made.controls.exception_bitmap = ALL
    return made


@pytest.mark.parametrize(
    ("code", "selector", "by", "length"),
    [
        (f"lcall ${FREE}, $0", FREE, BY_CALL, 7),
        (f"ljmp ${FREE}, $0", FREE, BY_JMP, 7),
        (f"lcall ${GATE}, $0", FREE, BY_CALL, 7),
        (f"ljmp ${SIXTEEN}, $0", SIXTEEN, BY_JMP, 7),
    ],
)
def test_where_to_is_a_tss(code: str, selector: int, by: int, length: int) -> None:
    """Also through a gate: the qualification names the TSS (table 27-2)."""
    with bench(code) as made:
        exit = made.run()
        assert (exit.reason, exit.length) == (Reason.TASK_SWITCH, length)
        assert exit.qualification == by << 30 | selector
        assert made.state.rip == 0x8000


@pytest.mark.parametrize(
    ("code", "vector", "error"),
    [
        (f"lcall ${BUSY_ONE}, $0", GP, BUSY_ONE),
        (f"lcall ${GONE}, $0", NP, GONE),
        (f"lcall ${SHORT}, $0", TS, SHORT),
        (f"lcall ${PRIVATE}, $0", NP, GONE),
        (f"lcall ${FREE | 3}, $0", GP, FREE),
        ("lcall $0x80, $0", GP, 0x80),
    ],
)
def test_what_is_wrong_with_it_is_the_guests(code: str, vector: int, error: int) -> None:
    with bench(code) as made:
        exit = made.run()
        assert exit.interruption == Event(vector, EventType.HARDWARE_EXCEPTION, error)


@pytest.mark.parametrize(
    ("back", "expected"),
    [(BUSY_ONE, None), (FREE, (TS, FREE)), (BUSY_ONE | 4, (TS, BUSY_ONE | 4)), (GONE, (TS, GONE))],
)
def test_the_return_from_a_nested_task(back: int, expected: tuple[int, int] | None) -> None:
    with bench("iret") as made:
        made.memory.write_u16(TSS, back)
        made.state.rflags |= RFLAGS_NT
        exit = made.run()
        if expected is None:
            assert exit.qualification == BY_IRET << 30 | back
            return
        assert exit.interruption == Event(expected[0], EventType.HARDWARE_EXCEPTION, expected[1])


@pytest.mark.parametrize(
    ("gate", "event", "expected"),
    [
        (FREE, Event(0x40, EventType.SOFTWARE_INTERRUPT, None, 2), None),
        (FREE, Event(0x40, EventType.EXTERNAL), None),
        (BUSY_ONE, Event(0x40, EventType.SOFTWARE_INTERRUPT, None, 2), (GP, BUSY_ONE)),
        (BUSY_ONE, Event(0x40, EventType.EXTERNAL), (GP, BUSY_ONE | 1)),
        (GONE, Event(0x40, EventType.EXTERNAL), (NP, GONE | 1)),
    ],
)
def test_through_the_idt(gate: int, event: Event, expected: tuple[int, int] | None) -> None:
    with bench("nop") as made:
        assert made.state.cr0 & CR0_PE
        made.memory.write_u64(IDT + 8 * 0x40, 0x8500 << 32 | gate << 16)
        exit = made.run(event)
        assert exit.vectoring == event
        if expected is None:
            assert exit.qualification == BY_IDT << 30 | gate
            assert exit.length == event.length
            return
        assert exit.interruption == Event(expected[0], EventType.HARDWARE_EXCEPTION, expected[1])
