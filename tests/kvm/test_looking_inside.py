"""Guest debug, address translation, dirty pages, statistics: what the x-ray is made of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guests.tiny import CODE, TinyGuest
from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import DebugExit, HaltExit, MmioExit, PioExit
from hostel.memory import PAGE

pytestmark = pytest.mark.kvm
DB, BP = 1, 3


def test_single_steps() -> None:
    with TinyGuest("nop; nop; inc %eax; hlt") as guest:
        guest.vcpu.set_guest_debug(abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP)
        places = []
        for _ in range(3):
            exit = guest.run()
            assert isinstance(exit, DebugExit)
            assert exit.exception == DB
            places.append(exit.pc - CODE)
        assert places == [1, 2, 4]
        guest.vcpu.set_guest_debug(0)
        assert isinstance(guest.run(), HaltExit)


HARDWARE = {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split())
IN_TESTBED = os.environ.get("HOSTEL_TESTBED") == "1"


@pytest.mark.skipif(
    IN_TESTBED or not HARDWARE,
    reason="QEMU's emulated SVM does not intercept int3, and an interpreted ring 0 does not know it",
)
def test_a_software_breakpoint() -> None:
    with TinyGuest("nop; int3; hlt") as guest:
        guest.vcpu.set_guest_debug(abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_SW_BP)
        exit = guest.run()
        assert isinstance(exit, DebugExit)
        assert (exit.exception, exit.pc) == (BP, CODE + 1)


@pytest.mark.skipif(IN_TESTBED, reason="QEMU's emulated SVM does not load the VMCB's DR7")
def test_a_hardware_breakpoint() -> None:
    with TinyGuest("nop; nop; nop; hlt") as guest:
        dr7 = 0x402  # breakpoint 0 on execution, global (SDM vol. 3B §18.2.4)
        guest.vcpu.set_guest_debug(
            abi.GUESTDBG_ENABLE | abi.GUESTDBG_USE_HW_BP, [CODE + 2, 0, 0, 0, 0, 0, 0, dr7]
        )
        exit = guest.run()
        assert isinstance(exit, DebugExit)
        assert (exit.exception, exit.pc, exit.dr6 & 1) == (DB, CODE + 2, 1)


def test_translate_walks_the_guests_page_tables() -> None:
    with TinyGuest("hlt") as guest:
        guest.memory.write_u64(0x3000 + 8 * 5, 0x20_0000 | 0x83)  # GVA 10 MiB → GPA 2 MiB
        found = guest.vcpu.translate(0xA0_0123)
        assert (found.valid, found.physical_address) == (1, 0x20_0123)
        assert guest.vcpu.translate(1 << 40).valid == 0


def test_the_dirty_log_names_the_pages_written() -> None:
    code = "movb $1, 0x6000; movb $1, 0x10000; hlt"
    with TinyGuest(code) as guest:
        region = guest.memory.regions[0]
        guest.vm.map(0, region, log_dirty=True)
        guest.vm.dirty_log(0, region.size)
        assert isinstance(guest.run(), HaltExit)
        pages = dirty_pages(guest.vm.dirty_log(0, region.size))
        assert {0x6000, 0x10000} <= pages
        assert 0x11000 not in pages
        assert dirty_pages(guest.vm.dirty_log(0, region.size)) == set()


def test_a_manual_dirty_log_keeps_pages_until_they_are_cleared() -> None:
    with TinyGuest("again: movb $1, 0x6000; out %al, $0x10; jmp again") as guest:
        guest.vm.manual_dirty_log()
        region = guest.memory.regions[0]
        guest.vm.map(0, region, log_dirty=True)
        assert isinstance(guest.run(), PioExit)
        bitmap = guest.vm.dirty_log(0, region.size)
        assert 0x6000 in dirty_pages(guest.vm.dirty_log(0, region.size))
        guest.vm.clear_dirty_log(0, 0, region.size // PAGE, bitmap)
        assert 0x6000 not in dirty_pages(guest.vm.dirty_log(0, region.size))
        assert isinstance(guest.run(), PioExit)
        assert 0x6000 in dirty_pages(guest.vm.dirty_log(0, region.size))


def dirty_pages(bitmap: bytearray) -> set[int]:
    return {page * PAGE for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1}


def test_a_read_only_slot_sends_writes_to_us() -> None:
    """Real mode: page tables in such a slot would be written too, for their accessed bits."""
    with TinyGuest("mov 0x6000, %al; movb $9, 0x6000; hlt", bits=16) as guest:
        region = guest.memory.regions[0]
        guest.memory.write(0x6000, b"\x55")
        guest.vm.unmap(0)
        guest.vm.map(0, region, read_only=True)
        exit = guest.run()
        assert isinstance(exit, MmioExit)
        assert (exit.address, exit.is_write, bytes(exit.data)) == (0x6000, True, b"\x09")
        assert guest.vcpu.get_regs().rax & 0xFF == 0x55
        assert guest.memory.read(0x6000, 1) == b"\x55"


def test_slots_that_overlap_are_refused() -> None:
    with TinyGuest("hlt") as guest:
        with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION failed: File exists"):
            guest.vm.map(1, guest.memory.regions[0])
        with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG failed"):
            guest.vm.dirty_log(0, 4 << 20)  # the slot keeps no log


def test_statistics_count_exits() -> None:
    with TinyGuest("out %al, $0x10; out %al, $0x10; hlt") as guest:
        stats = guest.vcpu.open_stats()
        try:
            before = stats.read()
            for _ in range(3):
                guest.run()
            after = stats.read()
        finally:
            stats.close()
        exits = (before["exits"], after["exits"])
        assert isinstance(exits[0], int)
        assert isinstance(exits[1], int)
        assert exits[1] - exits[0] >= 3
        assert any(isinstance(value, list) for value in after.values())  # a histogram


def test_statistics_of_the_vm() -> None:
    with TinyGuest("hlt") as guest:
        stats = guest.vm.open_stats()
        values = stats.read()
        stats.close()
        assert "remote_tlb_flush" in values
