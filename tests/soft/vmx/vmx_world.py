"""Physical processors with a scripted core, and a VMCS that passes every check: where tests of VMX start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from struct import pack

from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Controls, CoreStatistics, Event, Reason, VmExit
from hostel.soft.state import (
    CR4_VMXE,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RIGHTS_TSS64,
    RIGHTS_UNUSABLE,
    CpuState,
)
from hostel.soft.vmx.capabilities import (
    CAPABILITIES,
    MSR_VMX_TRUE_ENTRY,
    MSR_VMX_TRUE_EXIT,
    MSR_VMX_TRUE_PIN,
    MSR_VMX_TRUE_PRIMARY,
    NO_VMCS,
    REVISION,
    EntryControl,
    ExitControl,
)
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.operation import Package

Guest = Callable[[CpuState, Controls, Event | None], VmExit]


class ScriptedCore:
    """Runs no instruction: ``guest`` says what one entry does."""

    def __init__(self) -> None:
        self.statistics = CoreStatistics()
        self.guest: Guest = lambda state, controls, event: VmExit(Reason.HLT, length=1)
        self.entries: list[tuple[CpuState, Controls, Event | None]] = []
        self.interrupts = 0

    def enter(self, state: CpuState, controls: Controls, event: Event | None = None) -> VmExit:
        self.entries.append((state, controls, event))
        return self.guest(state, controls, event)

    def interrupt(self) -> None:
        self.interrupts += 1

    def flush(self, address: int | None = None) -> None:
        self.statistics.flushes += 1

    def save_fpu(self) -> bytes:
        return b""

    def wrote(self, hpa: int, size: int) -> None:
        """It translates nothing."""

    def load_fpu(self, data: bytes) -> None:
        assert data == b""

    def close(self) -> None:
        pass


class Seen:
    """What the guest found when it was entered, and what it leaves behind."""

    def __init__(self, core: ScriptedCore, **leaves: object) -> None:
        self.state = CpuState()
        self.leaves = leaves
        core.guest = self.run

    def run(self, state: CpuState, controls: Controls, event: Event | None) -> VmExit:
        self.state = deepcopy(state)
        for name, value in self.leaves.items():
            setattr(state, name, value)
        return VmExit(Reason.HLT, length=1)


class CountingTlb:
    """Remembers what it was told to forget."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def invvpid(self, type: int, vpid: int, address: int = 0) -> None:
        self.calls.append(("invvpid", int(type), vpid, address))

    def invept(self, type: int, pointer: int = 0) -> None:
        self.calls.append(("invept", int(type), pointer))

    def flush(self, controls: Controls, *, keep_global: bool) -> None:
        self.calls.append(("flush", keep_global))


class World:
    """Some pCPUs on one memory."""

    def __init__(self, memory: PhysicalMemory, cpus: int) -> None:
        self.memory = memory
        self.package = Package(memory)
        self.cores = [ScriptedCore() for _ in range(cpus)]
        self.tlbs = [CountingTlb() for _ in range(cpus)]
        self.cpus = [
            PhysicalCpu(number, self.package, core, tlb)
            for number, (core, tlb) in enumerate(zip(self.cores, self.tlbs, strict=True))
        ]
        for cpu in self.cpus:
            cpu.state.cr4 |= CR4_VMXE

    def region(self, revision: int = REVISION) -> int:
        """A frame that is ready to be a VMXON region or a VMCS."""
        hpa = self.memory.allocate()
        self.memory.write(hpa, pack("<I", revision))
        return hpa

    def root(self, number: int = 0) -> PhysicalCpu:
        """A pCPU in root mode with a current VMCS, all of whose checks pass."""
        cpu = self.cpus[number]
        cpu.vmxon(self.region())
        vmcs = self.region()
        cpu.vmclear(vmcs)
        cpu.vmptrld(vmcs)
        for field, value in GOOD.items():
            cpu.vmwrite(field, value)
        return cpu


@contextmanager
def world(cpus: int = 1) -> Iterator[World]:
    with PhysicalMemory(frames=64) as memory:
        yield World(memory, cpus)


def must(msr: int) -> int:
    return CAPABILITIES[msr] & 0xFFFF_FFFF


GOOD: dict[int, int] = {
    Field.PIN_CONTROLS: must(MSR_VMX_TRUE_PIN),
    Field.PRIMARY_CONTROLS: must(MSR_VMX_TRUE_PRIMARY),
    Field.EXIT_CONTROLS: must(MSR_VMX_TRUE_EXIT) | ExitControl.HOST_64,
    Field.ENTRY_CONTROLS: must(MSR_VMX_TRUE_ENTRY) | EntryControl.GUEST_64,
    Field.VMCS_LINK_POINTER: NO_VMCS,
    Field.HOST_CR0: 0x8000_0031,
    Field.HOST_CR3: 0x1000,
    Field.HOST_CR4: 0x2020,
    Field.HOST_ES_SELECTOR: 0x10,
    Field.HOST_CS_SELECTOR: 8,
    Field.HOST_SS_SELECTOR: 0x10,
    Field.HOST_DS_SELECTOR: 0x10,
    Field.HOST_TR_SELECTOR: 0x18,
    Field.HOST_RSP: 0xFFFF_8000_0000_1000,
    Field.HOST_RIP: 0xFFFF_8000_0000_2000,
    Field.GUEST_CR0: 0x8000_0031,
    Field.GUEST_CR3: 0x3000,
    Field.GUEST_CR4: 0x2020,
    Field.GUEST_RFLAGS: 2,
    Field.GUEST_RIP: 0x10_0000,
    Field.GUEST_RSP: 0x8000,
    Field.GUEST_DR7: 0x400,
    **{
        field: limit
        for field, limit in zip(
            range(Field.GUEST_ES_LIMIT, Field.GUEST_TR_LIMIT + 2, 2),
            [0xFFFF_FFFF] * 6 + [0, 0x67],
            strict=True,
        )
    },
    **{
        field: rights
        for field, rights in zip(
            range(Field.GUEST_ES_RIGHTS, Field.GUEST_TR_RIGHTS + 2, 2),
            [
                RIGHTS_DATA32,
                RIGHTS_CODE64,
                *[RIGHTS_DATA32] * 4,
                RIGHTS_UNUSABLE,
                RIGHTS_TSS64,
            ],
            strict=True,
        )
    },
    **dict.fromkeys(
        [
            Field.GUEST_ES_SELECTOR,
            Field.GUEST_SS_SELECTOR,
            Field.GUEST_DS_SELECTOR,
            Field.GUEST_FS_SELECTOR,
            Field.GUEST_GS_SELECTOR,
        ],
        0x10,
    ),
    Field.GUEST_CS_SELECTOR: 8,
    Field.GUEST_TR_SELECTOR: 0x18,
}
"""A 64-bit guest in ring 0, on a 64-bit host."""
