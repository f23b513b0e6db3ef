"""Mini guests with some of their bytes changed: whatever they do then, the hypervisor survives and says it.

All four ways get the same bytes. Each guest ends by itself, in an exit that names what it did, or is
stopped; nothing is raised, nothing hangs. More of them: ``campaign(first, count)``.
"""

from __future__ import annotations

import random
from typing import get_args

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft import mini
from hostel.soft.mini.guests import LOAD_ADDRESS, SECTOR_ADDRESS
from hostel.spec import Paging, Trap
from soft.mini_rig import on_soft, spoiled

NAMES = [name for name in mini.names() if mini.guest(name).cpus == 1]
WAYS = [(paging, trap) for paging in get_args(Paging) for trap in get_args(Trap)]
ENDINGS = ("exit", "halt", "shutdown", "InternalError", "no end")
PATIENCE = 0.3
"""Seconds for one that may loop."""

# Found by campaigns: a #GP in real mode, a gate beyond the canonical, a jump to where no memory is,
# a return to what is no address, a TSS whose EFLAGS are none.
SEEDS = (30, 38, 43, 1036, 5174, 1, 2, 3)


def change(seed: int) -> tuple[str, dict[int, int]]:
    """A guest, and up to twelve bytes of its image."""
    dice = random.Random(seed)
    name = dice.choice(NAMES)
    sector = mini.guest(name).mode == "sector"
    base, size = (SECTOR_ADDRESS, 512) if sector else (LOAD_ADDRESS, 0x2000)
    count = dice.randint(1, 12)
    return name, {base + dice.randrange(size): dice.randrange(256) for _ in range(count)}


def ending(seed: int, paging: Paging, trap: Trap) -> str:
    name, changes = change(seed)
    return spoiled(on_soft(paging, trap), name, changes, PATIENCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("paging", "trap"), WAYS)
def test_the_hypervisor_survives(seed: int, paging: Paging, trap: Trap) -> None:
    ends = ending(seed, paging, trap)
    assert ends.startswith(ENDINGS)
    assert "refused to enter" not in ends


def campaign(first: int, count: int) -> None:
    """For the command line: every ending, as it comes."""
    for seed in range(first, first + count):
        for way in WAYS:
            print(seed, change(seed)[0], *way, ending(seed, *way), flush=True)
