"""The three kinds of VMM: hypervisor, host, hybrid. One guest, one device; what crosses where."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hostel.host.process import Helper
from hostel.hypervisor import Exit, PioExit
from hostel.soft.mini.surroundings import CONSOLE

from . import Drawing, Report, Step, Table, hardware, none_of
from .service import END, REQUEST, SWITCHES
from .stage import Stage

QUESTION = (
    "Who drives the devices? A hypervisor that is an operating system itself has the drivers; one in a host "
    "OS asks that; a hybrid has them in a service OS beside the guest. The same guest writes its words to "
    "the same device in each; what has to be crossed for it is counted."
)
GUEST = "hello"

_DRAWING = """\
hypervisor (VMware ESXi)   host (KVM)                   hybrid (Xen, ACRN)

 guest                      guest                        guest      service OS
───┬─────── VM exit        ───┬─────── VM exit          ───┬───────────┴──────
 hypervisor                 kernel: KVM                  hypervisor
   device model             ───┬────── ioctl returns       request ─► a domain:
   driver                   process: device model                  device model
   device                   ───┬────── write(2)            ◄─ answer driver
                            kernel: driver                           device
                              device
"""


class Count:
    """What was crossed for the device."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.exits = self.returns = 0
        self.calls: int | None = 0
        self.switches: int | None = 0
        self.device = b""
        self.steps = [Step("—", model)]

    def say(self, who: str, what: str) -> None:
        if self.exits == 1:  # the first word shows it; all others go the same way
            self.steps.append(Step(who, what))

    @property
    def row(self) -> tuple[str, int, int, int | None, int | None]:
        return (self.model, self.exits, self.returns, self.calls, self.switches)


def _play(count: Count, device: Device) -> Count:
    def answer(exit: Exit) -> bool:
        if not (isinstance(exit, PioExit) and exit.is_write and exit.port == CONSOLE):
            return False
        count.exits += 1
        count.say("guest", f"OUT to port {exit.port:#x}: a VM exit")
        device.write(bytes(exit.data))
        count.say("hypervisor", "VM entry: the guest goes on")
        return True

    with Stage() as stage:
        actor = stage.actor(GUEST)
        actor.answers.append(answer)
        actor.play()
    count.device = device.close()
    return count


class Device:
    """The hypervisor's own: its device model and its driver are one."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._wire = bytearray()

    def write(self, data: bytes) -> None:
        self._count.say("hypervisor", f"its device model, its driver: {data!r} goes to the device")
        self._wire += data

    def close(self) -> bytes:
        """What arrived at the device."""
        return bytes(self._wire)


class ProcessDevice(Device):
    """A process of the host's: the kernel hands it the exit, and it asks the kernel's driver."""

    def __init__(self, count: Count) -> None:
        super().__init__(count)
        self._read, self._write = os.pipe()

    def write(self, data: bytes) -> None:
        self._count.returns += 1
        self._count.say("kernel", "returns to the process: the exit is its to answer")
        os.write(self._write, data)
        self._count.calls = (self._count.calls or 0) + 1
        self._count.say("process", f"its device model calls write(2): {data!r} goes to the driver")
        self._count.say("process", "asks the kernel to run the guest again")

    def close(self) -> bytes:
        return _drain(self._read, self._write)


class ServiceDevice(Device):
    """Another domain's: each exit is a message, and its answer."""

    def __init__(self, count: Count, requests: socket.socket, pipe: tuple[int, int]) -> None:
        super().__init__(count)
        self._requests, self._pipe = requests, pipe

    def write(self, data: bytes) -> None:
        self._count.say("hypervisor", "puts a request to the service OS, and has it run")
        self._requests.sendall(REQUEST.pack(CONSOLE, len(data)) + data)
        self._requests.recv(1)
        self._count.calls = (self._count.calls or 0) + 1
        self._count.say("service OS", f"its device model, its driver: {data!r} goes to the device")
        self._count.say("service OS", "answers; the hypervisor runs the guest again")

    def close(self) -> bytes:
        self._requests.sendall(REQUEST.pack(END, 0))
        (self._count.switches,) = SWITCHES.unpack(self._requests.recv(SWITCHES.size))
        return _drain(*self._pipe)


def _drain(read: int, write: int) -> bytes:
    os.close(write)
    with os.fdopen(read, "rb") as file:
        return file.read()


@contextmanager
def _service(count: Count) -> Iterator[ServiceDevice]:
    """A process with the device's end of a pipe and one end of a socket."""
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as runtime, ours, theirs:
        argv = [sys.executable, "-m", "hostel.lab.service", str(theirs.fileno()), str(write)]
        process = Helper(
            "service-os", argv, runtime=Path(runtime), pass_fds=(theirs.fileno(), write)
        )
        try:
            theirs.close()
            yield ServiceDevice(count, ours, (read, write))
        finally:
            process.stop()


def _on_kvm() -> Count | None:
    """The host model for real: the kernel's own counters."""
    if hardware.missing():
        return None
    run = hardware.play(GUEST)
    count = Count("host: this host's KVM")
    count.exits, count.returns, count.device = (
        run.vcpu["exits"],
        run.returns,
        run.said.encode("latin-1"),
    )
    count.calls = count.switches = None
    count.steps.clear()
    return count


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("models", arguments)
    first = Count("hypervisor")
    _play(first, Device(first))
    second = Count("host")
    _play(second, ProcessDevice(second))
    third = Count("hybrid, a service OS")
    with _service(third) as device:
        _play(third, device)
    counts = [first, second, third]
    if (real := _on_kvm()) is not None:
        counts.append(real)
    same = len({count.device for count in counts}) == 1
    each, exits = (third.switches or 0) / third.exits, first.exits
    one_cost = exits == second.exits == third.exits
    return Report(
        lab="models",
        question=QUESTION,
        steps=tuple(step for count in counts for step in count.steps),
        drawings=(Drawing("Where a word goes", tuple(_DRAWING.splitlines())),),
        tables=(
            Table(
                "What was crossed",
                (
                    "model",
                    "VM exits",
                    "to a process and back",
                    "calls of a driver",
                    "domain switches",
                ),
                tuple(count.row for count in counts),
                note="Of this host's KVM, where there is one, all VM exits are counted, the kernel's own "
                "too; of the others those for the device. Domain switches are the service process's own, as "
                "this host's kernel counts them: they differ from run to run.",
            ),
        ),
        conclusions=(
            f"The device got {'the same' if same else 'not the same'} {len(first.device)} bytes each time.",
            f"{exits} VM exits in {'all three' if one_cost else 'the first'}; what is added is where the "
            "driver is: nothing, a way to a "
            f"process and a system call, or another domain that must be switched to ({each:.1f} times a "
            "word here, a real process).",
            "That is why paravirtual devices put many requests into one exit, and vhost moves the device "
            "model into the kernel: they take the crossings away, not the exit.",
        ),
        data={"device": first.device.decode("latin-1")},
        page="docs/models.md",
    )
