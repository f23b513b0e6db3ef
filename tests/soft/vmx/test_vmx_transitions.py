"""What VM entry loads, what VM exit saves and loads, and what neither touches."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostel.soft.silicon import Controls, Event, EventType, Pin, Primary, Reason, Secondary, VmExit
from hostel.soft.state import (
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    MSR_DEBUGCTL,
    MSR_LSTAR,
    MSR_PAT,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RIGHTS_UNUSABLE,
    CpuState,
    Segment,
    Table,
)
from hostel.soft.vmx.capabilities import EntryControl, ExitControl
from hostel.soft.vmx.fields import Field
from soft.vmx.vmx_world import GOOD, ScriptedCore, Seen, World, world

HLT = VmExit(Reason.HLT, length=1)
ENTRY, LEAVE = GOOD[Field.ENTRY_CONTROLS], GOOD[Field.EXIT_CONTROLS]


def entered(made: World) -> tuple[CpuState, Controls, Event | None]:
    return made.cores[0].entries[-1]


def test_entry_loads_the_guest_state_area() -> None:
    with world() as made:
        cpu = made.root()
        seen = Seen(made.cores[0])
        for number in range(4):
            cpu.vmwrite(Field.GUEST_ES_BASE + 2 * number, 0x1000 * number)
        wanted = {Field.GUEST_FS_BASE: 0xFFFF_8000_1234_5000, Field.GUEST_GDTR_BASE: 0x5000}
        wanted |= {
            Field.GUEST_GDTR_LIMIT: 0x7F,
            Field.GUEST_IDTR_BASE: 0x6000,
            Field.GUEST_IDTR_LIMIT: 0xFFF,
        }
        wanted |= {
            Field.GUEST_SYSENTER_CS: 8,
            Field.GUEST_SYSENTER_ESP: 0x77,
            Field.GUEST_SYSENTER_EIP: 0x88,
        }
        wanted |= {Field.GUEST_RFLAGS: 0x246, Field.GUEST_INTERRUPTIBILITY: 1}
        for field, value in wanted.items():
            cpu.vmwrite(field, value)
        cpu.vmlaunch()
        state = seen.state
        assert (state.rip, state.gpr[4], state.rflags) == (0x10_0000, 0x8000, 0x246)
        assert (state.cr0, state.cr3, state.cr4) == (0x8000_0031, 0x3000, 0x2020)
        assert [state.es.base, state.cs.base, state.ss.base, state.ds.base] == [
            0,
            0x1000,
            0x2000,
            0x3000,
        ]
        assert state.fs == Segment(0x10, 0xFFFF_8000_1234_5000, 0xFFFF_FFFF, 0xC093)
        assert (state.gdtr, state.idtr) == (Table(0x5000, 0x7F), Table(0x6000, 0xFFF))
        assert state.cs.rights == GOOD[Field.GUEST_CS_RIGHTS]
        assert not state.ldtr.usable
        assert state.interruptibility == 1
        assert state.msrs[MSR_SYSENTER_CS] == 8
        assert (state.msrs[MSR_SYSENTER_ESP], state.msrs[MSR_SYSENTER_EIP]) == (0x77, 0x88)
        assert state.efer & EFER_LMA


def test_entry_leaves_alone_what_has_no_field() -> None:
    with world() as made:
        cpu = made.root()
        seen = Seen(made.cores[0], cr2=0x999)
        cpu.state.gpr[:] = list(range(100, 116))
        cpu.state.cr2, cpu.state.dr[1] = 0x1234, 0x5678
        cpu.state.msrs[MSR_LSTAR] = 0xABC
        cpu.vmlaunch()
        assert seen.state.gpr == [*range(100, 104), 0x8000, *range(105, 116)]
        assert (seen.state.cr2, seen.state.dr[1], seen.state.msrs[MSR_LSTAR]) == (
            0x1234,
            0x5678,
            0xABC,
        )
        assert cpu.state.gpr == [*range(100, 104), GOOD[Field.HOST_RSP], *range(105, 116)]
        assert cpu.state.cr2 == 0x999


@pytest.mark.parametrize(
    ("control", "field", "value", "loaded"),
    [
        (EntryControl.LOAD_EFER, Field.GUEST_EFER, EFER_LMA | EFER_LME, lambda s: s.efer),
        (EntryControl.LOAD_PAT, Field.GUEST_PAT, 0x0606, lambda s: s.msrs.get(MSR_PAT)),
        (EntryControl.LOAD_DEBUG, Field.GUEST_DR7, 0x401, lambda s: s.dr7),
        (EntryControl.LOAD_DEBUG, Field.GUEST_DEBUGCTL, 1, lambda s: s.msrs.get(MSR_DEBUGCTL)),
    ],
    ids=["EFER", "PAT", "DR7", "DEBUGCTL"],
)
def test_entry_controls_say_what_else_is_loaded(
    control: int, field: int, value: int, loaded: Callable[[CpuState], int]
) -> None:
    for on in (True, False):
        with world() as made:
            cpu = made.root()
            seen = Seen(made.cores[0])
            cpu.vmwrite(field, value)
            cpu.vmwrite(Field.ENTRY_CONTROLS, ENTRY | control if on else ENTRY)
            cpu.vmlaunch()
            assert (loaded(seen.state) == value) is on


def test_without_its_control_efer_follows_the_guests_mode() -> None:
    with world() as made:
        cpu = made.root()
        seen = Seen(made.cores[0])
        cpu.state.efer |= EFER_SCE
        cpu.vmwrite(Field.ENTRY_CONTROLS, ENTRY & ~EntryControl.GUEST_64)
        cpu.vmwrite(Field.GUEST_CR4, 0x2000)
        cpu.vmlaunch()
        assert seen.state.efer == EFER_SCE | EFER_NXE
        assert cpu.state.efer == EFER_SCE | EFER_NXE | EFER_LMA | EFER_LME


def test_exit_saves_the_guest_state_area() -> None:
    with world() as made:
        cpu = made.root()
        cs = Segment(0x33, 0x7000, 0xFFF, 0x00FB)
        Seen(
            made.cores[0],
            rip=0x4242,
            rflags=0x246,
            cr3=0x9000,
            cs=cs,
            idtr=Table(0x111, 0x222),
            activity=1,
            interruptibility=2,
            gpr=[7] * 16,
        )
        cpu.vmlaunch()
        expected = {Field.GUEST_RIP: 0x4242, Field.GUEST_RFLAGS: 0x246, Field.GUEST_CR3: 0x9000}
        expected |= {Field.GUEST_RSP: 7, Field.GUEST_ACTIVITY: 1, Field.GUEST_INTERRUPTIBILITY: 2}
        expected |= {
            Field.GUEST_CS_SELECTOR: 0x33,
            Field.GUEST_CS_BASE: 0x7000,
            Field.GUEST_CS_LIMIT: 0xFFF,
        }
        expected |= {
            Field.GUEST_CS_RIGHTS: 0xFB,
            Field.GUEST_IDTR_BASE: 0x111,
            Field.GUEST_IDTR_LIMIT: 0x222,
        }
        expected |= {
            Field.GUEST_TR_SELECTOR: 0x18,
            Field.VMCS_LINK_POINTER: GOOD[Field.VMCS_LINK_POINTER],
        }
        assert {field: cpu.vmread(field) for field in expected} == expected


@pytest.mark.parametrize(
    ("control", "field", "leaves"),
    [
        (ExitControl.SAVE_EFER, Field.GUEST_EFER, {"efer": 0xD00}),
        (ExitControl.SAVE_DEBUG, Field.GUEST_DR7, {"dr7": 0x455}),
        (ExitControl.SAVE_PAT, Field.GUEST_PAT, {"msrs": {MSR_PAT: 0x0606}}),
        (ExitControl.SAVE_DEBUG, Field.GUEST_DEBUGCTL, {"msrs": {MSR_DEBUGCTL: 2}}),
    ],
    ids=["EFER", "DR7", "PAT", "DEBUGCTL"],
)
def test_exit_controls_say_what_else_is_saved(
    control: int, field: int, leaves: dict[str, object]
) -> None:
    left = next(iter(leaves.values()))
    value = next(iter(left.values())) if isinstance(left, dict) else left
    for on in (True, False):
        with world() as made:
            cpu = made.root()
            Seen(made.cores[0], **leaves)
            before = cpu.vmread(field)
            cpu.vmwrite(Field.EXIT_CONTROLS, LEAVE | control if on else LEAVE)
            cpu.vmlaunch()
            assert cpu.vmread(field) == (value if on else before)


def test_exit_loads_the_host() -> None:
    with world() as made:
        cpu = made.root()
        Seen(made.cores[0], rflags=0x246, activity=1, dr7=0x4FF)
        for field, value in {
            Field.HOST_FS_BASE: 0x111,
            Field.HOST_GS_BASE: 0x222,
            Field.HOST_TR_BASE: 0x333,
        }.items():
            cpu.vmwrite(field, value)
        cpu.vmlaunch()
        state = cpu.state
        assert (state.rip, state.gpr[4]) == (GOOD[Field.HOST_RIP], GOOD[Field.HOST_RSP])
        assert (state.rflags, state.activity, state.dr7) == (2, 0, 0x400)
        assert (state.cr0, state.cr3, state.cr4) == (0x8000_0031, 0x1000, 0x2020)
        assert state.cs == Segment(8, 0, 0xFFFF_FFFF, 0xA09B)
        assert state.ss == Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
        assert state.fs == Segment(0, 0x111, 0xFFFF_FFFF, 0xC093 | RIGHTS_UNUSABLE)
        assert state.tr == Segment(0x18, 0x333, 0x67, 0x8B)
        assert not state.ldtr.usable
        assert (state.gdtr.limit, state.idtr.limit) == (0xFFFF, 0xFFFF)
        assert state.cpl == 0
        assert state.bits == 64


def test_exit_information() -> None:
    with world() as made:
        cpu = made.root()
        made.cores[0].guest = lambda state, controls, event: VmExit(
            Reason.EPT_VIOLATION,
            qualification=0x181,
            length=3,
            linear=0xFFFF_8000_0000_0010,
            physical=0xFEE0_0000,
            interruption=Event(14, EventType.HARDWARE_EXCEPTION, error=6),
            vectoring=Event(0x80, EventType.SOFTWARE_INTERRUPT, length=2),
            instruction_info=0x5A,
        )
        cpu.vmlaunch()
        expected = {
            Field.EXIT_REASON: 48,
            Field.EXIT_QUALIFICATION: 0x181,
            Field.EXIT_INSTRUCTION_LENGTH: 3,
        }
        expected |= {
            Field.GUEST_LINEAR_ADDRESS: 0xFFFF_8000_0000_0010,
            Field.GUEST_PHYSICAL_ADDRESS: 0xFEE0_0000,
        }
        expected |= {Field.EXIT_INTERRUPTION_INFO: 0x8000_0B0E, Field.EXIT_INTERRUPTION_ERROR: 6}
        expected |= {Field.IDT_VECTORING_INFO: 0x8000_0480, Field.IDT_VECTORING_ERROR: 0}
        expected |= {Field.EXIT_INSTRUCTION_INFO: 0x5A}
        assert {field: cpu.vmread(field) for field in expected} == expected


def test_an_event_is_injected_once() -> None:
    with world() as made:
        cpu = made.root()
        cpu.vmwrite(Field.ENTRY_INTERRUPTION_INFO, 0x8000_0B0D)
        cpu.vmwrite(Field.ENTRY_EXCEPTION_ERROR, 0x18)
        cpu.vmlaunch()
        assert entered(made)[2] == Event(13, EventType.HARDWARE_EXCEPTION, error=0x18)
        assert cpu.vmread(Field.ENTRY_INTERRUPTION_INFO) == 0xB0D
        cpu.vmresume()
        assert entered(made)[2] is None


def test_a_failed_entry_keeps_the_event() -> None:
    with world() as made:
        cpu = made.root()
        cpu.vmwrite(Field.ENTRY_INTERRUPTION_INFO, 0x8000_0202)
        cpu.vmwrite(Field.GUEST_RFLAGS, 0)
        assert cpu.vmlaunch().reason is Reason.ENTRY_GUEST_STATE
        assert cpu.vmread(Field.ENTRY_INTERRUPTION_INFO) == 0x8000_0202


def test_lma_is_stored_in_the_entry_controls() -> None:
    with world() as made:
        cpu = made.root()
        seen = Seen(made.cores[0], efer=0)
        cpu.vmlaunch()
        assert not cpu.vmread(Field.ENTRY_CONTROLS) & EntryControl.GUEST_64
        assert cpu.vmresume().reason is Reason.HLT
        assert not seen.state.efer & EFER_LME


def test_the_controls_reach_the_core() -> None:
    with world() as made:
        cpu = made.root()
        values = {
            Field.PRIMARY_CONTROLS: GOOD[Field.PRIMARY_CONTROLS] | Primary.SECONDARY,
            Field.SECONDARY_CONTROLS: Secondary.VPID | Secondary.EPT,
            Field.EPT_POINTER: 0x301E,
            Field.VPID: 7,
            Field.EXCEPTION_BITMAP: 0x4000,
            Field.CR0_MASK: 0xFFFF_FFFF_0000_0001,
            Field.CR4_SHADOW: 0x20,
            Field.CR3_TARGET_COUNT: 2,
            Field.CR3_TARGET1: 0x5000,
            Field.PREEMPTION_TIMER: 1234,
            Field.PIN_CONTROLS: GOOD[Field.PIN_CONTROLS] | Pin.PREEMPTION_TIMER,
        }
        for field, value in values.items():
            cpu.vmwrite(field, value)
        cpu.vmlaunch()
        controls = entered(made)[1]
        assert controls.secondary == Secondary.VPID | Secondary.EPT
        assert (controls.ept_pointer, controls.vpid, controls.timer) == (0x301E, 7, 1234)
        assert (controls.exception_bitmap, controls.cr3_targets) == (0x4000, (0, 0x5000))
        assert (controls.cr0_mask, controls.cr4_shadow) == (0xFFFF_FFFF_0000_0001, 0x20)
        cpu.vmwrite(Field.CR4_SHADOW, 0x30)
        cpu.vmwrite(Field.PREEMPTION_TIMER, 5)
        cpu.vmresume()
        assert (entered(made)[1].cr4_shadow, entered(made)[1].timer) == (0x30, 5)


def test_the_interrupt_window_is_turned_on_and_off() -> None:
    """Without decoding and checking all controls again."""
    with world() as made:
        cpu = made.root()
        seen: list[int] = []
        for window in (0, Primary.INTERRUPT_WINDOW, Primary.INTERRUPT_WINDOW, 0):
            cpu.vmwrite(Field.PRIMARY_CONTROLS, GOOD[Field.PRIMARY_CONTROLS] | window)
            cpu.vmresume() if seen else cpu.vmlaunch()
            seen.append(entered(made)[1].primary & Primary.INTERRUPT_WINDOW)
        assert seen == [0, Primary.INTERRUPT_WINDOW, Primary.INTERRUPT_WINDOW, 0]
        assert cpu.vmread(Field.PRIMARY_CONTROLS) == GOOD[Field.PRIMARY_CONTROLS]


def run_for(core: ScriptedCore, instructions: int) -> None:
    def guest(state: CpuState, controls: Controls, event: Event | None) -> VmExit:
        core.statistics.instructions += instructions
        return HLT

    core.guest = guest


@pytest.mark.parametrize(("save", "left"), [(True, 700), (False, 1000)])
def test_the_preemption_timer_is_saved_if_the_control_says_so(save: bool, left: int) -> None:
    with world() as made:
        cpu = made.root()
        cpu.vmwrite(Field.PIN_CONTROLS, GOOD[Field.PIN_CONTROLS] | Pin.PREEMPTION_TIMER)
        cpu.vmwrite(Field.PREEMPTION_TIMER, 1000)
        cpu.vmwrite(Field.EXIT_CONTROLS, LEAVE | ExitControl.SAVE_TIMER if save else LEAVE)
        run_for(made.cores[0], 300)
        cpu.vmlaunch()
        assert cpu.vmread(Field.PREEMPTION_TIMER) == left


def test_time_is_the_guests_instructions_and_fixed_steps_of_root_mode() -> None:
    with world() as made:
        cpu = made.root()
        run_for(made.cores[0], 300)
        spent: list[int] = []
        for _ in range(2):
            before = cpu.tsc
            cpu.vmread(Field.GUEST_RIP)
            cpu.vmlaunch() if not spent else cpu.vmresume()
            spent.append(cpu.tsc - before)
        assert spent == [40 + 40 + 500 + 300 + 500] * 2
        assert cpu.statistics.guest_time == 600
        assert cpu.rdmsr(0x10) == cpu.tsc - 40


@pytest.mark.parametrize(("offsetting", "offset"), [(True, -100), (False, 0)])
def test_the_guests_tsc_is_the_processors_and_the_offset(offsetting: bool, offset: int) -> None:
    with world() as made:
        cpu, core = made.root(), made.cores[0]
        cpu.vmwrite(Field.TSC_OFFSET, -100 & (1 << 64) - 1)
        if offsetting:
            primary = GOOD[Field.PRIMARY_CONTROLS] | Primary.TSC_OFFSETTING
            cpu.vmwrite(Field.PRIMARY_CONTROLS, primary)
        core.statistics.instructions = 12345
        cpu.vmlaunch()
        controls = entered(made)[1]
        assert controls.primary & Primary.TSC_OFFSETTING
        seen = core.statistics.instructions + controls.tsc_offset & (1 << 64) - 1
        assert seen == cpu.tsc - 500 + offset  # 500: the exit
