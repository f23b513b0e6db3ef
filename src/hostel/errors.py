"""Every error that hostel raises on purpose.

::

    HostelError                    one line for a person: what is wrong, what it costs, what to do
    ├── UserError                  the caller asked for what cannot be
    │   ├── SpecError              a machine's description is wrong: unknown key, bad size, out of range
    │   └── ImageError             a kernel, initrd or disk image is missing, truncated or of another kind
    ├── HostError                  the host lacks or refuses something
    │   ├── MissingTool            a program or package is not there
    │   ├── KvmError               /dev/kvm is missing, forbidden, or refused a request
    │   └── HelperError            a helper process (virtiofsd, QEMU …) failed
    ├── GuestError                 the guest did wrong; it harms itself only
    │   ├── MemoryFault            an address outside guest memory
    │   ├── QueueError             a virtqueue that breaks the specification
    │   ├── GuestCrash             panic, triple fault, or an exit KVM cannot handle
    │   ├── BootError              the guest never reached the agent; names the step
    │   └── AgentError             the agent answered no, or broke its protocol
    ├── MachineTimeout             a deadline of the caller's passed
    └── MachineStopped             the machine has ended, so this cannot be done any more

Anything else that escapes is a bug in hostel. Foreign exceptions (OSError, ctypes, struct) are turned
into these at the border where they arise, nowhere else.
"""

from __future__ import annotations


class HostelError(Exception):
    """The root. ``str()`` is one line: ``message; cost; cure`` as far as they are known.

    ``console`` holds the guest's last console lines where they explain the failure, and ``log`` the
    path of a file with the rest.
    """

    def __init__(
        self,
        message: str,
        *,
        cost: str = "",
        cure: str = "",
        console: str = "",
        log: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cost = cost
        self.cure = cure
        self.console = console
        self.log = log

    def __str__(self) -> str:
        return "; ".join(part for part in (self.message, self.cost, self.cure) if part)


class UserError(HostelError):
    """The caller asked for what cannot be."""


class SpecError(UserError):
    """A machine's description is wrong."""


class ImageError(UserError):
    """A kernel, initrd or disk image is missing, truncated or of another kind."""


class HostError(HostelError):
    """The host lacks or refuses something."""


class MissingTool(HostError):
    """A program or package is not there."""


class KvmError(HostError):
    """``/dev/kvm`` is missing, forbidden, or refused a request."""


class HelperError(HostError):
    """A helper process failed."""


class GuestError(HostelError):
    """The guest did wrong. It harms itself only."""


class MemoryFault(GuestError):
    """An address outside guest memory."""


class QueueError(GuestError):
    """A virtqueue that breaks the specification."""


class GuestCrash(GuestError):
    """A panic, a triple fault, or an exit that KVM cannot handle."""


class BootError(GuestError):
    """The guest never reached the agent, or the agent could not set up its root."""


class AgentError(GuestError):
    """The agent answered no, or broke its protocol."""


class MachineTimeout(HostelError):
    """A deadline of the caller's passed."""


class MachineStopped(HostelError):
    """The machine has ended, so this cannot be done any more."""
