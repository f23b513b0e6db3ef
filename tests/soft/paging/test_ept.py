"""EPT and NPT as the hypervisor makes them."""

from __future__ import annotations

import pytest

from hostel.memory import GuestMemory
from hostel.soft.paging.ept import EptPaging
from hostel.soft.paging.guest_map import GuestMap
from hostel.soft.paging.nested import FINAL, LINEAR_VALID
from hostel.soft.paging.tlb import Invept
from hostel.soft.paging.virtualizer import RETRY, Do, Flush, Registers, Scope
from hostel.soft.paging.walk import Walk, look_up
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Access, EptFault
from hostel.soft.state import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, CpuState
from soft.paging.rig import ROM, Machine

GIB, MIB = 1 << 30, 1 << 20
READ, WRITE, EXECUTE = 1, 2, 4


def test_pages_as_large_as_alignment_lets_them_be() -> None:
    with PhysicalMemory(64) as physical:
        guest_map = GuestMap(physical)
        guest_map.add(0, GIB + 5 * MIB, 8 * GIB)
        guest_map.add(4 * GIB + 4096, 4 * MIB, 16 * GIB + 4096)
        guest_map.add(6 * GIB, 4 * MIB, 20 * GIB + 4096)  # congruent to nothing larger than 4 KiB
        ept = EptPaging(physical, guest_map)
        vcpu = ept.vcpu()
        frames = [ept.statistics.frames]
        for gpa in (0x1234, GIB + MIB, GIB + 4 * MIB, 4 * GIB + 4096, 4 * GIB + 3 * MIB, 6 * GIB):
            assert vcpu.on_ept_violation(CpuState(), gpa, READ | FINAL, 0) is RETRY
            frames.append(ept.statistics.frames)
        # 1 GiB; 2 MiB needs a table of level 2; 4 KiB of level 1 …
        assert frames == [1, 2, 3, 4, 6, 6, 8]
        ept.close()
        assert physical.frames_used == 0


def test_the_gib_a_large_page_covers_is_one_violation() -> None:
    with PhysicalMemory(64) as physical:
        guest_map = GuestMap(physical)
        guest_map.add(0, GIB, 8 * GIB)
        ept = EptPaging(physical, guest_map)
        ept.vcpu().on_ept_violation(CpuState(), 0x1234, READ | FINAL, 0)
        pdpt = physical.read_u64(ept.root) & ~0xFFF
        assert physical.read_u64(pdpt) == 8 * GIB | 7 | 6 << 3 | 1 << 7
        ept.close()


def test_npt_is_ordinary_tables_that_a_user_may_walk() -> None:
    """So the plain walker reads them, as the SVM core's does."""
    with PhysicalMemory(64) as physical, GuestMemory(4 * MIB) as memory:
        guest_map = GuestMap(physical)
        (span,) = physical.attach(memory)
        guest_map.add(0, 2 * MIB, span.hpa)
        guest_map.add(0x40_0000, 0x1000, span.hpa + 2 * MIB, read_only=True)
        npt = EptPaging(physical, guest_map, npt=True)
        vcpu = npt.vcpu()
        for gpa in (0x1234, 0x40_0234):
            vcpu.on_ept_violation(CpuState(), gpa, READ | FINAL, 0)
        walks = Registers(CR0_PG | CR0_PE, vcpu.setup.ept_pointer, CR4_PAE, EFER_LME | EFER_LMA)
        plain, rom = (look_up(physical, walks, gpa) for gpa in (0x1234, 0x40_0234))
        assert isinstance(plain, Walk)
        assert (plain.address, plain.size, plain.user, plain.writable) == (
            span.hpa + 0x1234, 2 * MIB, True, True,
        )  # fmt: skip
        assert isinstance(rom, Walk)
        assert (rom.size, rom.writable, rom.executable) == (4096, False, True)
        npt.close()


def test_what_is_no_memory_is_emulated() -> None:
    with Machine("ept") as machine:
        paging, state = machine.cpu.paging, machine.cpu.state
        assert paging is not None
        hole = 0x1000_0000
        assert paging.on_ept_violation(state, hole, READ | FINAL, 0) == (Do.EMULATE, hole, 0)
        assert paging.on_ept_violation(state, ROM, READ | FINAL, 0) is RETRY
        assert paging.on_ept_violation(state, ROM, WRITE | FINAL, 0) == (Do.EMULATE, ROM, 0)


def test_a_table_in_no_memory_is_the_fetchs_own_fault() -> None:
    with Machine("ept") as machine:
        paging = machine.cpu.paging
        assert paging is not None
        machine.cpu.load(Registers(CR0_PE | CR0_PG, 0x1000_0000, CR4_PAE, EFER_LME))
        machine.cpu.state.rip = 0x7000
        verdict = paging.on_ept_violation(
            machine.cpu.state, 0x1000_0000, READ | LINEAR_VALID, 0x7000
        )
        assert verdict == (Do.REFLECT, 0, 9)
        assert machine.cpu.access(0x5000).fault == 9


def test_a_slot_that_goes_is_forgotten() -> None:
    with Machine("ept") as machine:
        assert machine.cpu.access(0x5000).is_memory
        assert machine.cpu.access(ROM).is_memory
        used = machine.physical.frames_used
        machine.map.remove(ROM)
        assert machine.physical.frames_used < used
        assert machine.cpu.paging is not None
        assert machine.cpu.paging.take_flush() == Flush(Scope.EPT)
        machine.mmu.invept(Invept.ALL)
        assert machine.cpu.access(0x5000).is_memory
        with pytest.raises(EptFault):
            machine.mmu.translate(machine.cpu.state, machine.cpu.controls, ROM, Access.READ, False)
        assert not machine.cpu.access(ROM).is_memory
        machine.map.add(ROM, 4096, machine.rom)
        assert machine.cpu.access(ROM, Access.WRITE).is_memory


def test_slots_are_whole_pages_and_do_not_overlap() -> None:
    with PhysicalMemory(16) as physical:
        guest_map = GuestMap(physical)
        guest_map.add(0x1000, 0x2000, 0x10_0000)
        for gpa, size, hpa in (
            (0x2000, 0x1000, 0),
            (0, 0x2000, 0),
            (0x4000, 10, 0),
            (0x4001, 0x1000, 0),
            (0x4000, 0x1000, 1),
            (0x4000, 0, 0),
        ):
            with pytest.raises(ValueError, match=r"slot|overlaps"):
                guest_map.add(gpa, size, hpa)
        with pytest.raises(ValueError, match="no slot"):
            guest_map.remove(0x2000)
        assert guest_map.hpa(0x2FFF) == 0x10_1FFF
        assert guest_map.hpa(0x3000) is None
        assert guest_map.read_u32(0x3000) == 0xFFFF_FFFF
