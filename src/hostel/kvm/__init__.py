"""The hardware hypervisor: Linux's ``/dev/kvm``. Only this package issues KVM ioctls.

::

    System (/dev/kvm) ── create_vm ──> Vm ── create_vcpu ──> Vcpu ── run ──> an exit
        CPUID, MSR lists               memory, interrupts    registers, one page shared with KVM

One class per file descriptor, which it owns and closes; one thin method per ioctl, named after it,
whose docstring cites KVM's own document (Documentation/virt/kvm/api.rst in Linux, numbered as in 6.1).
A refused ioctl is a ``KvmError`` that names it.
"""

from .system import System
from .vcpu import Vcpu
from .vm import Vm

__all__ = ["System", "Vcpu", "Vm"]
