"""The hardware hypervisor: one class per KVM file descriptor, one thin method per ioctl."""
