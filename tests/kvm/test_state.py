"""All of a vCPU's and a VM's state: what is set is what one gets, and what the guest sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guests.tiny import CODE, TinyGuest
from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import HaltExit
from hostel.kvm import System

pytestmark = pytest.mark.kvm
MSR_TSC, MSR_SYSENTER_EIP, MSR_LSTAR, MSR_NOBODY = 0x10, 0x176, 0xC000_0082, 0xDEAD_0000


@pytest.fixture
def guest() -> Iterator[TinyGuest]:
    with TinyGuest("hlt", irqchip=True) as guest:
        yield guest


def test_registers(guest: TinyGuest) -> None:
    regs = abi.Regs(rax=1, r15=2**64 - 1, rip=CODE, rflags=0x246)
    guest.vcpu.set_regs(regs)
    assert bytes(guest.vcpu.get_regs()) == bytes(regs)


def test_segments_and_control_registers(guest: TinyGuest) -> None:
    sregs = guest.vcpu.get_sregs()
    assert (sregs.cs.l, sregs.cr0 >> 31, sregs.efer & 0x500) == (1, 1, 0x500)
    sregs.fs.base = 0x1234_5678
    sregs.gdt.base, sregs.gdt.limit = 0x5000, 23
    guest.vcpu.set_sregs(sregs)
    assert bytes(guest.vcpu.get_sregs()) == bytes(sregs)


def test_refused_registers_name_the_ioctl(guest: TinyGuest) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 = 0  # long mode without PAE cannot be
    with pytest.raises(KvmError, match="KVM_SET_SREGS failed: Invalid argument"):
        guest.vcpu.set_sregs(sregs)


def test_cpuid_is_what_the_guest_reads() -> None:
    code = "mov $0x40000001, %eax; xor %ecx, %ecx; cpuid; hlt"
    with TinyGuest(code) as guest:
        entries = guest.system.supported_cpuid()
        assert len(entries) > 10
        entry = next(entry for entry in entries if entry.function == 0x4000_0001)
        entry.eax, entry.ebx, entry.ecx, entry.edx = 0x1111, 0x2222, 0x3333, 0x4444
        guest.vcpu.set_cpuid(entries)
        # Only KVM's own leaf is compared: KVM keeps some other bits in step with CR4 and the APIC.
        shown = next(e for e in guest.vcpu.get_cpuid() if e.function == 0x4000_0001)
        assert shown.ebx == 0x2222
        assert isinstance(guest.run(), HaltExit)
        regs = guest.vcpu.get_regs()
        assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (0x1111, 0x2222, 0x3333, 0x4444)


def test_cpuid_of_no_or_too_many_leaves(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match="KVM_SET_CPUID2 failed: Argument list too long"):
        guest.vcpu.set_cpuid([abi.CpuidEntry2(function=number) for number in range(300)])


def test_msrs(guest: TinyGuest) -> None:
    assert {MSR_TSC, MSR_SYSENTER_EIP, MSR_LSTAR} <= set(guest.system.msr_indices())
    guest.vcpu.set_msrs({MSR_SYSENTER_EIP: 0x1000, MSR_LSTAR: 0xFFFF_8000_0000_0000})
    values = guest.vcpu.get_msrs([MSR_LSTAR, MSR_SYSENTER_EIP])
    assert values == {MSR_LSTAR: 0xFFFF_8000_0000_0000, MSR_SYSENTER_EIP: 0x1000}


def test_an_msr_that_is_not_there_is_named(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_MSRS cannot read MSR 0xdead0000"):
        guest.vcpu.get_msrs([MSR_LSTAR, MSR_NOBODY])
    with pytest.raises(KvmError, match=r"KVM_SET_MSRS cannot set MSR 0xdead0000 to 0x5"):
        guest.vcpu.set_msrs({MSR_LSTAR: 0, MSR_NOBODY: 5})


def test_feature_msrs(guest: TinyGuest) -> None:
    indices = guest.system.feature_msr_indices()
    assert guest.system.feature_msrs(indices).keys() == set(indices)


def test_fpu(guest: TinyGuest) -> None:
    fpu = guest.vcpu.get_fpu()
    fpu.xmm[1][:4] = list(b"abcd")
    fpu.fcw = 0x27F
    guest.vcpu.set_fpu(fpu)
    assert bytes(guest.vcpu.get_fpu()) == bytes(fpu)


def test_xsave_is_what_the_guest_has_in_its_registers() -> None:
    """XMM0 is at 160 of the legacy area, and XSTATE_BV, which says what is there, at 512 (SDM vol. 1
    §10.5.1, §13.4.2)."""
    with TinyGuest("movdqu %xmm0, 0x6000; hlt") as guest:
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 |= 1 << 9  # OSFXSR: SSE instructions are allowed
        guest.vcpu.set_sregs(sregs)
        state = bytearray(guest.vcpu.get_xsave())
        assert len(state) >= 4096
        state[160:164] = b"abcd"
        state[512] |= 3
        guest.vcpu.set_xsave(bytes(state))
        assert guest.vcpu.get_xsave()[160:164] == b"abcd"
        assert isinstance(guest.run(), HaltExit)
        assert guest.memory.read(0x6000, 4) == b"abcd"


def test_extended_control_registers(guest: TinyGuest) -> None:
    xcrs = guest.vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].value & 1) == (1, 1)
    xcrs.xcrs[0].value = 3  # x87 and SSE
    guest.vcpu.set_xcrs(xcrs)
    assert guest.vcpu.get_xcrs().xcrs[0].value == 3


def test_debug_registers(guest: TinyGuest) -> None:
    registers = guest.vcpu.get_debugregs()
    registers.db[0] = 0x1234
    guest.vcpu.set_debugregs(registers)
    assert guest.vcpu.get_debugregs().db[0] == 0x1234


def test_events(guest: TinyGuest) -> None:
    events = guest.vcpu.get_events()
    events.nmi.pending = 1
    events.flags |= abi.VCPUEVENT_VALID_NMI_PENDING
    guest.vcpu.set_events(events)
    assert guest.vcpu.get_events().nmi.pending == 1


def test_mp_state(guest: TinyGuest) -> None:
    other = guest.add_vcpu()
    assert guest.vcpu.get_mp_state() == abi.MP_STATE_RUNNABLE
    assert other.get_mp_state() == abi.MP_STATE_UNINITIALIZED
    other.set_mp_state(abi.MP_STATE_RUNNABLE)
    assert other.get_mp_state() == abi.MP_STATE_RUNNABLE


def test_lapic(guest: TinyGuest) -> None:
    state = guest.vcpu.get_lapic()
    registers = bytearray(bytes(state))
    assert len(registers) == abi.APIC_REG_SIZE
    registers[0x80] = 0x20  # the task priority register
    guest.vcpu.set_lapic(abi.LapicState.from_buffer(registers))
    assert bytes(guest.vcpu.get_lapic())[0x80] == 0x20


def test_the_pic(guest: TinyGuest) -> None:
    chip = guest.vm.get_irqchip(abi.IRQCHIP_PIC_MASTER)
    chip.chip.pic.imr = 0xFB
    guest.vm.set_irqchip(chip)
    assert guest.vm.get_irqchip(abi.IRQCHIP_PIC_MASTER).chip.pic.imr == 0xFB


def test_the_clock_can_be_set_and_goes_on(guest: TinyGuest) -> None:
    guest.vm.set_clock(abi.ClockData(clock=10**18))
    assert 10**18 <= guest.vm.get_clock().clock < 10**18 + 10**11


def test_the_tsc_frequency(guest: TinyGuest) -> None:
    khz = guest.vcpu.get_tsc_khz()
    assert khz > 100_000
    guest.vcpu.set_tsc_khz(khz)
    assert guest.vcpu.get_tsc_khz() == khz


def test_kvmclock_ctrl_needs_a_guest_that_uses_it(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match="KVM_KVMCLOCK_CTRL failed"):
        guest.vcpu.kvmclock_ctrl()


def test_several_vcpus_have_registers_of_their_own() -> None:
    with TinyGuest("lock incq 0x6000; hlt") as guest:
        others = [guest.add_vcpu() for _ in range(3)]
        for vcpu in (guest.vcpu, *others):
            assert isinstance(vcpu.run(), HaltExit)
        assert guest.memory.read_u64(0x6000) == 4
        assert [vcpu.get_regs().rsp for vcpu in others] == [0x7000, 0x6000, 0x5000]


def test_an_application_processor_starts_in_real_mode_by_init_and_sipi() -> None:
    """The BSP writes x2APIC ICR: INIT, then SIPI to page 9 (SDM vol. 3A §9.4)."""
    code = """
        mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr
        mov $0x80f, %ecx; xor %edx, %edx; mov $0x1ff, %eax; wrmsr
        mov $0x830, %ecx; mov $1, %edx
        mov $0xc500, %eax; wrmsr
        mov $0x4609, %eax; wrmsr
        out %al, $0x10
    """
    with TinyGuest(code, irqchip=True) as guest:
        other = guest.add_vcpu()
        guest.memory.write(0x9000, bytes.fromhex("e6 11"))  # out %al, $0x11
        exit = guest.run()
        assert getattr(exit, "port", None) == 0x10
        exit = other.run()
        while getattr(exit, "port", None) != 0x11:  # the INIT's wake-up is an Interrupted
            exit = other.run()
        assert other.get_sregs().cs.base == 0x9000


def test_vcpus_beyond_the_limit_and_twice_are_refused() -> None:
    with System() as system, system.create_vm() as vm, vm.create_vcpu(0):
        with pytest.raises(KvmError, match="KVM_CREATE_VCPU failed: File exists"):
            vm.create_vcpu(0)
        with pytest.raises(KvmError, match="KVM_CREATE_VCPU failed: Invalid argument"):
            vm.create_vcpu(1 << 20)
