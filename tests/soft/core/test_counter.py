"""Blocks that count by themselves: to one instruction, whatever they look like, and without Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

import hostel
from hostel.soft.core import counter
from hostel.soft.core.counter import Block, Counter
from hostel.soft.silicon import Pin, Reason
from hostel.soft.state import RAX
from soft.core.core_rig import PML4, Bench
from soft.core.svm_rig import SvmGuest

LOOP = """
    mov $1000, %ecx
1:  push %rax
    call 2f
    pop %rdx
    dec %ecx
    jnz 1b
    hlt
2:  inc %rax
    ret
"""
OF_LOOP = 1 + 1000 * 7
"""Instructions, without HLT."""
BLOCKS = 8


class Asked:
    """How often blocks of a core asked Python."""

    def __init__(self, of: Counter) -> None:
        self.times = 0
        self._meet, of._meet = of._meet, self

    def __call__(self, block: Block) -> int:
        self.times += 1
        return self._meet(block)


def place(bench: Bench, linear: int) -> int:
    """Where in memory that address is: 2 MiB there are mapped, if they are not."""
    if linear < bench.memory.size:
        return linear
    memory, pdpt, pd = bench.memory, 0x300000, 0x301000
    at = PML4 + 8 * (linear >> 39 & 511)
    if not memory.read_u64(at):
        memory.write_u64(at, pdpt | 7)
    memory.write_u64((memory.read_u64(at) & ~0xFFF) + 8 * (linear >> 30 & 511), pd | 7)
    memory.write_u64(pd + 8 * (linear >> 21 & 511), 0x20_0000 | 0x87)
    return 0x20_0000 | linear & 0x1F_FFFF


@pytest.mark.parametrize(
    "linear", [0x8000, 0, 0x7EAD_F000, 0xDEAD_F000, 0x7FFF_FFE0_0000, 0xFFFF_8000_0020_0FFE]
)
def test_a_block_asks_once_wherever_it_is(linear: int) -> None:
    with Bench() as bench:
        asked = Asked(bench.core.engine._counter)
        bench.load(LOOP, at=place(bench, linear))
        bench.state.rip = linear
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] == 1000
        assert bench.core.statistics.instructions == OF_LOOP
        assert asked.times <= BLOCKS


@pytest.mark.parametrize("bits", [16, 32])
def test_so_in_other_modes(bits: int) -> None:
    code = LOOP.replace("%r", "%e")
    with Bench(code, bits=bits) as bench:  # type: ignore[arg-type]
        asked = Asked(bench.core.engine._counter)
        assert bench.run().reason is Reason.HLT
        assert bench.core.statistics.instructions == OF_LOOP
        assert asked.times <= BLOCKS


def test_so_on_the_other_core() -> None:
    with SvmGuest(LOOP) as guest:
        asked = Asked(guest.core._processor._counter)
        assert guest.run().reason is Reason.HLT
        assert guest.core.statistics.instructions == OF_LOOP
        assert asked.times <= BLOCKS


@pytest.mark.parametrize("count", [1, 126, 127, 128, 300])
def test_blocks_of_any_length_are_counted(count: int) -> None:
    """Also in part: an access in the last place but one is refused."""
    with Bench("mov $50, %ecx; 1: " + "inc %rax; " * count + "dec %ecx; jnz 1b; hlt") as bench:
        asked = Asked(bench.core.engine._counter)
        assert bench.run().reason is Reason.HLT
        assert bench.core.statistics.instructions == 1 + 50 * (count + 2)
        assert asked.times <= BLOCKS
    with Bench("inc %rax; " * count + "mov 0x20000, %ebx; inc %rax; hlt") as bench:
        bench.mmu.hidden.add(0x20000)
        for _ in range(3):
            bench.state.rip = 0x8000
            assert bench.run().reason is Reason.EPT_VIOLATION
        assert bench.core.statistics.instructions == 3 * count


def steps(core: Bench | SvmGuest, slices: list[int]) -> list[tuple[int, int]]:
    """RIP and RAX each time that so many instructions were executed."""
    core.controls.pin, seen = int(Pin.PREEMPTION_TIMER), []
    for core.controls.timer in slices:
        assert core.run().reason is Reason.PREEMPTION_TIMER
        seen.append((core.state.rip, core.state.gpr[RAX]))
    return seen


@pytest.mark.parametrize("rig", [Bench, SvmGuest])
def test_it_stops_where_it_should(rig: type[Bench] | type[SvmGuest]) -> None:
    with rig(LOOP) as one, rig(LOOP) as other:
        every = steps(one, [1] * 600)
        slices = [1 + n % 9 for n in range(100)]
        assert steps(other, slices) == [every[sum(slices[: n + 1]) - 1] for n in range(100)]


@pytest.mark.parametrize("rig", [Bench, SvmGuest])
def test_another_thread_stops_blocks_that_only_follow_one_another(
    rig: type[Bench] | type[SvmGuest],
) -> None:
    with rig("1: incq 0x5800; jmp 2f; 2: jmp 1b") as guest:
        guest.controls.pin = int(Pin.EXTERNAL_INTERRUPT)
        for turn in range(1, 20):
            threading.Timer(0.002, guest.core.interrupt).start()
            assert guest.run().reason is Reason.EXTERNAL_INTERRUPT
            done = guest.memory.read_u64(0x5800)
            assert 3 * done - guest.core.statistics.instructions in (0, 1, 2), turn


def test_a_block_that_looks_otherwise_is_counted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counter, "_QUESTION", re.compile(rb"(?!)"))
    with Bench(LOOP) as bench:
        asked = Asked(bench.core.engine._counter)
        assert bench.run().reason is Reason.HLT
        assert bench.core.statistics.instructions == OF_LOOP
        assert asked.times > 1000


def test_a_fault_of_ours_is_raised_outside() -> None:
    with Bench(LOOP) as bench:

        def fail(_block: Block) -> int:
            raise ValueError("ours")

        bench.core.engine._counter._meet = fail
        with pytest.raises(ValueError, match="ours"):
            bench.run()


FAR = """
import mmap
from hostel.soft.core import build
from soft.core.test_counter import BLOCKS, LOOP, OF_LOOP, Asked, Bench

real, holes = build.open_handle, []
def open_handle(model):
    handle = real(model)
    if {far}:  # the room for blocks is not found next to the library
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        holes.append(mmap.mmap(-1, 5 << 30, flags=kind, prot=mmap.PROT_READ))
    return handle
build.open_handle = open_handle
with Bench(LOOP) as bench:
    asked = Asked(bench.core.engine._counter)
    bench.run()
    assert bench.core.statistics.instructions == OF_LOOP
    assert asked.times <= BLOCKS, asked.times
    near = abs(bench.core.engine._first - bench.core.engine._counter._check) < 1 << 31
    high = bench.core.engine.handle >> 32 > 0
    print("near" if near else "far", "high" if high else "low")
"""


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("threshold", ["100", "1000000000"])
def test_wherever_the_library_has_its_memory(far: bool, threshold: str) -> None:
    """What is near is called and named in other ways than what is far."""
    roots = Path(__file__).parents[2], Path(hostel.__file__).parents[1]
    path = os.pathsep.join(map(str, roots))
    done = subprocess.run(
        [sys.executable, "-c", FAR.format(far=far)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": threshold, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == ("far" if far else "near")
