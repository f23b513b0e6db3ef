"""Engine qemu: the same plan on a QEMU process."""
