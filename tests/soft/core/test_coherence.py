"""Two cores on one memory: what one writes, the other does not go on executing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.core.translate import TranslatingCore
from hostel.soft.silicon import Reason
from hostel.soft.state import RAX, RBX
from soft.core.core_rig import Bench, PlainMmu, start_state

FUNCTION, WRITER = 0xA000, 0xB000


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        made.load("mov $1, %eax; hlt", at=FUNCTION)
        made.load("mov %bl, 0xa001; hlt", at=WRITER)
        yield made


@pytest.fixture
def second(bench: Bench) -> Iterator[TranslatingCore]:
    core = TranslatingCore(bench.physical, PlainMmu(bench.memory, bench.base))
    yield core
    core.close()


def call(bench: Bench, core: TranslatingCore) -> int:
    state = start_state(64)
    state.rip = FUNCTION
    assert core.enter(state, bench.controls).reason is Reason.HLT
    return state.gpr[RAX]


def write(bench: Bench, core: TranslatingCore, value: int) -> None:
    state = start_state(64)
    state.rip, state.gpr[RBX] = WRITER, value
    assert core.enter(state, bench.controls).reason is Reason.HLT


def test_a_store_by_another_core_is_executed(bench: Bench, second: TranslatingCore) -> None:
    for value in (2, 3, 4):
        write(bench, second, value)
        assert call(bench, bench.core) == value
        assert call(bench, second) == value
    write(bench, bench.core, 5)
    assert call(bench, second) == 5


def test_what_is_told_to_one_core_holds_for_all(bench: Bench, second: TranslatingCore) -> None:
    assert call(bench, second) == 1
    bench.memory.write(FUNCTION + 1, b"\x09")
    bench.core.wrote(bench.base + FUNCTION + 1, 1)
    assert call(bench, second) == 9


def test_a_store_through_a_page_that_may_not_be_executed(bench: Bench) -> None:
    """The second 2 MiB of linear addresses lead to the first, without the right to execute."""
    bench.memory.write_u64(0x3008, 0x87 | 1 << 63)
    bench.load("mov %bl, 0x20a001; hlt", at=WRITER)
    for value in (2, 3, 4):
        write(bench, bench.core, value)
        assert call(bench, bench.core) == value
