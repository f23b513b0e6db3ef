"""A line for each VM exit: what the guest did, and when, counted in instructions.

::

    instructions           time  vCPU  exit                qualification  RIP
           20417         301417     0  IO                      0xe90043   0x100a52

The same of the same machine each time. It is the trace of the labs (``vmx/events.py``), without the
hypervisor's own steps.
"""

from __future__ import annotations

from pathlib import Path

from hostel.errors import UserError

from .hypervisor.host import Host
from .vmx.events import TraceEvent
from .vmx.fields import Field

HEAD = "instructions            time  vCPU  exit                       qualification  RIP\n"


class ExitTrace:
    """``watch`` each power-on's host; ``close`` at the end."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="ascii")
        except OSError as error:
            raise UserError(f"the trace {path} cannot be written: {error.strerror}") from None
        self._path = path
        self._file.write(HEAD)

    def watch(self, host: Host) -> None:
        for pcpu in host.pcpus:
            pcpu.trace = lambda event, host=host: self._note(host, event)

    def _note(self, host: Host, event: TraceEvent) -> None:
        if event.what != "VM exit":
            return
        pcpu = host.pcpus[event.pcpu]
        vcpu, vmcs = host.loaded[event.pcpu], pcpu.current
        rip = vmcs.read(Field.GUEST_RIP) if vmcs else 0
        count = pcpu.core.statistics.instructions
        self._write(
            f"{count:12} {event.time:15} {vcpu.id:5}  {event.result:20} {event.operands[1]:#19x}  {rip:#x}\n"
        )

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
        except OSError as error:
            raise UserError(f"the trace {self._path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()
