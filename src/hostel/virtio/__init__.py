"""Virtio: queue, transports, devices and data planes.

::

    device     what the guest sees                console, block, rng, fs
    data plane who serves the queues              plane (this process), vhost_user (another)
    transport  registers, interrupts, kicks       pci, mmio
    queue      rings in guest memory              queue; mock is the driver's side

How a machine gets a device: build it, seat it, in the order in which the guest shall find them::

    device = Rng(loop)                                        # or
    device = Block(loop, "/srv/disk.img", name="disk 0", read_only=False, serial="")
    device = Console(loop, [Port("hvc0", fd, console=True), Port("hostel.agent", fd2)])
    device = VirtioFs(loop, "root", "/run/…/virtiofsd.sock")  # vhost-user: memory is shared with it

    pci = PciBus(mmio); mmio.add(layout.ECAM_START, layout.ECAM_SIZE, pci, "pci")
    pci.add(VirtioPci(device, memory, vm, interrupts))        # or, with an edge-triggered GSI in ACPI,
    mmio.add(address, 0x1000, VirtioMmio(device, memory, vm, address=address, gsi=gsi), device.name)

``close`` of the seat (``VirtioPci``, ``VirtioMmio``) stops the device, closes its files and ends its
threads; it comes after the vCPUs' end and before the VM's. ``device.on_fault`` tells of a device that
stopped, ``device.statistics()`` what it did.
"""
