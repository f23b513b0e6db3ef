"""A kernel on its way into guest memory, while the rest of the machine is still being made.

Copying tens of megabytes needs no Python: a thread does it, and meanwhile the modules of the board are
imported, the VM is created and its devices are seated.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hostel.boot.load import load_kernel
from hostel.memory import GuestMemory
from hostel.plan import Plan
from hostel.vmm import layout

if TYPE_CHECKING:
    from hostel.boot.entry import EntryState


class Loading:
    """Guest memory with a kernel. The memory is whose ``entry`` it is; ``cancel`` gives it back."""

    def __init__(self, plan: Plan) -> None:
        spec = plan.spec
        self._plan = plan
        self._entry: EntryState | None = None
        self._error: BaseException | None = None
        self.memory = GuestMemory(spec.memory, hugepages=spec.hugepages)
        self._thread = threading.Thread(target=self._load, name="hostel-load", daemon=True)
        self._thread.start()

    def entry(self) -> EntryState:
        """How the first vCPU enters the kernel, once it is there. Raises what loading it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._entry is not None
        return self._entry

    def cancel(self) -> None:
        """Idempotent."""
        self._thread.join()
        self.memory.close()

    def _load(self) -> None:
        plan = self._plan
        try:
            self._entry = load_kernel(
                self.memory,
                plan.kernel,
                cmdline=plan.cmdline,
                initrd=plan.initrd,
                rsdp=layout.ACPI_ADDRESS,
            )
        except BaseException as error:
            self._error = error
