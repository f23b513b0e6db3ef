"""vCPUs that run no code but say what they do with their time; on pCPUs that really change VMCSs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.physical import PhysicalMemory
from hostel.soft.schedule.runnable import Slice, Stop
from hostel.soft.schedule.scheduler import Scheduler
from soft.vmx.vmx_world import GOOD, World

BUSY = 1 << 40
"""A burst that never ends."""


class Scripted:
    """Runs for each burst of ``bursts`` in turn, then sleeps for ``sleep`` (None: until ``woken``)."""

    def __init__(
        self,
        name: str,
        *,
        bursts: Iterable[int] = (BUSY,),
        sleep: int | None = None,
        blocks: bool = False,
    ) -> None:
        self.name = name
        self.bursts = list(bursts)
        self.sleep = sleep
        self.stop = Stop.BLOCKED if blocks else Stop.HALTED
        self.left = self.bursts.pop(0)
        self.woken = False
        self.alarm: int | None = None
        self.on: PhysicalCpu | None = None
        self.log: list[str] = []

    def run(self, pcpu: PhysicalCpu, budget: int) -> Stop:
        if self.on is not pcpu:
            assert self.on is None, "unload comes before another pCPU"
            self.on = pcpu
            self.log.append(f"load {pcpu.id}")
        self.woken, self.alarm = False, None
        if not self.left:
            self.left = self.bursts.pop(0)
        ran = min(budget, self.left)
        pcpu.tsc += ran
        self.left -= ran
        if self.left:
            return Stop.SLICE
        if not self.bursts:
            return Stop.ENDED
        self.alarm = None if self.sleep is None else pcpu.tsc + self.sleep
        return self.stop

    def unload(self) -> None:
        if self.on is not None:
            self.log.append(f"unload {self.on.id}")
            self.on = None

    @property
    def idle(self) -> bool:
        return not self.woken

    def wakes_at(self) -> int | None:
        return self.alarm


@contextmanager
def machine(pcpus: int, *, slice: int = 10_000) -> Iterator[tuple[Scheduler, list[Slice]]]:
    with PhysicalMemory(frames=64) as memory:
        scheduler = Scheduler(World(memory, pcpus).cpus, slice=slice)
        timeline: list[Slice] = []
        scheduler.on_slice = timeline.append
        yield scheduler, timeline


class Entered:
    """A vCPU with a VMCS of its own: bound and entered as the manual has it."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.vmcs = world.region()
        self.on: PhysicalCpu | None = None
        self.launched = self.written = False
        self.left = 100

    def run(self, pcpu: PhysicalCpu, budget: int) -> Stop:
        if self.on is None:
            pcpu.vmclear(self.vmcs)
            self.on, self.launched = pcpu, False
        pcpu.vmptrld(self.vmcs)
        if not self.written:
            self.written = True
            for field, value in GOOD.items():
                pcpu.vmwrite(field, value)
        if self.launched:
            pcpu.vmresume()
        else:
            pcpu.vmlaunch()
            self.launched = True
        self.left -= 1
        return Stop.SLICE if self.left else Stop.ENDED

    def unload(self) -> None:
        if self.on is not None:
            self.on.vmclear(self.vmcs)
            self.on = None

    @property
    def idle(self) -> bool:
        return False

    def wakes_at(self) -> int | None:
        return None
