"""A machine's networks from its description, made or only foreseen; and what its engine is to make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hostel.errors import SpecError
from hostel.spec import Limits, MachineSpec

from .networks import Networks

if TYPE_CHECKING:
    from .interface import Interface


def machine_name(spec: MachineSpec) -> str:
    """By which other machines of its networks find it; empty: they do not."""
    return spec.name or spec.hostname


def attached(spec: MachineSpec, runtime: Path) -> Networks:
    """Asked for; whoever wants to know more (``attachments``) waits for it. The caller closes it."""
    if not spec.nics:
        return Networks()
    from .network import attach

    return attach(spec.nics, spec.publish, runtime, machine_name(spec), cpus=spec.cpus)


def foreseen(spec: MachineSpec, runtime: Path) -> Networks:
    """What ``attach`` would make; nothing is made."""
    if not spec.nics:
        return Networks()
    from .network import preview

    return preview(spec.nics, spec.publish, runtime, machine_name(spec), cpus=spec.cpus)


def interfaces(networks: Networks, engine: Literal["kvm", "qemu", "soft"]) -> tuple[Interface, ...]:
    """What the engine is to make; ``SpecError`` for what it has not. QEMU limits no NIC: the kernel does."""
    found = tuple(one.interface for one in networks.attachments)
    if engine == "qemu":
        if any(one.limits != Limits() and not one.bridged for one in found):
            raise SpecError(
                "engine qemu cannot limit the rate of a network interface but on nat, isolated or bridge",
                cost="the guest would not be held back",
                cure="use one of these or --engine kvm, or leave the limits out",
            )
        networks.hold_rates()
    return found
