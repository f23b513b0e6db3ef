"""The monitor that hypervisors share: bus, interrupts, PCI, CPU set-up, event loop."""
