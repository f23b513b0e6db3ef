"""How a VMX instruction ends (SDM vol. 3C §30.2), when it does not succeed.

::

    VmFail          VMfailInvalid: CF, no current VMCS to say more
                    VMfailValid: ZF, and a number in the VM-instruction error field (§30.4)
    CpuFault        #UD or #GP(0): the instruction could not even be tried
    VmxAbort        a VM exit that cannot be completed (§27.7): the pCPU shuts down
    VmxMisuse       what the manual forbids and no processor reports: ours does

None of these comes from a guest: all are the hypervisor's own mistakes, and it is Python: they are raised.
"""

from __future__ import annotations

from enum import IntEnum

from hostel.soft.exceptions import UD


class VmError(IntEnum):
    """VM-instruction error numbers (SDM vol. 3C §30.4) that our processor gives."""

    VMCALL_IN_ROOT = 1
    VMCLEAR_ADDRESS = 2
    VMCLEAR_VMXON_POINTER = 3
    VMLAUNCH_NOT_CLEAR = 4
    VMRESUME_NOT_LAUNCHED = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_CONTROLS = 7
    ENTRY_HOST_STATE = 8
    VMPTRLD_ADDRESS = 9
    VMPTRLD_VMXON_POINTER = 10
    VMPTRLD_REVISION = 11
    UNSUPPORTED_FIELD = 12
    READ_ONLY_FIELD = 13
    VMXON_IN_ROOT = 15
    ENTRY_MOV_SS = 26
    INVALID_OPERAND = 28
    """Of INVEPT or INVVPID."""


class VmFail(Exception):
    """VMfail. ``error`` is None for VMfailInvalid; ``why`` names the check, where there are many."""

    def __init__(self, instruction: str, error: VmError | None, why: str = "") -> None:
        number = "VMfailInvalid" if error is None else f"VMfailValid({error:d}, {error.name})"
        super().__init__(f"{instruction}: {number}{': ' * bool(why)}{why}")
        self.instruction = instruction
        self.error = error
        self.why = why


class CpuFault(Exception):
    """An exception of the processor in root mode: ``vector`` UD or GP."""

    def __init__(self, instruction: str, vector: int, why: str) -> None:
        super().__init__(f"{instruction}: {'#UD' if vector == UD else '#GP(0)'}: {why}")
        self.instruction = instruction
        self.vector = vector
        self.why = why


class AbortCause(IntEnum):
    """VMX-abort indicators (SDM vol. 3C §27.7)."""

    SAVING_MSRS = 1
    LOADING_MSRS = 4
    HOST_ADDRESS_SPACE = 6


class VmxAbort(Exception):
    """The indicator is in the VMCS region, the pCPU in shutdown."""

    def __init__(self, cause: AbortCause, why: str) -> None:
        super().__init__(f"VMX abort {cause:d} ({cause.name}): {why}")
        self.cause = cause


class VmxMisuse(Exception):
    """A mistake whose outcome the manual leaves undefined: real processors corrupt the VMCS silently."""
