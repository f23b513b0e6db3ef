"""A request on real KVM: the guest's store kicks by ioeventfd, the answer is an interrupt by irqfd.

The rings are laid out from outside; the guest is the store and the wait. It sees interrupts in its
LAPIC's request register, so it needs no handler.
"""

from __future__ import annotations

import threading

import pytest

from guests.tiny import TinyGuest
from hostel.hypervisor import Exit, PioExit
from hostel.virtio.rng import Rng
from virtio.rig import Rig

pytestmark = pytest.mark.kvm

VECTOR = 0x30  # the rig gives vector 0x30 + n to queue n
DONE = 0x10
LAPIC_SVR, LAPIC_IRR = 0xFEE0_00F0, 0xFEE0_0200 + 0x10 * (VECTOR // 32)
IOAPIC = 0xFEC0_0000


def kick_and_wait(address: int, size: int) -> str:
    """32-bit code: enable the LAPIC, kick, wait for the vector's request bit, say so."""
    store = "movl" if size == 4 else "movw"
    return f"""
        movl $0x1ff, {LAPIC_SVR}
        {store} $0, {address}
    0:  testl ${1 << VECTOR % 32}, {LAPIC_IRR}
        jz 0b
        out %al, ${DONE}
    """


def run(guest: TinyGuest, seconds: float = 20.0) -> Exit:
    timer = threading.Timer(seconds, guest.vcpu.kick)
    timer.start()
    try:
        return guest.run()
    finally:
        timer.cancel()
        timer.join()


def test_virtio_pci_on_kvm() -> None:
    with TinyGuest("hlt", bits=32, memory=8 << 20, irqchip=True) as guest:
        rig = Rig(guest.memory, guest.vm)
        driver = rig.on_pci(Rng(rig.loop))
        driver.start()
        rig.loop.run_sync(lambda: None)  # the look that the device takes when it starts
        driver.queues[0].add([], [256])
        guest.load(kick_and_wait(driver.bar(0) + 0x3000, 2))
        exit = run(guest)
        assert isinstance(exit, PioExit), "the store was no exit, and the interrupt came"
        assert exit.port == DONE
        (done,) = driver.queues[0].completed()
        assert len(set(done.data)) > 30
        assert driver.device.statistics()["queues"]["0"]["interrupts"] == 1
        rig.close()


def test_virtio_mmio_on_kvm() -> None:
    """The line is IOAPIC pin 5, edge-triggered, that the guest routes to the same vector."""
    with TinyGuest("hlt", bits=32, memory=8 << 20, irqchip=True) as guest:
        rig = Rig(guest.memory, guest.vm)
        driver = rig.on_mmio(Rng(rig.loop))
        driver.start()
        rig.loop.run_sync(lambda: None)  # the look that the device takes when it starts
        driver.queues[0].add([], [256])
        low = 0x10 + 2 * driver.gsi
        route = f"movl ${low}, {IOAPIC}; movl ${VECTOR}, {IOAPIC + 0x10};"
        route += f"movl ${low + 1}, {IOAPIC}; movl $0, {IOAPIC + 0x10};"
        guest.load(route + kick_and_wait(driver.address + 0x50, 4))
        exit = run(guest)
        assert isinstance(exit, PioExit)
        assert exit.port == DONE
        assert len(driver.queues[0].completed()) == 1
        rig.close()
