"""The engine under the core: blocks without end, and its end."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.errors import HostError, MachineStopped
from hostel.soft.core import engine
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Access, Controls, Pin, Reason, Translation
from hostel.soft.state import RAX, RCX, CpuState
from soft.core.core_rig import Bench

# A hundred blocks that follow one another; each has an instruction that is replaced.
CHAIN = "".join(
    f"inc %rax; rdtsc; mov %rcx, %rax; inc %rcx; jmp {n}f; {n}: " for n in range(1, 100)
)


def test_when_the_room_for_blocks_is_full_they_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_FULL", 1 << 14)
    forgotten: list[int] = []
    with Bench(CHAIN + "cpuid; jmp 0x8000") as bench:
        real = bench.core.engine.forget_blocks

        def forget() -> None:
            forgotten.append(1)
            real()

        monkeypatch.setattr(bench.core.engine, "forget_blocks", forget)
        for _ in range(3):
            bench.state.rip = 0x8000
            assert bench.run().reason is Reason.CPUID
        assert bench.state.gpr[RCX] == 3 * 99
        assert bench.core.statistics.instructions == 3 * 99 * 5
    assert forgotten


def test_a_closed_core_says_so() -> None:
    with Bench("hlt") as bench:
        bench.core.close()
        bench.core.close()
        bench.core.flush()
        with pytest.raises(MachineStopped):
            bench.run()


def test_memory_that_comes_later_is_mapped() -> None:
    from hostel.memory import GuestMemory

    with Bench("mov %eax, (%rbx); hlt") as bench, GuestMemory(4096) as more:
        (span,) = bench.physical.attach(more)
        seen = [each.hpa for each in bench.core.engine._spans]
        assert span.hpa in seen


def test_many_cores_live_side_by_side() -> None:
    with PhysicalMemory(64):
        benches = [Bench("inc %rax; hlt") for _ in range(4)]
        try:
            for turn in range(1, 4):
                for bench in benches:
                    bench.state.rip = 0x8000
                    assert bench.run().reason is Reason.HLT
                    assert bench.state.gpr[RAX] == turn
        finally:
            for bench in benches:
                bench.close()


def test_the_same_guest_gives_the_same_trace() -> None:
    def trace() -> list[tuple[int, int, int]]:
        seen: list[tuple[int, int, int]] = []
        with Bench("1: cpuid; div %esi; jmp 1b") as bench:
            bench.handlers("addq $2, (%rsp); iretq", 0)
            bench.controls.pin, bench.controls.timer = Pin.PREEMPTION_TIMER, 333
            for _ in range(20):
                exit = bench.run()
                seen.append((exit.reason, bench.state.rip, bench.core.statistics.instructions))
                bench.skip(exit)
        return seen

    assert trace() == trace()


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (0x8000, "hlt"),
        (0x20000, "mov 0x20000, %eax; hlt"),
        (0x20000, "mov %eax, 0x20000; 1: jmp 1b"),
    ],
)
def test_a_translation_to_where_no_memory_is_is_the_hosts_mistake(page: int, code: str) -> None:
    """Of code, of what is read and of what is written."""
    with Bench(code) as bench:
        real = bench.mmu.translate

        def lost(
            state: CpuState, controls: Controls, address: int, access: Access, user: bool
        ) -> Translation:
            if address & ~0xFFF == page:
                return Translation(1 << 38, True, True)
            return real(state, controls, address, access, user)

        bench.core.mmu.translate = lost  # type: ignore[method-assign]
        with pytest.raises(HostError, match="no memory"):
            bench.run()
