"""KVM's structures for x86 that belong to the system and to a VM; see ``kvm.py``."""

# No "from __future__ import annotations": the layouts are built from the annotations themselves.

from ctypes import Array, Structure, Union, c_char, c_uint8, c_uint32, c_uint64
from typing import Annotated

from .kvm_types import layout, s16, s64, u8, u16, u32, u64

# --- System ------------------------------------------------------------------------------------


@layout
class MsrList(Structure):
    nmsrs: u32


@layout
class EnableCap(Structure):
    cap: u32
    flags: u32
    args: Annotated[Array[c_uint64], c_uint64 * 4]
    pad: Annotated[Array[c_uint8], c_uint8 * 64]


# --- Memory ------------------------------------------------------------------------------------


@layout
class DirtyLog(Structure):
    slot: u32
    padding1: u32
    padding2: u64  # the header's union: the bitmap's address


@layout
class ClearDirtyLog(Structure):
    slot: u32
    num_pages: u32
    first_page: u64
    padding2: u64  # the header's union: the bitmap's address


# --- Interrupts --------------------------------------------------------------------------------


@layout
class PicState(Structure):
    last_irr: u8
    irr: u8
    imr: u8
    isr: u8
    priority_add: u8
    irq_base: u8
    read_reg_select: u8
    poll: u8
    special_mask: u8
    init_state: u8
    auto_eoi: u8
    rotate_on_auto_eoi: u8
    special_fully_nested_mode: u8
    init4: u8
    elcr: u8
    elcr_mask: u8


@layout
class IoapicState(Structure):
    base_address: u64
    ioregsel: u32
    id: u32
    irr: u32
    pad: u32
    redirtbl: Annotated[Array[c_uint64], c_uint64 * 24]  # the header's union: bits


@layout
class _IrqchipState(Union):
    dummy: Annotated[Array[c_char], c_char * 512]
    pic: PicState
    ioapic: IoapicState


@layout
class Irqchip(Structure):
    chip_id: u32
    pad: u32
    chip: _IrqchipState


@layout
class PitChannelState(Structure):
    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: s64


@layout
class PitState2(Structure):
    channels: Annotated[Array[PitChannelState], PitChannelState * 3]
    flags: u32
    reserved: Annotated[Array[c_uint32], c_uint32 * 9]


@layout
class IrqRoutingIrqchip(Structure):
    irqchip: u32
    pin: u32


@layout
class IrqRoutingMsi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    devid: u32


@layout
class _IrqRoutingTarget(Union):
    irqchip: IrqRoutingIrqchip
    msi: IrqRoutingMsi
    pad: Annotated[Array[c_uint32], c_uint32 * 8]


@layout
class IrqRoutingEntry(Structure):
    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: _IrqRoutingTarget


@layout
class Msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 12]


# --- Time --------------------------------------------------------------------------------------


@layout
class ClockData(Structure):
    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


# --- Statistics --------------------------------------------------------------------------------


@layout
class StatsHeader(Structure):
    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@layout
class StatsDesc(Structure):
    flags: u32
    exponent: s16
    size: u16
    offset: u32
    bucket_size: u32


# --- MSR filter --------------------------------------------------------------------------------


@layout
class MsrFilterRange(Structure):
    flags: u32
    nmsrs: u32
    base: u32
    bitmap: u64  # the header's pointer


@layout
class MsrFilter(Structure):
    flags: u32
    ranges: Annotated[Array[MsrFilterRange], MsrFilterRange * 16]
