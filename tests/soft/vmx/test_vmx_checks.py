"""Every check of a VM entry, one mistake at a time: which error or exit, and the text that names it."""

from __future__ import annotations

from typing import Any

import pytest

from hostel.soft.silicon import Pin, Primary, Reason, Secondary
from hostel.soft.vmx.capabilities import EntryControl, ExitControl
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.leave import ENTRY_FAILURE
from hostel.soft.vmx.results import VmError, VmFail
from soft.vmx.vmx_world import GOOD, world

Changes = dict[Any, int]

PIN, PRIMARY, LEAVE, ENTRY = (
    GOOD[field]
    for field in (
        Field.PIN_CONTROLS,
        Field.PRIMARY_CONTROLS,
        Field.EXIT_CONTROLS,
        Field.ENTRY_CONTROLS,
    )
)
FAR = 1 << 40
"""Beyond MAXPHYADDR."""
HOLE = 1 << 50
"""Not canonical."""
VALID = 1 << 31


def secondary(bits: int) -> Changes:
    return {Field.PRIMARY_CONTROLS: PRIMARY | Primary.SECONDARY, Field.SECONDARY_CONTROLS: bits}


def with_ept(bits: int = 0) -> Changes:
    return secondary(bits | Secondary.EPT) | {Field.EPT_POINTER: 0x301E}


def inject(info: int, **more: int) -> Changes:
    return {Field.ENTRY_INTERRUPTION_INFO: VALID | info} | {
        Field[name]: value for name, value in more.items()
    }


CONTROLS: list[tuple[Changes, str]] = [
    ({Field.PIN_CONTROLS: PIN | 1 << 7}, "reserved bits of the pin-based"),
    ({Field.PIN_CONTROLS: PIN & ~2}, "reserved bits of the pin-based"),
    ({Field.PRIMARY_CONTROLS: PRIMARY | 1 << 21}, "reserved bits of the primary"),
    (secondary(1), "reserved bits of the secondary"),
    ({Field.CR3_TARGET_COUNT: 5}, "CR3 targets"),
    ({Field.PRIMARY_CONTROLS: PRIMARY | Primary.IO_BITMAPS, Field.IO_BITMAP_A: 0x10}, "I/O bitmap"),
    ({Field.PRIMARY_CONTROLS: PRIMARY | Primary.IO_BITMAPS, Field.IO_BITMAP_B: FAR}, "I/O bitmap"),
    (
        {Field.PRIMARY_CONTROLS: PRIMARY | Primary.MSR_BITMAPS, Field.MSR_BITMAP: 0x800},
        "MSR bitmaps",
    ),
    ({Field.PIN_CONTROLS: PIN | Pin.VIRTUAL_NMI}, "virtual NMIs"),
    ({Field.PRIMARY_CONTROLS: PRIMARY | Primary.NMI_WINDOW}, "NMI-window"),
    (secondary(Secondary.VPID), "VPID"),
    (secondary(Secondary.EPT) | {Field.EPT_POINTER: 0x3019}, "EPT pointer"),
    (secondary(Secondary.EPT) | {Field.EPT_POINTER: 0x3016}, "EPT pointer"),
    (secondary(Secondary.EPT) | {Field.EPT_POINTER: 0x309E}, "EPT pointer"),
    (secondary(Secondary.EPT) | {Field.EPT_POINTER: FAR | 0x1E}, "EPT pointer"),
    (secondary(Secondary.UNRESTRICTED_GUEST), "unrestricted guest without EPT"),
    ({Field.EXIT_CONTROLS: LEAVE | 1 << 12}, "reserved bits of the VM-exit"),
    ({Field.EXIT_CONTROLS: LEAVE | ExitControl.SAVE_TIMER}, "preemption timer"),
    ({Field.EXIT_MSR_STORE_COUNT: 1, Field.EXIT_MSR_STORE_ADDRESS: 8}, "VM-exit MSR-store"),
    ({Field.EXIT_MSR_LOAD_COUNT: 2, Field.EXIT_MSR_LOAD_ADDRESS: FAR - 16}, "end of the"),
    ({Field.EXIT_MSR_LOAD_COUNT: 513, Field.EXIT_MSR_LOAD_ADDRESS: 0}, "512"),
    ({Field.ENTRY_CONTROLS: ENTRY | 1 << 10}, "reserved bits of the VM-entry"),
    (inject(1 << 8), "interruption type"),
    (inject(7 << 8), "interruption type"),
    (inject(2 << 8 | 3), "NMI whose vector"),
    (inject(3 << 8 | 32), "above 31"),
    (inject(3 << 8 | 14), "deliver-error-code"),
    (inject(3 << 8 | 1 << 11 | 6), "deliver-error-code"),
    (inject(1 << 11 | 32), "deliver-error-code"),
    (inject(1 << 12 | 32), "reserved bits of the interruption"),
    (inject(3 << 8 | 1 << 11 | 14, ENTRY_EXCEPTION_ERROR=1 << 16), "bits 31:16"),
    (inject(4 << 8 | 0x80), "instruction length"),
    (inject(6 << 8 | 3, ENTRY_INSTRUCTION_LENGTH=16), "instruction length"),
    ({Field.ENTRY_MSR_LOAD_COUNT: 1, Field.ENTRY_MSR_LOAD_ADDRESS: FAR}, "VM-entry MSR-load"),
]

HOST: list[tuple[Changes, str]] = [
    ({Field.HOST_CR0: 0x31}, "host CR0"),
    ({Field.HOST_CR4: 0x20}, "host CR4"),
    ({Field.HOST_CR4: 0x2020 | 1 << 12}, "host CR4"),
    ({Field.HOST_CR3: FAR}, "host CR3"),
    ({Field.HOST_SYSENTER_ESP: HOLE}, "HOST_SYSENTER_ESP"),
    ({Field.HOST_SYSENTER_EIP: HOLE}, "HOST_SYSENTER_EIP"),
    ({Field.EXIT_CONTROLS: LEAVE | ExitControl.LOAD_PAT, Field.HOST_PAT: 2}, "host PAT"),
    ({Field.EXIT_CONTROLS: LEAVE | ExitControl.LOAD_EFER, Field.HOST_EFER: 0x502}, "reserved bits"),
    ({Field.EXIT_CONTROLS: LEAVE | ExitControl.LOAD_EFER, Field.HOST_EFER: 0x100}, "LMA and LME"),
    ({Field.HOST_DS_SELECTOR: 0x13}, "HOST_DS_SELECTOR"),
    ({Field.HOST_TR_SELECTOR: 0x1C}, "HOST_TR_SELECTOR"),
    ({Field.HOST_CS_SELECTOR: 0}, "host CS is null"),
    ({Field.HOST_TR_SELECTOR: 0}, "host TR is null"),
    ({Field.HOST_GS_BASE: HOLE}, "HOST_GS_BASE"),
    ({Field.HOST_IDTR_BASE: HOLE}, "HOST_IDTR_BASE"),
    ({Field.EXIT_CONTROLS: LEAVE & ~ExitControl.HOST_64}, "address-space size"),
    ({Field.HOST_CR4: 0x2000}, "CR4.PAE"),
    ({Field.HOST_RIP: HOLE}, "host RIP"),
]

LONG_OFF = {Field.ENTRY_CONTROLS: ENTRY & ~EntryControl.GUEST_64}
"""A 32-bit guest without PAE, whose TSS is fine for that too."""
V8086 = LONG_OFF | {
    Field.GUEST_CR4: 0x2000,
    Field.GUEST_RFLAGS: 1 << 17 | 2,
    **{field: 0xF3 for field in range(Field.GUEST_ES_RIGHTS, Field.GUEST_GS_RIGHTS + 2, 2)},
    **{field: 0xFFFF for field in range(Field.GUEST_ES_LIMIT, Field.GUEST_GS_LIMIT + 2, 2)},
    **{field: 0x1000 for field in range(Field.GUEST_ES_SELECTOR, Field.GUEST_GS_SELECTOR + 2, 2)},
    **{field: 0x1_0000 for field in range(Field.GUEST_ES_BASE, Field.GUEST_GS_BASE + 2, 2)},
}
REAL = (
    with_ept(Secondary.UNRESTRICTED_GUEST)
    | LONG_OFF
    | {Field.GUEST_CR0: 0x30, Field.GUEST_CR4: 0x2000}
)
EXTERNAL = inject(0x20)
NMI = inject(2 << 8 | 2)

GUEST: list[tuple[Changes, str, int]] = [
    ({Field.GUEST_CR0: 0x8000_0011}, "CR0", 0),
    ({Field.GUEST_CR0: 0x31}, "CR0", 0),
    (
        with_ept(Secondary.UNRESTRICTED_GUEST) | {Field.GUEST_CR0: 0x8000_0030},
        "PG without CR0.PE",
        0,
    ),
    ({Field.GUEST_CR4: 0x20}, "CR4", 0),
    (
        {Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_DEBUG, Field.GUEST_DEBUGCTL: 4},
        "DEBUGCTL",
        0,
    ),
    ({Field.GUEST_CR4: 0x2000}, "without PG and PAE", 0),
    ({Field.GUEST_CR3: FAR}, "CR3", 0),
    ({Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_DEBUG, Field.GUEST_DR7: 1 << 32}, "DR7", 0),
    ({Field.GUEST_SYSENTER_ESP: HOLE}, "SYSENTER_ESP", 0),
    ({Field.GUEST_SYSENTER_EIP: HOLE}, "SYSENTER_EIP", 0),
    ({Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_PAT, Field.GUEST_PAT: 3}, "PAT", 0),
    (
        {Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_EFER, Field.GUEST_EFER: 0x502},
        "reserved bits of EFER",
        0,
    ),
    ({Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_EFER, Field.GUEST_EFER: 0}, "EFER.LMA", 0),
    (
        {Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_EFER, Field.GUEST_EFER: 0x400},
        "LMA and LME",
        0,
    ),
    ({Field.GUEST_TR_SELECTOR: 0x1C}, "TI of the selector of tr", 0),
    (
        {Field.GUEST_LDTR_RIGHTS: 0x82, Field.GUEST_LDTR_SELECTOR: 0x2C},
        "TI of the selector of ldtr",
        0,
    ),
    ({Field.GUEST_SS_SELECTOR: 0x13}, "RPL of ss", 0),
    ({Field.GUEST_TR_BASE: HOLE}, "base of tr", 0),
    ({Field.GUEST_FS_BASE: HOLE}, "base of fs", 0),
    ({Field.GUEST_LDTR_RIGHTS: 0x82, Field.GUEST_LDTR_BASE: HOLE}, "base of ldtr", 0),
    ({Field.GUEST_CS_BASE: 1 << 32}, "base of cs", 0),
    ({Field.GUEST_DS_BASE: 1 << 32}, "base of ds", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA093}, "type of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA08B}, "S of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA0FB}, "DPL of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA0FF}, "DPL of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA01B}, "P of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xA19B}, "bits 11:8 of the rights of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0xE09B}, "D/B", 0),
    ({Field.GUEST_CS_LIMIT: 0xFFFF_FFFE}, "G of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0x209B}, "G of cs", 0),
    ({Field.GUEST_CS_RIGHTS: 0x2_A09B}, "bits 31:17 of the rights of cs", 0),
    ({Field.GUEST_SS_RIGHTS: 0xC091}, "type of ss", 0),
    ({Field.GUEST_SS_RIGHTS: 0xC083}, "S of ss", 0),
    ({Field.GUEST_SS_RIGHTS: 0xC0F3, Field.GUEST_CS_RIGHTS: 0xA0FB}, "DPL of ss", 0),
    ({Field.GUEST_SS_RIGHTS: 0xC013}, "P of ss", 0),
    ({Field.GUEST_DS_RIGHTS: 0xC092}, "type of ds", 0),
    ({Field.GUEST_ES_RIGHTS: 0xC099}, "type of es", 0),
    ({Field.GUEST_FS_RIGHTS: 0xC083}, "S of fs", 0),
    ({Field.GUEST_GS_SELECTOR: 0x13}, "DPL of gs", 0),
    ({Field.GUEST_ES_RIGHTS: 0xC013}, "P of es", 0),
    ({Field.GUEST_DS_LIMIT: 0x12_3456}, "G of ds", 0),
    ({Field.GUEST_TR_RIGHTS: 0x83}, "type of tr", 0),
    ({Field.GUEST_TR_RIGHTS: 0x9B}, "S of tr", 0),
    ({Field.GUEST_TR_RIGHTS: 0x0B}, "P of tr", 0),
    ({Field.GUEST_TR_RIGHTS: 0x1_008B}, "tr is unusable", 0),
    ({Field.GUEST_LDTR_RIGHTS: 0x83}, "type of ldtr", 0),
    ({Field.GUEST_LDTR_RIGHTS: 0x02}, "P of ldtr", 0),
    (V8086 | {Field.GUEST_DS_BASE: 0}, "base of ds in virtual-8086", 0),
    (V8086 | {Field.GUEST_SS_LIMIT: 0xFFFE}, "limit of ss in virtual-8086", 0),
    (V8086 | {Field.GUEST_CS_RIGHTS: 0x93}, "rights of cs in virtual-8086", 0),
    (REAL | {Field.GUEST_SS_RIGHTS: 0xC0F3, Field.GUEST_CS_RIGHTS: 0xC0FB}, "DPL of ss", 0),
    (REAL | {Field.GUEST_CS_RIGHTS: 0xC0F3}, "DPL of cs", 0),
    ({Field.GUEST_GDTR_BASE: HOLE}, "GDTR_BASE", 0),
    ({Field.GUEST_IDTR_LIMIT: 0x1_0000}, "IDTR_LIMIT", 0),
    ({Field.GUEST_RIP: HOLE}, "RIP", 0),
    (LONG_OFF | {Field.GUEST_CR4: 0x2000, Field.GUEST_RIP: 1 << 32}, "RIP", 0),
    ({Field.GUEST_RFLAGS: 0}, "RFLAGS", 0),
    ({Field.GUEST_RFLAGS: 0xA}, "RFLAGS", 0),
    ({Field.GUEST_RFLAGS: 1 << 22 | 2}, "RFLAGS", 0),
    (EXTERNAL, "RFLAGS.IF is 0", 0),
    ({Field.GUEST_ACTIVITY: 4}, "activity state", 0),
    (
        {Field.GUEST_ACTIVITY: 1, Field.GUEST_SS_SELECTOR: 0x13, Field.GUEST_CS_SELECTOR: 0xB}
        | {Field.GUEST_SS_RIGHTS: 0xC0F3, Field.GUEST_CS_RIGHTS: 0xA0FB},
        "HLT state",
        0,
    ),
    ({Field.GUEST_ACTIVITY: 1, Field.GUEST_INTERRUPTIBILITY: 2}, "not active", 0),
    ({Field.GUEST_ACTIVITY: 1} | inject(3 << 8 | 6), "event for this activity", 0),
    ({Field.GUEST_ACTIVITY: 2, Field.GUEST_RFLAGS: 0x202} | EXTERNAL, "event for this activity", 0),
    ({Field.GUEST_ACTIVITY: 3} | NMI, "event for this activity", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 0x10}, "reserved bits of the interruptibility", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 3, Field.GUEST_RFLAGS: 0x202}, "by STI and by MOV SS", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 1}, "RFLAGS.IF 0", 0),
    (
        {Field.GUEST_INTERRUPTIBILITY: 2, Field.GUEST_RFLAGS: 0x202} | EXTERNAL,
        "guest that blocks it",
        0,
    ),
    ({Field.GUEST_INTERRUPTIBILITY: 2} | NMI, "blocked by MOV SS", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 4}, "SMI", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 1, Field.GUEST_RFLAGS: 0x202} | NMI, "blocked by STI", 3),
    (
        {Field.PIN_CONTROLS: PIN | Pin.NMI | Pin.VIRTUAL_NMI, Field.GUEST_INTERRUPTIBILITY: 8}
        | NMI,
        "blocked by another",
        0,
    ),
    ({Field.GUEST_PENDING_DEBUG: 1 << 4}, "reserved bits of pending", 0),
    ({Field.GUEST_INTERRUPTIBILITY: 2, Field.GUEST_RFLAGS: 0x102}, "single step", 0),
    ({Field.VMCS_LINK_POINTER: 0x800}, "link pointer", 4),
    ({Field.VMCS_LINK_POINTER: 0x7000}, "revision", 4),
    ({Field.VMCS_LINK_POINTER: 0x2000}, "to the current", 4),
    (LONG_OFF | with_ept() | {Field.GUEST_PDPTE1: 3}, "PDPTE 1", 2),
]


def names(table: list[tuple[Changes, str]] | list[tuple[Changes, str, int]]) -> list[str]:
    return [f"{number}: {row[1]}" for number, row in enumerate(table)]


def change(cpu: object, changes: Changes) -> None:
    for field, value in changes.items():
        cpu.vmwrite(field, value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("changes", "what"), CONTROLS, ids=names(CONTROLS))
def test_a_wrong_control_is_error_7(changes: Changes, what: str) -> None:
    with world() as made:
        cpu = made.root()
        change(cpu, changes)
        with pytest.raises(VmFail, match=what) as caught:
            cpu.vmlaunch()
        assert caught.value.error is VmError.ENTRY_CONTROLS
        assert cpu.vmread(Field.INSTRUCTION_ERROR) == 7
        assert made.cores[0].entries == []


@pytest.mark.parametrize(("changes", "what"), HOST, ids=names(HOST))
def test_a_wrong_host_state_is_error_8(changes: Changes, what: str) -> None:
    with world() as made:
        cpu = made.root()
        change(cpu, changes)
        with pytest.raises(VmFail, match=what) as caught:
            cpu.vmlaunch()
        assert caught.value.error is VmError.ENTRY_HOST_STATE
        assert cpu.vmread(Field.INSTRUCTION_ERROR) == 8


@pytest.mark.parametrize(("changes", "what", "qualification"), GUEST, ids=names(GUEST))
def test_a_wrong_guest_state_is_exit_33(changes: Changes, what: str, qualification: int) -> None:
    with world() as made:
        cpu = made.root()
        change(cpu, changes)
        out = cpu.vmlaunch()
        assert (out.reason, out.qualification) == (Reason.ENTRY_GUEST_STATE, qualification)
        assert what in cpu.entry_failure
        assert cpu.vmread(Field.EXIT_REASON) == 33 | ENTRY_FAILURE
        assert cpu.vmread(Field.EXIT_QUALIFICATION) == qualification
        assert cpu.state.rip == GOOD[Field.HOST_RIP]
        assert made.cores[0].entries == []
        with pytest.raises(VmFail, match="VMRESUME_NOT_LAUNCHED"):
            cpu.vmresume()  # a failed VMLAUNCH leaves the launch state clear


RIGHT: list[Changes] = [
    {},
    REAL,
    V8086,
    with_ept() | {Field.EPT_POINTER: 0x305E},
    secondary(Secondary.VPID) | {Field.VPID: 1},
    LONG_OFF | {Field.GUEST_CR4: 0x2000, Field.GUEST_TR_RIGHTS: 0x83},
    {Field.GUEST_RFLAGS: 0x202} | EXTERNAL,
    {Field.GUEST_ACTIVITY: 1, Field.GUEST_RFLAGS: 0x202} | EXTERNAL,
    inject(3 << 8 | 1 << 11 | 14, ENTRY_EXCEPTION_ERROR=2),
    inject(4 << 8 | 0x80, ENTRY_INSTRUCTION_LENGTH=2),
    {Field.GUEST_SS_RIGHTS: 0x10000, Field.GUEST_SS_SELECTOR: 0},
    {Field.ENTRY_CONTROLS: ENTRY | EntryControl.LOAD_EFER, Field.GUEST_EFER: 0xD01},
    {Field.SECONDARY_CONTROLS: 0xFFFF},
    {Field.GUEST_DEBUGCTL: 0xFFFF, Field.GUEST_PAT: 2, Field.GUEST_EFER: 0xFFFF},
]
"""The last two: not activated, not loaded; so not looked at."""


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_a_right_state_is_entered(changes: Changes) -> None:
    with world() as made:
        cpu = made.root()
        change(cpu, changes)
        assert cpu.vmlaunch().reason is Reason.HLT, cpu.entry_failure
        assert len(made.cores[0].entries) == 1


@pytest.mark.parametrize(("changes", "what"), [*CONTROLS, *HOST], ids=names([*CONTROLS, *HOST]))
def test_a_mistake_after_a_good_entry_is_found_too(changes: Changes, what: str) -> None:
    """What an entry found right is not looked at again until it is written."""
    with world() as made:
        cpu = made.root()
        cpu.vmlaunch()
        change(cpu, changes)
        with pytest.raises(VmFail, match=what):
            cpu.vmresume()


@pytest.mark.parametrize(("changes", "what", "qualification"), GUEST, ids=names(GUEST))
def test_so_is_a_wrong_guest(changes: Changes, what: str, qualification: int) -> None:
    with world() as made:
        cpu = made.root()
        cpu.vmlaunch()
        change(cpu, changes)
        assert cpu.vmresume().reason is Reason.ENTRY_GUEST_STATE
        assert what in cpu.entry_failure


def test_controls_are_checked_before_the_host_and_the_host_before_the_guest() -> None:
    with world() as made:
        cpu = made.root()
        for field in (Field.PIN_CONTROLS, Field.HOST_CR0, Field.GUEST_CR0):
            cpu.vmwrite(field, 0)
        ends = []
        for field in (Field.PIN_CONTROLS, Field.HOST_CR0):
            with pytest.raises(VmFail) as caught:
                cpu.vmlaunch()
            ends.append(caught.value.error)
            cpu.vmwrite(field, GOOD[field])
        assert ends == [VmError.ENTRY_CONTROLS, VmError.ENTRY_HOST_STATE]
        assert cpu.vmlaunch().reason is Reason.ENTRY_GUEST_STATE
