"""What an evil guest reaches by DMA: through a device emulated, passed through, behind an IOMMU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hostel.memory import GuestMemory
from hostel.soft import dma
from hostel.soft.dma import CopyEngine, DirectPort, Port, TranslatedPort
from hostel.soft.iommu import Iommu, Tables
from hostel.soft.physical import PhysicalMemory

from . import Drawing, Report, Step, none_of
from . import Table as Figures
from .draw import Node, tree

QUESTION = (
    "A device that moves memory by itself is told addresses by its driver. Who checks them? One copy "
    "engine is driven by an evil guest in four ways; each time it tries its own memory, a neighbour's, "
    "and a page table of the hypervisor."
)
SOURCE = 0x0010
"""Bus 0, device 2, function 0."""
SECRET = b"the neighbour's secret"
OWN = b"the guest's own bytes "
_SIZE = 1 << 21
_OWN_AT, _TO, _SECRET_AT = 0x1000, 0x2000, 0x3000
_REACHED, _NOT = "reached", "stopped"


class Scene:
    """Two machines' memory and the hypervisor's frames on one bus."""

    def __init__(self, bus: PhysicalMemory, mine: GuestMemory, theirs: GuestMemory) -> None:
        self.bus, self.mine = bus, mine
        self.my_base = bus.attach(mine)[0].hpa
        self.their_base = bus.attach(theirs)[0].hpa
        # above all guest addresses, so that each address below means one thing
        self.frame = next(frame for frame in iter(bus.allocate, 0) if frame >= _SIZE)
        mine.write(_OWN_AT, OWN)
        theirs.write(_SECRET_AT, SECRET)
        bus.write(self.frame, SECRET)
        self.steps: list[Step] = []

    def say(self, who: str, what: str) -> None:
        self.steps.append(Step(who, what))

    def copy(self, port: Port, source: int, destination: int) -> bool:
        """Drive the device as the guest does; whether it says that it is done."""
        engine = CopyEngine(port)
        for register, value in (
            (dma.SOURCE, source),
            (dma.DESTINATION, destination),
            (dma.LENGTH, len(SECRET)),
            (dma.COMMAND, dma.COPY),
        ):
            engine.write(register, value.to_bytes(8, "little"))
        return int.from_bytes(engine.read(dma.STATUS, 8), "little") == dma.DONE

    def attempt(self, port: Port, base: int) -> tuple[str, str, str]:
        """Own memory, the neighbour's, a frame of the hypervisor: what was reached. ``base``: what the
        guest must add to its own addresses for this device to find them."""
        results = []
        for wanted, address in (
            (OWN, base + _OWN_AT),
            (SECRET, self.their_base + _SECRET_AT),
            (SECRET, self.frame),
        ):
            self.mine.write(_TO, bytes(len(SECRET)))
            self.copy(port, address, base + _TO)
            reached = self.mine.read(_TO, len(SECRET)) == wanted
            results.append(_REACHED if reached else _NOT)
            self.say("device", f"reads {address:#x} for the guest: {results[-1]}")
        return results[0], results[1], results[2]


@contextmanager
def _scene() -> Iterator[Scene]:
    with (
        PhysicalMemory(frames=600) as bus,
        GuestMemory(_SIZE) as mine,
        GuestMemory(_SIZE) as theirs,
    ):
        yield Scene(bus, mine, theirs)


def _emulated(scene: Scene) -> tuple[Port, int]:
    scene.say(
        "monitor", "emulates it: a store to the command register exits; the monitor copies, and"
    )
    scene.say("monitor", "checks each guest address against the machine's memory")
    return DirectPort(scene.mine), 0


def _emulated_behind_own(scene: Scene) -> tuple[Port, int]:
    scene.say("guest", "programs an IOMMU of its own machine: one page to read, one to write")
    iommu, memory = Iommu(scene.mine), scene.mine
    iommu.root_table = root = 0x10_0000
    for at, value in (
        (root, root + 0x1001),
        (root + 0x1000 + SOURCE * 16, root + 0x2001),
        (root + 0x1000 + SOURCE * 16 + 8, 1 << 8 | 1),
        (root + 0x2000, root + 0x3003),
        (root + 0x3000, root + 0x4003),
        (root + 0x4000 + (_OWN_AT >> 12) * 8, _OWN_AT | 1),
        (root + 0x4000 + (_TO >> 12) * 8, _TO | 3),
    ):
        memory.write_u64(at, value)
    return TranslatedPort(iommu, memory, SOURCE), 0


def _passed_through(scene: Scene) -> tuple[Port, int]:
    scene.say("monitor", "maps the registers into the guest and steps aside: no exit, no check")
    scene.say("guest", f"must know where its memory really is: {scene.my_base:#x} on this bus")
    return DirectPort(scene.bus), scene.my_base


def _assigned(scene: Scene) -> Iommu:
    """The host's, with the device in a domain that holds the guest's memory and nothing else."""
    tables, iommu = Tables(scene.bus), Iommu(scene.bus)
    table = tables.domain()
    tables.assign(SOURCE, 1, table)
    tables.map(table, 0, scene.my_base, _SIZE)
    iommu.root_table = tables.root
    return iommu


def _behind_the_hosts(scene: Scene) -> tuple[Port, int]:
    iommu = _assigned(scene)
    iommu.on_entry = lambda name, at, value: scene.say(
        "IOMMU", f"reads {name} entry at {at:#x}: {value:#x}"
    )
    scene.say("monitor", f"gives the device domain 1: address 0 is {scene.my_base:#x}, and no more")
    return TranslatedPort(iommu, scene.bus, SOURCE), 0


WAYS: dict[str, Callable[[Scene], tuple[Port, int]]] = {
    "emulated": _emulated,
    "emulated, guest's own IOMMU": _emulated_behind_own,
    "passed through, no IOMMU": _passed_through,
    "passed through, host's IOMMU": _behind_the_hosts,
}


def _tables_drawn(scene: Scene) -> tuple[str, ...]:
    root = Node(
        "root table, by bus",
        (
            Node(
                "[0] context table, by device and function",
                (
                    Node(
                        "[00:02.0] domain 1, 4 levels",
                        (Node(f"0x0 … {_SIZE - 1:#x}  →  {scene.my_base:#x}  RW, 2 MiB page"),),
                    ),
                    Node("every other device: not present, a fault"),
                ),
            ),
        ),
    )
    return tuple(tree(root))


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("iommu", arguments)
    steps: list[Step] = []
    rows = []
    drawing: tuple[str, ...] = ()
    for way, build in WAYS.items():
        with _scene() as scene:
            scene.say("—", way)
            port, base = build(scene)
            own, neighbour, frame = scene.attempt(port, base)
            rows.append((way, own, neighbour, frame))
            steps += scene.steps
            drawing = _tables_drawn(scene)
    first, again = _walk_costs()
    safe = [row[0] for row in rows if row[2:] == (_NOT, _NOT)]
    unsafe = [row[0] for row in rows if row[0] not in safe]
    return Report(
        lab="iommu",
        question=QUESTION,
        steps=tuple(steps),
        drawings=(Drawing("The host's tables in the last way", drawing),),
        tables=(
            Figures(
                "What the guest's device reached",
                ("way", "own memory", "neighbour's memory", "hypervisor's table"),
                tuple(rows),
            ),
        ),
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


def _walk_costs() -> tuple[int, int]:
    """Table entries read for the first translation of a page, and for the second."""
    with _scene() as scene:
        iommu = _assigned(scene)
        iommu.translate(SOURCE, _OWN_AT, is_write=False)
        first = iommu.statistics.references
        iommu.translate(SOURCE, _OWN_AT, is_write=False)
        return first, iommu.statistics.references - first
