"""Tiny guests on the real /dev/kvm: what each of their acts looks like to the monitor."""

from __future__ import annotations

import os

import pytest

from guests.tiny import CODE, Bits, TinyGuest
from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import (
    HaltExit,
    InternalError,
    MmioExit,
    MsrExit,
    PioExit,
    ShutdownExit,
)

pytestmark = pytest.mark.kvm
MMIO = 0x2000_0000


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_port_write_in_every_mode(bits: Bits) -> None:
    with TinyGuest("mov $0x3f8, %dx; mov $0x41, %al; out %al, %dx; hlt", bits=bits) as guest:
        exit = guest.run()
        assert isinstance(exit, PioExit)
        assert (exit.port, exit.size, exit.count, exit.is_write) == (0x3F8, 1, 1, True)
        assert bytes(exit.data) == b"A"
        assert isinstance(guest.run(), HaltExit)


@pytest.mark.parametrize(
    ("suffix", "register", "size"), [("b", "al", 1), ("w", "ax", 2), ("l", "eax", 4)]
)
def test_a_port_read_takes_what_the_monitor_fills_in(suffix: str, register: str, size: int) -> None:
    code = f"xor %eax, %eax; in{suffix} $0x70, %{register}; mov %rax, 0x6000; hlt"
    with TinyGuest(code) as guest:
        exit = guest.run()
        assert isinstance(exit, PioExit)
        assert (exit.port, exit.size, exit.is_write, len(exit.data)) == (0x70, size, False, size)
        exit.data[:] = b"\x11\x22\x33\x44"[:size]
        assert isinstance(guest.run(), HaltExit)
        assert guest.memory.read(0x6000, 8) == b"\x11\x22\x33\x44"[:size].ljust(8, b"\0")


def test_rep_outs_is_one_exit_with_a_count() -> None:
    code = (
        'mov $text, %esi; mov $5, %ecx; mov $0xe9, %dx; cld; rep outsb; hlt; text: .ascii "hello"'
    )
    with TinyGuest(code) as guest:
        written = b""
        while isinstance(exit := guest.run(), PioExit):
            assert exit.size * exit.count == len(exit.data)
            written += bytes(exit.data)
        assert written == b"hello"


def test_rep_ins_fills_memory() -> None:
    code = "mov $0x6000, %edi; mov $4, %ecx; mov $0x1f0, %dx; cld; rep insw; hlt"
    with TinyGuest(code) as guest:
        sent = b""
        while isinstance(exit := guest.run(), PioExit):
            piece = bytes(range(len(sent), len(sent) + len(exit.data)))
            exit.data[:] = piece
            sent += piece
        assert len(sent) == 8
        assert guest.memory.read(0x6000, 8) == sent


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_write_and_read(size: int) -> None:
    register = {1: "al", 2: "ax", 4: "eax", 8: "rax"}[size]
    code = f"""
        mov ${MMIO}, %ebx; movabs $0x1122334455667788, %rax
        mov %{register}, (%rbx); xor %eax, %eax; mov 8(%rbx), %{register}; mov %rax, 0x6000; hlt
    """
    with TinyGuest(code) as guest:
        exit = guest.run()
        assert isinstance(exit, MmioExit)
        value = (0x1122334455667788).to_bytes(8, "little")[:size]
        assert (exit.address, exit.is_write, bytes(exit.data)) == (MMIO, True, value)
        exit = guest.run()
        assert isinstance(exit, MmioExit)
        assert (exit.address, exit.is_write, len(exit.data)) == (MMIO + 8, False, size)
        exit.data[:] = value[::-1]
        assert isinstance(guest.run(), HaltExit)
        assert guest.memory.read(0x6000, size) == value[::-1]


def test_a_triple_fault_is_a_shutdown() -> None:
    with TinyGuest("lidt 0x6000; ud2") as guest:  # an IDT of nothing
        assert isinstance(guest.run(), ShutdownExit)


def test_code_outside_memory_is_an_internal_error_or_a_shutdown() -> None:
    with TinyGuest(f"mov ${MMIO}, %eax; jmp *%rax") as guest:
        assert isinstance(guest.run(), InternalError | ShutdownExit)


def test_msr_accesses_come_to_user_space_when_asked_for() -> None:
    code = """
        mov $0x1234, %ecx; rdmsr; mov %eax, 0x6000; mov %edx, 0x6004
        mov $0x55, %eax; xor %edx, %edx; wrmsr; hlt
    """
    with TinyGuest(code) as guest:
        guest.vm.user_space_msrs(abi.MSR_EXIT_REASON_UNKNOWN | abi.MSR_EXIT_REASON_FILTER)
        exit = guest.run()
        assert exit == MsrExit(0x1234, False, 0, abi.MSR_EXIT_REASON_UNKNOWN)
        guest.vcpu.finish_msr(0xAABBCCDD_11223344)
        exit = guest.run()
        assert guest.memory.read_u64(0x6000) == 0xAABBCCDD_11223344
        assert exit == MsrExit(0x1234, True, 0x55, abi.MSR_EXIT_REASON_UNKNOWN)
        guest.vcpu.finish_msr(fault=True)
        assert isinstance(guest.run(), ShutdownExit)  # #GP with no IDT


def test_a_filtered_msr_exits() -> None:
    with TinyGuest("mov $0x10, %ecx; rdmsr; hlt") as guest:  # the TSC
        guest.vm.user_space_msrs(abi.MSR_EXIT_REASON_FILTER)
        guest.vm.set_msr_filter([(0x10, 8, bytearray(b"\xfe"), abi.MSR_FILTER_READ)])
        exit = guest.run()
        assert exit == MsrExit(0x10, False, 0, abi.MSR_EXIT_REASON_FILTER)
        guest.vcpu.finish_msr(7)
        assert isinstance(guest.run(), HaltExit)
        assert guest.vcpu.get_regs().rax == 7


def test_a_view_of_an_exit_outlives_its_vcpu() -> None:
    with TinyGuest("mov $0x41, %al; out %al, $0x10; hlt") as guest:
        exit = guest.run()
        assert isinstance(exit, PioExit)
    assert bytes(exit.data) == b"A"


def test_a_refused_run_names_the_ioctl() -> None:
    with TinyGuest("hlt") as guest, open("/dev/null") as null:
        os.dup2(null.fileno(), guest.vcpu.fd)
        with pytest.raises(KvmError, match="KVM_RUN failed: Inappropriate ioctl"):
            guest.run()


def test_the_stack_and_calls_work_in_long_mode() -> None:
    with TinyGuest("call f; hlt; f: mov $7, %eax; ret") as guest:
        assert isinstance(guest.run(), HaltExit)
        regs = guest.vcpu.get_regs()
        assert (regs.rax, regs.rip) == (7, CODE + 6)
