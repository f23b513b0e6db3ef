"""One virtual machine: its memory slots, its interrupts, its clock. api.rst: "vm ioctls".

The memory behind a slot must stay mapped until the VM is closed: KVM keeps its address.
Thread-safe as the kernel is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import addressof, c_char, c_uint64
from types import TracebackType

from hostel.abi import kvm as abi
from hostel.hypervisor import GsiRoute, MsiMessage
from hostel.memory import PAGE, Region

from .ioctl import call, call_with_address
from .lists import pack_routes
from .stats import Stats
from .vcpu import Vcpu


class Vm:
    """Made by ``System.create_vm``. Implements ``hypervisor.Vm``. A context manager."""

    def __init__(self, fd: int, vcpu_page_size: int) -> None:
        self.fd = fd
        self._vcpu_page_size = vcpu_page_size
        self._xsave_size = self.check(abi.CAP_XSAVE2)

    def check(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on this VM, api.rst §4.4."""
        return call(self.fd, "KVM_CHECK_EXTENSION", abi.CHECK_EXTENSION, capability)

    def enable(self, capability: int, *arguments: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP, api.rst §4.37; each capability's arguments: api.rst §7."""
        request = abi.EnableCap(cap=capability, flags=flags)
        request.args[: len(arguments)] = list(arguments)
        call(self.fd, f"KVM_ENABLE_CAP({capability})", abi.ENABLE_CAP, request)

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU, api.rst §4.7. ``id`` is the vCPU's APIC ID."""
        fd = call(self.fd, "KVM_CREATE_VCPU", abi.CREATE_VCPU, id)
        return Vcpu(fd, id, self._vcpu_page_size, self._xsave_size)

    # --- Memory ---

    def map(
        self, slot: int, region: Region, *, read_only: bool = False, log_dirty: bool = False
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION, api.rst §4.35. Mapping a slot anew changes its flags."""
        flags = abi.MEM_READONLY * read_only | abi.MEM_LOG_DIRTY_PAGES * log_dirty
        self._set_slot(slot, flags, region.gpa, region.size, region.hva)

    def unmap(self, slot: int) -> None:
        """KVM_SET_USER_MEMORY_REGION with size 0."""
        self._set_slot(slot, 0, 0, 0, 0)

    def _set_slot(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        request = abi.UserspaceMemoryRegion(slot, flags, gpa, size, hva)
        call(self.fd, "KVM_SET_USER_MEMORY_REGION", abi.SET_USER_MEMORY_REGION, request)

    def manual_dirty_log(self, *, initially_set: bool = False) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, api.rst §7.18: pages are protected again by
        ``clear_dirty_log`` only. ``initially_set``: a new log starts with all pages dirty."""
        flags = abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.DIRTY_LOG_INITIALLY_SET * initially_set
        self.enable(abi.CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)

    def dirty_log(self, slot: int, size: int) -> bytearray:
        """KVM_GET_DIRTY_LOG, api.rst §4.8: one bit a page of a slot of ``size`` bytes."""
        bitmap = bytearray(-(-size // PAGE // 64) * 8)
        request = abi.DirtyLog(slot=slot, padding2=_address(bitmap))
        call(self.fd, "KVM_GET_DIRTY_LOG", abi.GET_DIRTY_LOG, request)
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytearray) -> None:
        """KVM_CLEAR_DIRTY_LOG, api.rst §4.117. Both numbers are multiples of 64, or reach the end
        of the slot."""
        request = abi.ClearDirtyLog(slot, pages, first_page, _address(bitmap))
        call(self.fd, "KVM_CLEAR_DIRTY_LOG", abi.CLEAR_DIRTY_LOG, request)

    def set_tss_address(self, address: int) -> None:
        """KVM_SET_TSS_ADDR, api.rst §4.36: three pages that Intel without unrestricted guest
        needs for real mode."""
        call_with_address(self.fd, "KVM_SET_TSS_ADDR", abi.SET_TSS_ADDR, address)

    def set_identity_map_address(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR, api.rst §4.40: one page, likewise; before any vCPU."""
        request = c_uint64(address)
        call(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", abi.SET_IDENTITY_MAP_ADDR, request)

    # --- Interrupts ---

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP, api.rst §4.24: PIC, IOAPIC and each vCPU's LAPIC in the kernel."""
        call(self.fd, "KVM_CREATE_IRQCHIP", abi.CREATE_IRQCHIP)

    def create_chipset(self, reserved: int) -> None:
        """What our machine has in the kernel; ``reserved`` is where KVM keeps its identity map and TSS."""
        self.set_identity_map_address(reserved)
        self.set_tss_address(reserved + PAGE)
        self.create_irqchip()
        self.create_pit()

    def create_split_irqchip(self, pins: int = abi.IOAPIC_NUM_PINS) -> None:
        """KVM_CAP_SPLIT_IRQCHIP, api.rst §7.5: only the LAPICs in the kernel; an IOAPIC of
        ``pins`` pins is ours to model."""
        self.enable(abi.CAP_SPLIT_IRQCHIP, pins)

    def get_irqchip(self, chip: int) -> abi.Irqchip:
        """KVM_GET_IRQCHIP, api.rst §4.26: one of IRQCHIP_PIC_MASTER, _PIC_SLAVE, _IOAPIC."""
        state = abi.Irqchip(chip_id=chip)
        call(self.fd, "KVM_GET_IRQCHIP", abi.GET_IRQCHIP, state)
        return state

    def set_irqchip(self, state: abi.Irqchip) -> None:
        """KVM_SET_IRQCHIP, api.rst §4.27."""
        call(self.fd, "KVM_SET_IRQCHIP", abi.SET_IRQCHIP, state)

    def create_pit(self, *, speaker: bool = True) -> None:
        """KVM_CREATE_PIT2, api.rst §4.71; needs the in-kernel irqchip. ``speaker``: port 0x61 is
        answered in the kernel too."""
        request = abi.PitConfig(flags=abi.PIT_SPEAKER_DUMMY * speaker)
        call(self.fd, "KVM_CREATE_PIT2", abi.CREATE_PIT2, request)

    def get_pit(self) -> abi.PitState2:
        """KVM_GET_PIT2, api.rst §4.72."""
        state = abi.PitState2()
        call(self.fd, "KVM_GET_PIT2", abi.GET_PIT2, state)
        return state

    def set_pit(self, state: abi.PitState2) -> None:
        """KVM_SET_PIT2, api.rst §4.73."""
        call(self.fd, "KVM_SET_PIT2", abi.SET_PIT2, state)

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE, api.rst §4.25: set a pin of the in-kernel irqchip. Edges are two calls."""
        call(self.fd, "KVM_IRQ_LINE", abi.IRQ_LINE, abi.IrqLevel(gsi, level))

    def signal_msi(self, message: MsiMessage) -> bool:
        """KVM_SIGNAL_MSI, api.rst §4.71. False: the guest blocks it."""
        low, high = message.address & 0xFFFF_FFFF, message.address >> 32
        request = abi.Msi(address_lo=low, address_hi=high, data=message.data)
        return call(self.fd, "KVM_SIGNAL_MSI", abi.SIGNAL_MSI, request) > 0

    def set_gsi_routes(self, routes: Sequence[GsiRoute]) -> None:
        """KVM_SET_GSI_ROUTING, api.rst §4.52. The table replaces the one before, whole."""
        call(self.fd, "KVM_SET_GSI_ROUTING", abi.SET_GSI_ROUTING, pack_routes(routes))

    def irqfd(self, gsi: int, fd: int, *, assign: bool = True, resample: int | None = None) -> None:
        """KVM_IRQFD, api.rst §4.75: writing the eventfd ``fd`` raises ``gsi``. With ``resample``
        (an eventfd) the interrupt is level-triggered: the guest's EOI lowers it and is signalled.
        """
        flags = abi.IRQFD_FLAG_DEASSIGN * (not assign)
        flags |= abi.IRQFD_FLAG_RESAMPLE * (resample is not None)
        request = abi.Irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resample or 0)
        call(self.fd, "KVM_IRQFD", abi.IRQFD, request)

    def ioeventfd(
        self,
        address: int,
        size: int,
        fd: int,
        *,
        match: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        """KVM_IOEVENTFD, api.rst §4.59: a guest's write to ``address`` signals the eventfd ``fd``
        and does not exit to us. ``size`` 0: a write of any length (no ``match`` then)."""
        flags = abi.IOEVENTFD_FLAG_DATAMATCH * (match is not None)
        flags |= abi.IOEVENTFD_FLAG_PIO * pio | abi.IOEVENTFD_FLAG_DEASSIGN * (not assign)
        request = abi.Ioeventfd(datamatch=match or 0, addr=address, len=size, fd=fd, flags=flags)
        call(self.fd, "KVM_IOEVENTFD", abi.IOEVENTFD, request)

    # --- Time, MSRs, statistics ---

    def get_clock(self) -> abi.ClockData:
        """KVM_GET_CLOCK, api.rst §4.29: kvm-clock's nanoseconds."""
        clock = abi.ClockData()
        call(self.fd, "KVM_GET_CLOCK", abi.GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: abi.ClockData) -> None:
        """KVM_SET_CLOCK, api.rst §4.30."""
        call(self.fd, "KVM_SET_CLOCK", abi.SET_CLOCK, clock)

    def set_msr_filter(
        self, ranges: Sequence[tuple[int, int, bytearray, int]], *, allow_others: bool = True
    ) -> None:
        """KVM_X86_SET_MSR_FILTER, api.rst §4.97.

        Each range is (first MSR, how many, bitmap with 1 for allowed, MSR_FILTER_READ and _WRITE).
        What is denied reaches us as ``MsrExit`` if ``user_space_msrs`` asked for it, else #GP.
        """
        default = abi.MSR_FILTER_DEFAULT_ALLOW if allow_others else abi.MSR_FILTER_DEFAULT_DENY
        request = abi.MsrFilter(flags=default)
        for entry, (first, count, bitmap, flags) in zip(request.ranges, ranges, strict=False):
            entry.base, entry.nmsrs, entry.flags = first, count, flags
            entry.bitmap = _address(bitmap)
        call(self.fd, "KVM_X86_SET_MSR_FILTER", abi.X86_SET_MSR_FILTER, request)

    def user_space_msrs(self, reasons: int) -> None:
        """KVM_CAP_X86_USER_SPACE_MSR, api.rst §7.21: MSR accesses that KVM denies for one of
        these MSR_EXIT_REASON_* bits become ``MsrExit``."""
        self.enable(abi.CAP_X86_USER_SPACE_MSR, reasons)

    def open_stats(self) -> Stats:
        """KVM_GET_STATS_FD, api.rst §4.133."""
        return Stats(call(self.fd, "KVM_GET_STATS_FD", abi.GET_STATS_FD))

    def close(self) -> None:
        """The kernel ends the VM when its vCPUs, irqfds and ioeventfds are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _address(buffer: bytearray) -> int:
    return addressof(c_char.from_buffer(buffer)) if buffer else 0
