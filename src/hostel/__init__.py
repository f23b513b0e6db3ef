"""Machines from Python: a virtual machine monitor on ``/dev/kvm``, and machines as everyday things.

>>> import hostel
>>> hostel.run(["uname", "-s"]).stdout  # doctest: +SKIP
b'Linux\\n'

The public names are imported when they are first used: a program that only asks for the version does
not wait for the monitor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AgentError,
        BootError,
        GuestCrash,
        GuestError,
        HelperError,
        HostelError,
        HostError,
        ImageError,
        KvmError,
        MachineStopped,
        MachineTimeout,
        MissingTool,
        SpecError,
        UserError,
    )
    from .machine import Machine, Result, run
    from .spec import Disk, Limits, MachineSpec, Nic, Publish, Rate, Root, Volume

__all__ = [
    "AgentError",
    "BootError",
    "Disk",
    "GuestCrash",
    "GuestError",
    "HelperError",
    "HostError",
    "HostelError",
    "ImageError",
    "KvmError",
    "Limits",
    "Machine",
    "MachineSpec",
    "MachineStopped",
    "MachineTimeout",
    "MissingTool",
    "Nic",
    "Publish",
    "Rate",
    "Result",
    "Root",
    "SpecError",
    "UserError",
    "Volume",
    "run",
]

_NOT_ERRORS = {
    "Machine": "machine",
    "Result": "machine",
    "run": "machine",
    "Disk": "spec",
    "Limits": "spec",
    "MachineSpec": "spec",
    "Nic": "spec",
    "Publish": "spec",
    "Rate": "spec",
    "Root": "spec",
    "Volume": "spec",
}


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in __all__:
        raise AttributeError(f"module 'hostel' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_NOT_ERRORS.get(name, 'errors')}", __name__), name)
