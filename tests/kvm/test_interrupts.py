"""Interrupts in, notifications out: irqchip, irqfd, MSI routes, ioeventfd, on tiny guests."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from guests.tiny import CODE, TinyGuest
from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import Exit, GsiRoute, HaltExit, Interrupted, MsiMessage, PioExit
from hostel.kvm import System

pytestmark = pytest.mark.kvm
PATIENCE = 10.0
VECTOR = 0x40
READY, TAKEN = 0x10, 0x11  # ports; the in-kernel PIC has 0x20
MSI = MsiMessage(0xFEE0_0000, VECTOR)  # to APIC ID 0, fixed, edge (SDM vol. 3A §11.11)

# Long mode: an IDT with one gate, a software-enabled LAPIC (x2APIC), interrupts on, HLT in a loop.
# The PIC is masked: it gets every line too. The handler reports on a port and acknowledges.
WAITER = f"""
    lidt idt_pointer
    mov $handler, %rax
    mov %ax, gate; movw $8, gate+2; movw $0x8e00, gate+4
    shr $16, %rax; mov %ax, gate+6; shr $16, %rax; mov %eax, gate+8
    mov $gdt_pointer, %rax; lgdt (%rax)
    mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr
    mov $0x80f, %ecx; xor %edx, %edx; mov $0x1ff, %eax; wrmsr
    mov $0x808, %ecx; xor %eax, %eax; wrmsr
    mov $0xff, %al; out %al, $0x21; out %al, $0xa1
    out %al, ${READY}
    sti
wait: hlt
    jmp wait
handler:
    out %al, ${TAKEN}
    mov $0x80b, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr
    iretq
    .balign 16
idt: .skip {VECTOR * 16}
gate: .skip 16
idt_pointer: .word . - idt - 1
    .quad idt
    .balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer: .word gdt_pointer - gdt - 1
    .quad gdt
"""


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


class Listener:
    """Runs a guest in its own thread and notes the ports that it writes."""

    def __init__(self, guest: TinyGuest) -> None:
        self.guest = guest
        self.ports: list[int] = []
        self.news = threading.Semaphore(0)
        self.stopping = False
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while not self.stopping:
            exit = self.guest.run()
            if isinstance(exit, PioExit):
                self.ports.append(exit.port)
                self.news.release()
            elif not isinstance(exit, Interrupted):
                raise AssertionError(exit)

    def next_port(self) -> int:
        assert self.news.acquire(timeout=PATIENCE), f"nothing after {self.ports}"
        return self.ports[-1]

    def __enter__(self) -> Listener:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.guest.vcpu.kick()
        self.thread.join(PATIENCE)


@contextmanager
def waiting_guest() -> Iterator[tuple[TinyGuest, Listener]]:
    with TinyGuest(WAITER, irqchip=True) as guest, Listener(guest) as listener:
        assert listener.next_port() == READY
        yield guest, listener


def test_signal_msi_reaches_the_handler() -> None:
    with waiting_guest() as (guest, listener):
        assert guest.vm.signal_msi(MSI) is True
        assert listener.next_port() == TAKEN


def test_an_irqfd_with_an_msi_route() -> None:
    with waiting_guest() as (guest, listener), eventfd() as fd:
        guest.vm.set_gsi_routes([GsiRoute(24, MSI)])
        guest.vm.irqfd(24, fd)
        for _ in range(3):
            os.eventfd_write(fd, 1)
            assert listener.next_port() == TAKEN
        guest.vm.irqfd(24, fd, assign=False)
        os.eventfd_write(fd, 1)
        time.sleep(0.02)
        assert listener.ports == [READY, TAKEN, TAKEN, TAKEN]


def test_a_line_through_the_ioapic() -> None:
    with waiting_guest() as (guest, listener):
        chip = guest.vm.get_irqchip(abi.IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[4] = VECTOR  # fixed, physical APIC ID 0, edge, unmasked
        guest.vm.set_irqchip(chip)
        guest.vm.irq_line(4, True)
        guest.vm.irq_line(4, False)
        assert listener.next_port() == TAKEN


def test_an_irqfd_on_a_line_with_resample() -> None:
    """Level-triggered: the guest's EOI lowers the line and tells us."""
    with waiting_guest() as (guest, listener), eventfd() as fd, eventfd() as resample:
        chip = guest.vm.get_irqchip(abi.IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[5] = VECTOR | 1 << 15
        guest.vm.set_irqchip(chip)
        guest.vm.irqfd(5, fd, resample=resample)
        os.eventfd_write(fd, 1)
        assert listener.next_port() == TAKEN
        assert select.select([resample], [], [], PATIENCE)[0] == [resample]
        assert listener.ports == [READY, TAKEN]


def test_a_split_irqchip_delivers_msi_and_has_no_ioapic() -> None:
    with System() as system, system.create_vm() as vm:
        vm.create_split_irqchip()
        with pytest.raises(KvmError, match="KVM_GET_IRQCHIP"):
            vm.get_irqchip(abi.IRQCHIP_IOAPIC)
        with vm.create_vcpu(0) as vcpu:
            assert len(bytes(vcpu.get_lapic())) == abi.APIC_REG_SIZE


def test_interrupt_without_an_irqchip() -> None:
    """Real mode: vector 0x21 through the interrupt vector table at 0."""
    code = "sti; nop; nop; hlt; handler: out %al, $0x21; hlt"
    with TinyGuest(code, bits=16) as guest:
        guest.memory.write_u32(0x21 * 4, CODE + 4)
        guest.vcpu.set_regs(abi.Regs(rip=CODE, rflags=0x202, rsp=0x7000))
        guest.vcpu.interrupt(0x21)
        exit = guest.run()
        assert isinstance(exit, PioExit)
        assert exit.port == 0x21


def test_an_nmi() -> None:
    with TinyGuest("nop; hlt; handler: out %al, $0x22; hlt", bits=16) as guest:
        guest.memory.write_u32(2 * 4, CODE + 2)
        guest.vcpu.nmi()
        exit = guest.run()
        assert isinstance(exit, PioExit)
        assert exit.port == 0x22


def test_the_pit_and_its_state() -> None:
    with System() as system, system.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit()
        state = vm.get_pit()
        state.channels[0].mode = 2
        state.channels[0].count = 1193
        vm.set_pit(state)
        assert vm.get_pit().channels[0].count == 1193


def drain(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_an_ioeventfd_on_mmio_counts_kicks_without_an_exit() -> None:
    code = "mov $0x20000000, %ebx; mov $5, %ecx; again: movl $1, (%rbx); loop again; hlt"
    with TinyGuest(code) as guest, eventfd() as fd:
        guest.vm.ioeventfd(0x2000_0000, 4, fd)
        assert isinstance(guest.run(), HaltExit)
        assert drain(fd) == 5


def test_an_ioeventfd_matches_data_and_length() -> None:
    code = "mov $0x20000000, %ebx; movw $1, (%rbx); movw $2, (%rbx); movl $1, (%rbx); hlt"
    with TinyGuest(code) as guest, eventfd() as fd:
        guest.vm.ioeventfd(0x2000_0000, 2, fd, match=1)
        exits: list[Exit] = []
        while not isinstance(exit := guest.run(), HaltExit):
            exits.append(exit)
        assert drain(fd) == 1
        assert len(exits) == 2


def test_an_ioeventfd_of_any_length() -> None:
    code = "mov $0x20000000, %ebx; movb $1, (%rbx); movw $2, (%rbx); movq $1, (%rbx); hlt"
    with TinyGuest(code) as guest, eventfd() as fd:
        guest.vm.ioeventfd(0x2000_0000, 0, fd)
        assert isinstance(guest.run(), HaltExit)
        assert drain(fd) == 3


def test_an_ioeventfd_on_a_port_and_its_end() -> None:
    with TinyGuest("out %al, $0x10; nop; out %al, $0x10; hlt") as guest, eventfd() as fd:
        guest.vm.ioeventfd(0x10, 1, fd, pio=True)
        assert isinstance(guest.run(), HaltExit)
        assert drain(fd) == 2
        guest.vm.ioeventfd(0x10, 1, fd, pio=True, assign=False)
        guest.vcpu.set_regs(abi.Regs(rip=CODE, rflags=2))
        assert isinstance(guest.run(), PioExit)
        with pytest.raises(KvmError, match="KVM_IOEVENTFD failed: No such file"):
            guest.vm.ioeventfd(0x10, 1, fd, pio=True, assign=False)
