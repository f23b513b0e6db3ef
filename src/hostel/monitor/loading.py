"""A kernel on its way into guest memory, while the rest of the machine is still being made.

Copying tens of megabytes needs no Python: a thread does it, and meanwhile the modules of the board are
imported and the VM is created. What does need Python is done by the caller's thread, before and after: two
threads that both want the interpreter take turns of milliseconds.

The same thread then stays ahead of the guest: it has the host make the pages that the kernel is about to
touch. Each would otherwise stop a vCPU for as long as it takes to clear a huge page.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hostel.boot.load import KernelLoad
from hostel.memory import HUGE_PAGE, GuestMemory
from hostel.plan import Plan
from hostel.vmm import layout

if TYPE_CHECKING:
    from hostel.boot.entry import EntryState


class Loading:
    """Guest memory with a kernel. From ``entry`` on it is the caller's, who gives it back by ``cancel``.

    A context manager: its end gives back what nobody has entered.
    """

    def __init__(self, plan: Plan) -> None:
        spec = plan.spec
        self._error: BaseException | None = None
        self._entered = False
        self._undo = ExitStack()
        try:
            memory = GuestMemory(spec.memory, hugepages=spec.hugepages)
            self.memory = self._undo.enter_context(memory)
            load = KernelLoad(
                memory,
                plan.kernel,
                cmdline=plan.cmdline,
                initrd=plan.initrd,
                rsdp=layout.ACPI_ADDRESS,
                seeded=plan.engine != "soft",  # whose guests are the same each time
            )
            self._load = self._undo.enter_context(load)
        except BaseException:
            self._undo.close()
            raise
        self._copied = threading.Event()
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, name="hostel-load", daemon=True)
        self._thread.start()

    def entry(self) -> EntryState:
        """How the first vCPU enters the kernel, once it is there. Raises what loading it raised."""
        entry = self._load.inform()
        self._copied.wait()
        if self._error is not None:
            raise self._error
        self._load.close()
        self._entered = True
        return entry

    def cancel(self) -> None:
        """Idempotent."""
        self._cancelled = True
        self._thread.join()
        self._undo.close()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._entered:
            self.cancel()

    def _work(self) -> None:
        try:
            self._load.copy()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._copied.set()
        for start, size in self._load.expect():
            for page in range(start, start + size, HUGE_PAGE):
                piece = min(HUGE_PAGE, start + size - page)
                if self._cancelled or not self.memory.populate(page, piece):
                    return
