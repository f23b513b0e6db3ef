"""What an evil guest reaches by DMA: through a device emulated, passed through, behind an IOMMU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostel.hypervisor import Exit, MmioExit
from hostel.memory import GuestMemory, Region
from hostel.soft import dma
from hostel.soft.dma import CopyEngine, DirectPort, Port, TranslatedPort
from hostel.soft.iommu import Iommu, Tables
from hostel.soft.physical import PAGE, RAM_BASE, PhysicalMemory

from . import Drawing, Report, Step, none_of
from . import Table as Figures
from .draw import Node, tree
from .stage import Actor, Stage

QUESTION = (
    "A device that moves memory by itself is told addresses by its driver. Who checks them? The driver of a "
    "copy engine is an evil guest, four times; each time it tries its own memory, a neighbour's, and a page "
    "table of the hypervisor."
)
DEVICE = 0x3000_0000
"""Where the guest finds the registers."""
SOURCE_ID = 0x0010
"""Bus 0, device 2, function 0."""
OWN_AT, TO, SECRET_AT = 0x4000, 0x5000, 0x6000
LENGTH = 32
SECRET, OWN = b"the neighbour's secret".ljust(LENGTH), b"the guest's own bytes".ljust(LENGTH)
THEIR_BASE, MY_BASE = RAM_BASE, RAM_BASE + (1 << 30)
"""Where the machines' memory is on the bus, in the order in which they are made."""
TARGETS = ("own memory", "neighbour's memory", "hypervisor's table")
_REACHED, _STOPPED = "reached", "stopped"
_ROOT = 0x200_0000
"""Of the tables that the guest makes for an IOMMU of its own."""


class Scene:
    """A neighbour with a secret, and the hypervisor's tables for it; then the evil guest."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.bus = stage.host.physical
        self.steps: list[Step] = []
        self.neighbour = stage.actor("hello")
        self.neighbour.play()
        self.neighbour.memory.write(SECRET_AT, SECRET)
        self.table = self.neighbour.vcpus[0].paging.setup.ept_pointer & -PAGE

    def say(self, who: str, what: str) -> None:
        self.steps.append(Step(who, what))

    def evil(self, source: int, destination: int) -> Actor:
        actor = self.stage.actor("dma", source=source, destination=destination, length=LENGTH)
        actor.memory.write(OWN_AT, OWN)
        return actor


class Way:
    """How the device is given to the guest. ``base``: what the guest has to add to its own addresses."""

    name = ""
    base = 0

    words: tuple[Step, ...] = ()
    """What is done to give it, told once."""

    def port(self, scene: Scene, memory: GuestMemory) -> Port:
        raise NotImplementedError

    def play(self, scene: Scene, actor: Actor) -> None:
        """Emulated: each access of a register is an exit, and the engine is asked there."""
        engine = CopyEngine(self.port(scene, actor.memory))

        def answer(exit: Exit) -> bool:
            if not isinstance(exit, MmioExit) or not 0 <= exit.address - DEVICE < dma.SIZE:
                return False
            offset = exit.address - DEVICE
            if exit.is_write:
                engine.write(offset, bytes(exit.data))
            else:
                exit.data[:] = engine.read(offset, len(exit.data))
            return True

        actor.answers.append(answer)
        actor.play()


class Emulated(Way):
    name = "emulated"
    words: tuple[Step, ...] = (
        Step(
            "monitor",
            "emulates it: each register is an exit; the monitor copies, and checks each address against the "
            "machine's memory. All addresses are the guest's own: where the hypervisor has a table the guest "
            "has memory of its own, and that is what it gets",
        ),
    )

    def port(self, scene: Scene, memory: GuestMemory) -> Port:
        return DirectPort(memory)


class EmulatedBehindOwn(Way):
    name = "emulated, guest's own IOMMU"
    words: tuple[Step, ...] = (
        Step(
            "guest", "has an IOMMU of its own: one page to read, one to write, in tables of its own"
        ),
    )

    def port(self, scene: Scene, memory: GuestMemory) -> Port:
        iommu = Iommu(memory)
        iommu.root_table = root = _ROOT
        for at, value in (
            (root, root + 0x1001),
            (root + 0x1000 + SOURCE_ID * 16, root + 0x2001),
            (root + 0x1000 + SOURCE_ID * 16 + 8, 1 << 8 | 1),
            (root + 0x2000, root + 0x3003),
            (root + 0x3000, root + 0x4003),
            (root + 0x4000 + (OWN_AT >> 12) * 8, OWN_AT | 1),
            (root + 0x4000 + (TO >> 12) * 8, TO | 3),
        ):
            memory.write_u64(at, value)
        return TranslatedPort(iommu, memory, SOURCE_ID)


class PassedThrough(Way):
    name = "passed through, no IOMMU"
    base = MY_BASE
    words: tuple[Step, ...] = (
        Step("monitor", "maps the registers into the guest and steps aside: no exit, no check"),
        Step("guest", f"must know where its memory really is: at {MY_BASE:#x} on this bus"),
    )

    def port(self, scene: Scene, memory: GuestMemory) -> Port:
        return DirectPort(scene.bus)

    def play(self, scene: Scene, actor: Actor) -> None:
        """The registers are a page that the guest has mapped; the device looks at it in its own time."""
        with GuestMemory(PAGE) as registers:
            page = registers.regions[0]
            actor.machine.map(9, Region(DEVICE, PAGE, page.hva, 0))
            engine = CopyEngine(self.port(scene, actor.memory), registers.view(0, PAGE))
            pcpu = scene.stage.host.pcpus[0]
            while not actor.ended:
                actor.step(actor.vcpus[0], pcpu, 1000)
                engine.poll()
            actor.machine.unmap(9)


class BehindTheHosts(PassedThrough):
    name = "passed through, host's IOMMU"
    base = 0
    words: tuple[Step, ...] = (
        Step(
            "monitor",
            "maps the registers into the guest, and gives the device a domain in which address 0 is "
            f"{MY_BASE:#x}, and nothing is but the guest's memory",
        ),
    )

    def port(self, scene: Scene, memory: GuestMemory) -> Port:
        iommu = assigned(scene.bus, memory.size)
        iommu.on_entry = lambda name, at, value: scene.say(
            "IOMMU", f"reads {name} entry at {at:#x}: {value:#x}"
        )
        return TranslatedPort(iommu, scene.bus, SOURCE_ID)


def assigned(bus: PhysicalMemory, size: int) -> Iommu:
    """The host's, with the device in a domain that holds the guest's memory and nothing else."""
    tables, iommu = Tables(bus), Iommu(bus)
    table = tables.domain()
    tables.assign(SOURCE_ID, 1, table)
    tables.map(table, 0, MY_BASE, size)
    iommu.root_table = tables.root
    return iommu


WAYS: tuple[Callable[[], Way], ...] = (Emulated, EmulatedBehindOwn, PassedThrough, BehindTheHosts)


def attempt(way: Way, target: str) -> tuple[bool, list[Step]]:
    """Whether the evil guest got there."""
    with Stage() as stage:
        scene = Scene(stage)
        source, wanted = {
            "own memory": (way.base + OWN_AT, OWN),
            "neighbour's memory": (THEIR_BASE + SECRET_AT, SECRET),
            "hypervisor's table": (scene.table, scene.bus.read(scene.table, LENGTH)),
        }[target]
        actor = scene.evil(source, way.base + TO)
        assert actor.machine.guest_map.slots[0].hpa == MY_BASE
        way.play(scene, actor)
        reached = actor.memory.read(TO, LENGTH) == wanted
        status = actor.words.strip().partition("=")[2]
        scene.say(
            "guest",
            f"has the device copy from {source:#x}, {target}: status {status}, "
            f"{_REACHED if reached else _STOPPED}",
        )
        return reached, scene.steps


def _tables_drawn(size: int) -> tuple[str, ...]:
    pages = f"0x0 … {size - 1:#x}  →  {MY_BASE:#x}  RW, {size >> 21} pages of 2 MiB"
    device = Node("[00:02.0] domain 1, 4 levels", (Node(pages),))
    others = Node("every other device: not present, a fault")
    contexts = Node("[0] context table, by device and function", (device, others))
    return tuple(tree(Node("root table, by bus", (contexts,))))


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("iommu", arguments)
    steps: list[Step] = []
    rows: list[tuple[str, ...]] = []
    for make in WAYS:
        way = make()
        steps += [Step("—", way.name), *way.words]
        row = [way.name]
        for target in TARGETS:
            reached, told = attempt(way, target)
            row.append(_REACHED if reached else _STOPPED)
            steps += told
        rows.append(tuple(row))
    first, again = walk_costs()
    safe = [row[0] for row in rows if row[2:] == (_STOPPED, _STOPPED)]
    unsafe = [row[0] for row in rows if row[0] not in safe]
    return Report(
        lab="iommu",
        question=QUESTION,
        steps=tuple(steps),
        drawings=(Drawing("The host's tables in the last way", _tables_drawn(64 << 20)),),
        tables=(Figures("What the guest's device reached", ("way", *TARGETS), tuple(rows)),),
        conclusions=(
            f"Stays inside: {'; '.join(safe)}.",
            f"Reaches everything: {'; '.join(unsafe)}. The device believes the guest, and the bus "
            "believes the device.",
            f"The host's IOMMU adds {first} table reads to a device's first access to a page and "
            f"{again} to the next: translations are cached, and must be invalidated when a page is "
            "taken away.",
        ),
        page="docs/iommu.md",
    )


def walk_costs() -> tuple[int, int]:
    """Table entries read for the first translation of a page, and for the second."""
    with PhysicalMemory(frames=16) as bus:
        iommu = assigned(bus, 64 << 20)
        iommu.translate(SOURCE_ID, OWN_AT, is_write=False)
        first = iommu.statistics.references
        iommu.translate(SOURCE_ID, OWN_AT, is_write=False)
        return first, iommu.statistics.references - first
