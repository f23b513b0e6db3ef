"""A physical processor around its guest: MSR areas, interrupts, translations to forget, misuse, the trace."""

from __future__ import annotations

from struct import pack

import pytest

from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.silicon import Controls, Event, Primary, Reason, Secondary, VmExit
from hostel.soft.state import MSR_LSTAR, MSR_PAT, MSR_SYSENTER_CS, CpuState
from hostel.soft.vmx.capabilities import MSR_FEATURE_CONTROL, ExitControl
from hostel.soft.vmx.events import Mode, TraceEvent
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.results import CpuFault, VmxAbort, VmxMisuse
from soft.vmx.vmx_world import GOOD, Seen, World, world

HLT = VmExit(Reason.HLT, length=1)
LEAVE = GOOD[Field.EXIT_CONTROLS]

# --- MSR areas ---


def area(made: World, *entries: tuple[int, int]) -> tuple[int, int]:
    hpa = made.memory.allocate()
    made.memory.write(hpa, b"".join(pack("<IIQ", msr, 0, value) for msr, value in entries))
    return hpa, len(entries)


def set_area(cpu: PhysicalCpu, address: Field, count: Field, area: tuple[int, int]) -> None:
    cpu.vmwrite(address, area[0])
    cpu.vmwrite(count, area[1])


def test_msr_areas_load_and_store() -> None:
    with world() as made:
        cpu = made.root()
        seen = Seen(made.cores[0], msrs={MSR_LSTAR: 0xBBB})
        store = area(made, (MSR_LSTAR, 0), (MSR_SYSENTER_CS, 9))
        set_area(
            cpu,
            Field.ENTRY_MSR_LOAD_ADDRESS,
            Field.ENTRY_MSR_LOAD_COUNT,
            area(made, (MSR_LSTAR, 0xAAA)),
        )
        set_area(cpu, Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT, store)
        set_area(
            cpu,
            Field.EXIT_MSR_LOAD_ADDRESS,
            Field.EXIT_MSR_LOAD_COUNT,
            area(made, (MSR_LSTAR, 0xCCC)),
        )
        cpu.vmlaunch()
        assert seen.state.msrs[MSR_LSTAR] == 0xAAA
        assert [made.memory.read_u64(store[0] + at) for at in (8, 24)] == [0xBBB, 0]
        assert cpu.state.msrs[MSR_LSTAR] == 0xCCC


@pytest.mark.parametrize(
    "entry",
    [(0xC000_0100, 0), (0x830, 0), (0x1234_5678, 0), (MSR_LSTAR, 1 << 50), (MSR_PAT, 2)],
    ids=["FS.base", "x2APIC", "unknown", "not canonical", "PAT"],
)
def test_an_msr_that_cannot_be_loaded_is_exit_34(entry: tuple[int, int]) -> None:
    with world() as made:
        cpu = made.root()
        load = area(made, (MSR_LSTAR, 0), entry)
        set_area(cpu, Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT, load)
        out = cpu.vmlaunch()
        assert (out.reason, out.qualification) == (Reason.ENTRY_MSR_LOADING, 2)
        assert cpu.vmread(Field.EXIT_REASON) == 34 | 1 << 31
        assert cpu.state.rip == GOOD[Field.HOST_RIP]
        assert made.cores[0].entries == []


@pytest.mark.parametrize(
    ("address", "count", "cause"),
    [
        (Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT, 1),
        (Field.EXIT_MSR_LOAD_ADDRESS, Field.EXIT_MSR_LOAD_COUNT, 4),
    ],
)
def test_an_exit_that_cannot_be_completed_is_an_abort(
    address: Field, count: Field, cause: int
) -> None:
    with world() as made:
        cpu = made.root()
        set_area(cpu, address, count, area(made, (0x1234_5678, 0)))
        vmcs = cpu.vmptrst()
        with pytest.raises(VmxAbort) as caught:
            cpu.vmlaunch()
        assert caught.value.cause == cause
        assert made.memory.read(vmcs + 4, 4) == pack("<I", cause)
        assert cpu.state.activity == 2


def test_msrs_that_do_not_exist_are_gp() -> None:
    with world() as made:
        cpu = made.root()
        assert cpu.rdmsr(MSR_FEATURE_CONTROL) == 5
        cpu.wrmsr(MSR_LSTAR, 0xFFFF_8000_0000_0000)
        assert cpu.rdmsr(MSR_LSTAR) == 0xFFFF_8000_0000_0000
        with pytest.raises(CpuFault, match=r"#GP\(0\)"):
            cpu.rdmsr(0x9999)
        with pytest.raises(CpuFault, match=r"#GP\(0\)"):
            cpu.wrmsr(MSR_LSTAR, 1 << 50)


# --- Interrupts, translations, misuse, trace ---


@pytest.mark.parametrize(("acknowledge", "info"), [(True, 0x8000_0041), (False, 0)])
def test_an_interrupt_of_the_host(acknowledge: bool, info: int) -> None:
    with world() as made:
        cpu = made.root()
        if acknowledge:
            cpu.vmwrite(Field.EXIT_CONTROLS, LEAVE | ExitControl.ACKNOWLEDGE_INTERRUPT)
        made.cores[0].guest = lambda state, controls, event: VmExit(Reason.EXTERNAL_INTERRUPT)
        cpu.interrupt(0x41)
        cpu.vmlaunch()
        assert made.cores[0].interrupts == 1
        assert cpu.vmread(Field.EXIT_INTERRUPTION_INFO) == info
        assert list(cpu.pending) == ([] if acknowledge else [0x41])


def flushes(made: World) -> tuple[int, int]:
    return made.cores[0].statistics.flushes, len(made.tlbs[0].calls)


def test_without_a_vpid_entry_and_exit_flush() -> None:
    with world() as made:
        cpu = made.root()
        cpu.vmlaunch()
        core, tlb = flushes(made)
        cpu.vmresume()
        assert flushes(made) == (core + 1, tlb + 2)


def test_with_a_vpid_only_another_address_space_flushes_the_core() -> None:
    with world() as made:
        cpu = made.root()
        for field, value in {
            Field.PRIMARY_CONTROLS: GOOD[Field.PRIMARY_CONTROLS] | Primary.SECONDARY,
            Field.SECONDARY_CONTROLS: Secondary.VPID,
            Field.VPID: 3,
        }.items():
            cpu.vmwrite(field, value)
        cpu.vmlaunch()
        core, tlb = flushes(made)
        cpu.vmresume()
        assert flushes(made) == (core, tlb)
        cpu.vmwrite(Field.GUEST_CR3, 0x5000)
        cpu.vmresume()
        assert flushes(made) == (core + 1, tlb)
        cpu.vmwrite(Field.VPID, 4)
        cpu.vmresume()
        assert flushes(made) == (core + 2, tlb)


def test_invvpid_and_invept_reach_the_tlb_and_the_core() -> None:
    with world() as made:
        cpu = made.root()
        cpu.invvpid(0, 5, 0x1000)
        cpu.invvpid(2)
        cpu.invept(1, 0x301E)
        assert made.tlbs[0].calls == [
            ("invvpid", 0, 5, 0x1000),
            ("invvpid", 2, 0, 0),
            ("invept", 1, 0x301E),
        ]
        assert made.cores[0].statistics.flushes == 3


def test_no_instruction_while_the_guest_runs() -> None:
    with world() as made:
        cpu = made.root()

        def guest(state: CpuState, controls: Controls, event: Event | None) -> VmExit:
            assert cpu.mode is Mode.NON_ROOT
            with pytest.raises(VmxMisuse, match="non-root"):
                cpu.vmread(Field.GUEST_RIP)
            return HLT

        made.cores[0].guest = guest
        assert cpu.vmlaunch() is HLT
        assert cpu.mode is Mode.ROOT


def test_the_trace() -> None:
    with world() as made:
        cpu = made.root()
        events: list[TraceEvent] = []
        cpu.trace = events.append
        cpu.vmread(Field.GUEST_RIP)
        cpu.vmlaunch()
        with pytest.raises(Exception, match="VMLAUNCH_NOT_CLEAR"):
            cpu.vmlaunch()
        assert [(event.mode, event.what, event.result) for event in events] == [
            (Mode.ROOT, "VMREAD", "VMsucceed"),
            (Mode.ROOT, "VMLAUNCH", "VM entry"),
            (Mode.NON_ROOT, "VM exit", "HLT"),
            (Mode.ROOT, "VMLAUNCH", "VMLAUNCH: VMfailValid(4, VMLAUNCH_NOT_CLEAR)"),
        ]
        assert events[0].operands == (Field.GUEST_RIP, 0x10_0000)
        assert [event.time for event in events] == sorted(event.time for event in events)
