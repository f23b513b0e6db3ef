"""What an engine starts: a ``MachineSpec`` with every path resolved and every default filled.

::

    MachineSpec ──(machine.py looks at the host)──> Plan ──> Monitor | QemuEngine ──> Ending

A plan is plain data. An engine neither searches the host nor decides anything that a plan could say;
so a plan can be shown (``--dry-run``) and both engines start the same machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from .console import Console
from .errors import GuestCrash, HelperError, HostelError, MachineStopped, UserError
from .host.interface import Interface as Interface  # noqa: PLC0414 (part of a plan, shown here)
from .spec import MIN_MEMORY, Disk, MachineSpec, parse_size

if TYPE_CHECKING:
    import socket

AGENT_PORT = "hostel.agent"
CONSOLE_LINES = 12
"""So many of a guest's last words explain a failure."""

ENDED = {
    "poweroff": "the guest powered off",
    "reset": "the guest rebooted",
    "stopped": "the machine was stopped",
}

EndingKind = Literal["poweroff", "reset", "panic", "crash", "debug-exit", "stopped", "error"]


class Share(msgspec.Struct, frozen=True):
    """A host directory served by a vhost-user file system daemon that listens on ``socket``."""

    tag: str
    socket: Path


class Drive(msgspec.Struct, frozen=True):
    """A disk as an engine is to attach it.

    ``socket``: engine kvm: a qemu-storage-daemon serves it there by vhost-user, else we do. Engine qemu
    opens ``disk`` itself, whatever its format. ``disk.format`` and ``disk.plane`` are resolved.
    ``overlay``: the file that takes the guest's writes instead of ``disk``.
    """

    disk: Disk
    socket: Path | None = None
    overlay: Path | None = None

    @property
    def summary(self) -> str:
        """One line for a person."""
        disk = self.disk
        words = [disk.path, disk.format]
        words += ["overlay"] if disk.overlay else ["read-only"] if disk.read_only else []
        return ", ".join(
            [*words, f"cache {disk.cache}", *(["qemu-storage-daemon"] * bool(self.socket))]
        )

    @property
    def keeps_writes(self) -> bool:
        """Whether what the guest writes is to be there after it."""
        return not (self.disk.read_only or self.disk.overlay)


class Vsock(msgspec.Struct, frozen=True):
    """``directory`` is where the host's end is found (``host/vsock.py``)."""

    cid: int
    """The guest's address. Plane ``vhost``: the first that is tried; which one it was is told there."""
    plane: Literal["vhost", "python"]
    directory: Path
    reason: str = ""
    """Why this plane, for a person."""


class Plan(msgspec.Struct, frozen=True):
    """Everything an engine needs."""

    spec: MachineSpec
    engine: Literal["kvm", "qemu", "soft"]
    reason: str
    """Why this engine, for a person."""
    kernel: Path
    """The image as the engine is to load it."""
    release: str
    initrd: Path | None
    cmdline: str
    disks: tuple[Drive, ...]
    shares: tuple[Share, ...]
    runtime: Path
    """This machine's private directory for sockets and logs."""
    agent: bool = True
    """Whether there is an agent port (``hostel boot`` has none)."""
    accel: Literal["kvm", "tcg"] = "kvm"
    """What runs the vCPUs of engine ``qemu``."""
    qemu_args: tuple[str, ...] = ()
    """Further arguments for engine ``qemu``: the testbed's server hardware."""
    nics: tuple[Interface, ...] = ()
    vsock: Vsock | None = None
    balloon: bool = False
    notes: tuple[str, ...] = ()
    """What is allowed and still worth a word to the user."""


class Ending(msgspec.Struct, frozen=True):
    """How a machine ended.

    ``poweroff`` and ``reset`` are the guest's own doing; ``panic`` is a kernel panic, ``crash`` a triple
    fault or an exit that the hypervisor cannot handle; ``debug-exit`` is the debug exit port, with its
    ``code``; ``stopped`` is ours, with the ``code`` of who did it and, on engine ``soft``, where the guest
    then was; ``error`` the engine's own failure.
    """

    kind: EndingKind
    detail: str = ""
    code: int = 0


class Balloon(msgspec.Struct, frozen=True):
    """A guest's memory as its balloon tells it."""

    actual: int
    """Bytes that the guest has, by its own word."""
    target: int
    """Bytes that it shall have."""
    statistics: dict[str, int]
    """The guest's own view: ``free_memory``, ``available_memory`` …, as far as its driver says; empty
    where there is none."""

    @staticmethod
    def aim(spec: MachineSpec, size: int | str | None) -> int | None:
        """A target in bytes, checked."""
        if not spec.balloon:
            raise UserError("the machine has no balloon", cure="start it with balloon=True")
        if size is None:
            return None
        target = parse_size(size) if isinstance(size, str) else size
        if not MIN_MEMORY <= target <= spec.memory:
            most = f"{spec.memory >> 20}M"
            raise UserError(
                f"a machine with {most} can be {MIN_MEMORY >> 20}M to {most} large, not {target >> 20}M"
            )
        return target


def explain_ending(ending: Ending, console: Console) -> HostelError:
    """A machine's ending as the error of whoever still wanted something from it."""
    if ending.kind in ENDED:
        return MachineStopped(ENDED[ending.kind])
    tail = console.tail(CONSOLE_LINES)
    if ending.kind == "error":
        return HelperError(ending.detail, console=tail)
    return GuestCrash(f"the guest crashed: {ending.detail or ending.kind}", console=tail)


class Engine(Protocol):
    """What ``Machine`` drives. ``start`` may raise any HostelError and then has left nothing behind."""

    console: Console

    @property
    def agent(self) -> socket.socket:
        """Connected to the agent's port, once ``start`` has returned."""

    def start(self) -> None: ...

    def wait(self, timeout: float | None = None) -> Ending | None:
        """How the machine ended, or None if it still runs after ``timeout`` seconds."""

    def stop(self, code: int = 0) -> None:
        """End it at once; idempotent. ``code``: the caller's exit code for it, kept in the ending."""

    def resize_disk(self, index: int, size: int) -> None:
        """The disk has ``size`` bytes from now on: the file is made so unless a daemon has done it, and
        the guest is told."""

    def statistics(self) -> dict[str, Any]:
        """A snapshot of counters."""

    def set_link(self, nic: int, up: bool) -> None:
        """The carrier of NIC ``nic``, by its place in the plan."""

    def announce(self) -> None:
        """Have the guest tell its networks where it is, as far as its drivers can."""

    def balloon(self, target: int | None = None) -> Balloon:
        """How large the guest is; after ``target`` bytes were asked for, if they are given. The plan has
        a balloon."""
