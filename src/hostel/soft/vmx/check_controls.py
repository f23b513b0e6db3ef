"""VM entry's checks of the control fields (SDM vol. 3C §26.2.1), in the manual's order.

Each check is what must hold, and where the manual says so; the first that does not is VMfailValid(7).
"""

from __future__ import annotations

from collections.abc import Iterator

from hostel.soft.exceptions import WITH_ERROR_CODE
from hostel.soft.silicon import EventType, Pin, Primary, Secondary
from hostel.soft.state import CR0_PE
from hostel.soft.vmx.capabilities import (
    CR3_TARGETS,
    MSR_LIST_LIMIT,
    MSR_VMX_SECONDARY,
    MSR_VMX_TRUE_ENTRY,
    MSR_VMX_TRUE_EXIT,
    MSR_VMX_TRUE_PIN,
    MSR_VMX_TRUE_PRIMARY,
    ExitControl,
    fits,
    unsupported,
)
from hostel.soft.vmx.enter import EVENT_ERROR, EVENT_VALID, secondary_of
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.vmcs import Vmcs

Checks = Iterator[tuple[bool, str]]


def check_controls(vmcs: Vmcs) -> Checks:
    yield from _execution_controls(vmcs)
    yield from _exit_controls(vmcs)
    yield from _entry_controls(vmcs)


def _aligned(address: int) -> bool:
    return not address & 0xFFF and fits(address)


def _execution_controls(vmcs: Vmcs) -> Checks:
    read = vmcs.read
    pin, primary = read(Field.PIN_CONTROLS), read(Field.PRIMARY_CONTROLS)
    secondary = secondary_of(vmcs)
    yield (
        not unsupported(pin, MSR_VMX_TRUE_PIN),
        "§26.2.1.1: reserved bits of the pin-based controls",
    )
    yield (
        not unsupported(primary, MSR_VMX_TRUE_PRIMARY),
        "§26.2.1.1: reserved bits of the primary processor-based controls",
    )
    yield (
        not unsupported(secondary, MSR_VMX_SECONDARY),
        "§26.2.1.1: reserved bits of the secondary processor-based controls",
    )
    yield read(Field.CR3_TARGET_COUNT) <= CR3_TARGETS, "§26.2.1.1: more than 4 CR3 targets"
    if primary & Primary.IO_BITMAPS:
        for field in (Field.IO_BITMAP_A, Field.IO_BITMAP_B):
            yield _aligned(read(field)), "§26.2.1.1: address of an I/O bitmap"
    if primary & Primary.MSR_BITMAPS:
        yield _aligned(read(Field.MSR_BITMAP)), "§26.2.1.1: address of the MSR bitmaps"
    yield from _nmi_controls(pin, primary)
    if secondary & Secondary.VPID:
        yield read(Field.VPID) != 0, "§26.2.1.1: VPID enabled and 0"
    if secondary & Secondary.EPT:
        yield valid_eptp(read(Field.EPT_POINTER)), "§26.2.1.1: EPT pointer"
    yield (
        not secondary & Secondary.UNRESTRICTED_GUEST or bool(secondary & Secondary.EPT),
        "§26.2.1.1: unrestricted guest without EPT",
    )


def _nmi_controls(pin: int, primary: int) -> Checks:
    yield (
        bool(pin & Pin.NMI) or not pin & Pin.VIRTUAL_NMI,
        "§26.2.1.1: virtual NMIs without NMI exiting",
    )
    yield (
        bool(pin & Pin.VIRTUAL_NMI) or not primary & Primary.NMI_WINDOW,
        "§26.2.1.1: NMI-window exiting without virtual NMIs",
    )


def valid_eptp(eptp: int) -> bool:
    """UC or WB, a walk of four levels (length minus 1: bits 5:3), nothing reserved (§24.6.11)."""
    return eptp & 7 in (0, 6) and eptp >> 3 & 7 == 3 and not eptp & 0xF80 and fits(eptp)


def _msr_area(vmcs: Vmcs, count: Field, address: Field, what: str) -> Checks:
    """§26.2.1.2, §26.2.1.3: an area of 16-byte entries."""
    number, first = vmcs.read(count), vmcs.read(address)
    if number:
        yield not first & 0xF and fits(first), f"address of the {what} area"
        yield fits(first + number * 16 - 1), f"end of the {what} area"
        yield number <= MSR_LIST_LIMIT, f"more than {MSR_LIST_LIMIT} entries in the {what} area"


def _exit_controls(vmcs: Vmcs) -> Checks:
    leave = vmcs.read(Field.EXIT_CONTROLS)
    yield (
        not unsupported(leave, MSR_VMX_TRUE_EXIT),
        "§26.2.1.2: reserved bits of the VM-exit controls",
    )
    yield (
        bool(vmcs.read(Field.PIN_CONTROLS) & Pin.PREEMPTION_TIMER)
        or not leave & ExitControl.SAVE_TIMER,
        "§26.2.1.2: saving the preemption timer that is not activated",
    )
    yield from _msr_area(
        vmcs,
        Field.EXIT_MSR_STORE_COUNT,
        Field.EXIT_MSR_STORE_ADDRESS,
        "§26.2.1.2: VM-exit MSR-store",
    )
    yield from _msr_area(
        vmcs, Field.EXIT_MSR_LOAD_COUNT, Field.EXIT_MSR_LOAD_ADDRESS, "§26.2.1.2: VM-exit MSR-load"
    )


def _entry_controls(vmcs: Vmcs) -> Checks:
    yield (
        not unsupported(vmcs.read(Field.ENTRY_CONTROLS), MSR_VMX_TRUE_ENTRY),
        "§26.2.1.3: reserved bits of the VM-entry controls",
    )
    yield from _msr_area(
        vmcs,
        Field.ENTRY_MSR_LOAD_COUNT,
        Field.ENTRY_MSR_LOAD_ADDRESS,
        "§26.2.1.3: VM-entry MSR-load",
    )


def check_event(vmcs: Vmcs) -> Checks:
    """§26.2.1.3: event injection. Checked at every entry."""
    info = vmcs.read(Field.ENTRY_INTERRUPTION_INFO)
    if not info & EVENT_VALID:
        return
    kind, vector = info >> 8 & 7, info & 0xFF
    yield kind not in (1, 7), "§26.2.1.3: interruption type of the injected event"
    yield kind != EventType.NMI or vector == 2, "§26.2.1.3: an NMI whose vector is not 2"
    yield (
        kind != EventType.HARDWARE_EXCEPTION or vector <= 31,
        "§26.2.1.3: a hardware exception whose vector is above 31",
    )
    yield from _error_code(vmcs, info, kind, vector)
    if kind >= EventType.SOFTWARE_INTERRUPT:
        length = vmcs.read(Field.ENTRY_INSTRUCTION_LENGTH)
        yield 1 <= length <= 15, "§26.2.1.3: instruction length of a software event"


def _error_code(vmcs: Vmcs, info: int, kind: int, vector: int) -> Checks:
    protected = vmcs.read(Field.GUEST_CR0) & CR0_PE or not (
        secondary_of(vmcs) & (Secondary.UNRESTRICTED_GUEST | Secondary.PAGED_REAL_MODE)
    )
    wanted = bool(protected) and kind == EventType.HARDWARE_EXCEPTION and vector in WITH_ERROR_CODE
    yield bool(info & EVENT_ERROR) == wanted, "§26.2.1.3: deliver-error-code bit"
    yield not info & 0x7FFF_F000, "§26.2.1.3: reserved bits of the interruption information"
    if info & EVENT_ERROR:
        yield (
            not vmcs.read(Field.ENTRY_EXCEPTION_ERROR) >> 16,
            "§26.2.1.3: bits 31:16 of the exception error code",
        )
