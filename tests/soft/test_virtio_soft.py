"""A request over virtio-pci on the software hypervisor: notified by ioeventfd, answered by irqfd and MSI-X.

As ``tests/virtio/test_virtio_kvm.py`` on KVM, with the same guest: a store, and the wait for its LAPIC.
"""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import CODE, assemble
from hostel.boot.entry import EntryState, write_tables
from hostel.hypervisor import PioExit
from hostel.memory import GuestMemory
from hostel.soft.vm import System
from hostel.spec import Paging, Trap
from hostel.virtio.rng import Rng
from hostel.vmm import layout
from virtio.rig import Rig
from virtio.test_virtio_kvm import DONE, kick_and_wait


@pytest.mark.parametrize("trap", ["translate", "intercept"])
@pytest.mark.parametrize("paging", ["ept", "shadow"])
def test_virtio_pci_on_soft(paging: Paging, trap: Trap) -> None:
    vm = System(paging=paging, trap=trap).create_vm()
    memory = GuestMemory(8 << 20)
    vm.map(0, memory.regions[0])
    vm.create_chipset(layout.HYPERVISOR_PAGES)
    vcpu = vm.create_vcpu(0)
    rig = Rig(memory, vm)
    driver = rig.on_pci(Rng(rig.loop))
    driver.start()
    rig.loop.run_sync(lambda: None)  # the look that the device takes when it starts
    driver.queues[0].add([], [256])
    memory.write(CODE, assemble(kick_and_wait(driver.bar(0) + 0x3000, 2), bits=32))
    write_tables(memory, "protected")
    EntryState("protected", CODE).apply(vcpu)
    timer = threading.Timer(20, vcpu.kick)
    timer.start()
    exit = vcpu.run()
    timer.cancel()
    timer.join()
    assert isinstance(exit, PioExit), "the store was no exit, and the interrupt came"
    assert exit.port == DONE
    (done,) = driver.queues[0].completed()
    assert len(set(done.data)) > 30
    rig.close()
    vm.close()
    memory.close()
