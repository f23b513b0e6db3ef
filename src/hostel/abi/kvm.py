"""KVM's interface for x86: request numbers here; structures and constants from the files beside it.

Everybody says ``from hostel.abi import kvm as abi`` and finds all of it in this one place.

::

    kvm_numbers    constants
    kvm_start      structures that every machine is started with
    kvm_later ──►  all others, and their requests: imported when the first of them is asked for,
    kvm_vm, _vcpu  for ctypes makes a structure as slowly as Python imports a module

Rules: a class is named like the header's struct (``kvm_vcpu_events`` is ``VcpuEvents``), its fields
like the header's fields, in the header's order; a request or constant is named like the header's
without ``KVM_``. ``tests/abi`` compares every size, offset and number with the headers by a compiled
probe that is generated from these files, so a new line is checked without further work.

A flexible array at a structure's end is left out, as it is in the size that a request number carries
(``KVM_SET_CPUID2``, ``KVM_SET_MSRS``, ``KVM_SET_GSI_ROUTING``).
"""

# ruff: noqa: F403, F405 — showing everything is this file's purpose

from ctypes import c_uint64
from typing import TYPE_CHECKING, Any

from .kvm_numbers import *
from .kvm_start import *
from .kvm_types import io, ior, iow, iowr

if TYPE_CHECKING:
    from .kvm_later import *
else:

    def __getattr__(name: str) -> Any:
        """What this module has not: a name of ``kvm_later``."""
        if name.startswith("_"):  # Python's own questions
            raise AttributeError(name)
        from . import kvm_later

        value = globals()[name] = getattr(kvm_later, name)
        return value


# fmt: off
# /dev/kvm
GET_API_VERSION            = io(0x00)
CREATE_VM                  = io(0x01)
CHECK_EXTENSION            = io(0x03)  # a VM too
GET_VCPU_MMAP_SIZE         = io(0x04)
GET_SUPPORTED_CPUID        = iowr(0x05, Cpuid2)

# A VM
CREATE_VCPU                = io(0x41)
SET_USER_MEMORY_REGION     = iow(0x46, UserspaceMemoryRegion)
SET_TSS_ADDR               = io(0x47)
SET_IDENTITY_MAP_ADDR      = iow(0x48, c_uint64)
CREATE_IRQCHIP             = io(0x60)
IRQ_LINE                   = iow(0x61, IrqLevel)
SET_GSI_ROUTING            = iow(0x6A, IrqRouting)
IRQFD                      = iow(0x76, Irqfd)
CREATE_PIT2                = iow(0x77, PitConfig)
IOEVENTFD                  = iow(0x79, Ioeventfd)

# A vCPU
RUN                        = io(0x80)
GET_REGS                   = ior(0x81, Regs)
SET_REGS                   = iow(0x82, Regs)
GET_SREGS                  = ior(0x83, Sregs)
SET_SREGS                  = iow(0x84, Sregs)
GET_MSRS                   = iowr(0x88, Msrs)
SET_MSRS                   = iow(0x89, Msrs)
GET_LAPIC                  = ior(0x8E, LapicState)
SET_LAPIC                  = iow(0x8F, LapicState)
SET_CPUID2                 = iow(0x90, Cpuid2)
GET_CPUID2                 = iowr(0x91, Cpuid2)
NMI                        = io(0x9A)
SET_TSC_KHZ                = io(0xA2)
GET_TSC_KHZ                = io(0xA3)
KVMCLOCK_CTRL              = io(0xAD)
GET_STATS_FD               = io(0xCE)  # a VM too
