"""Taps on a bridge of the host's, and macvtaps on an interface of the host's.

Their network is not ours: no addresses, no rules. What is made is one link a NIC.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from hostel.errors import HostError
from hostel.vmm.loop import EventLoop

from . import firewall, kernel, rates
from .state import State
from .watch import Watch


class _Links:
    """One link a lease."""

    def __init__(self, folder: str, target: str) -> None:
        self._target = target
        self.state = State(folder)
        self._links: dict[int, str] = {}
        self._limits: dict[int, dict[str, Any]] = {}
        self._count = 0
        self._watch: Watch | None = None

    def make(self, loop: EventLoop) -> None:
        self._loop = loop

    def _name(self, prefix: str) -> tuple[int, str]:
        """A free name, noted as ours."""
        present = kernel.interfaces()
        name = next(name for n in range(100000) if (name := f"{prefix}{n}") not in present)
        self._count += 1
        self._links[self._count] = name
        self.state.note("link", name)
        return self._count, name

    def limit(self, number: int, limits: dict[str, Any]) -> None:
        """The first rules here: from now on they are watched."""
        rates.hold(self.state, self._links[number], limits)
        self._limits[number] = limits
        self._watch = self._watch or Watch(self._loop, self)

    def restore(self) -> None:
        for number, limits in self._limits.items():
            rates.hold(self.state, self._links[number], limits)

    def reopen(self) -> None:
        pass

    def detach(self, number: int) -> None:
        self._limits.pop(number, None)
        name = self._links.pop(number)
        with contextlib.suppress(HostError):  # the host's interface has gone, and took it along
            kernel.ip([f"link del {name}"])
        self.state.forget("link", name)
        rates.release(self.state, name)


class Bridge(_Links):
    """A tap on a bridge that is there."""

    def attach(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number, tap = self._name("hostel-t")
        mtu = request["mtu"] or kernel.mtu(self._target)
        several = "multi_queue" if request["queues"] > 1 else ""
        try:
            kernel.ip(
                [
                    f"tuntap add dev {tap} mode tap vnet_hdr {several}",
                    f"link set {tap} address {_high_mac()}",
                    f"link set {tap} arp off addrgenmode none",  # before an MTU below 1280: no IPv6
                    f"link set {tap} mtu {mtu} master {self._target}",
                    f"link set {tap} up",
                ]
            )
            kernel.silence(tap)
        except HostError:
            self.detach(number)
            raise
        delay = kernel.forward_delay(self._target)
        notes = firewall.across(self._target)
        return number, {"target": tap, "mtu": mtu, "delay": delay, "notes": notes}


def _high_mac() -> str:
    """A bridge whose MAC nobody has set has the lowest of its ports' (IEEE 802.1D §14.2.5): not ours, or the
    host would be somebody else on its network whenever a machine comes or goes."""
    return "fe:" + os.urandom(5).hex(":")


class Macvtap(_Links):
    """A macvtap in bridge mode: the guest appears on the interface's own network, with its own MAC.

    The host itself cannot be reached that way (macvlan never sends back to its lower interface).
    """

    def attach(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        number, name = self._name("hostel-m")
        mtu = request["mtu"] or kernel.mtu(self._target)
        try:
            kernel.ip(
                [
                    f"link add link {self._target} name {name} address {request['mac']} mtu {mtu} "
                    "type macvtap mode bridge",
                    f"link set {name} addrgenmode none up",
                ]
            )
            device = f"/dev/tap{kernel.index(name)}"
            if not os.path.exists(device):
                raise HostError(
                    f"the kernel made {name} but there is no {device}",
                    cure="mount devtmpfs on /dev, or use --net bridge",
                )
        except HostError as error:
            self.detach(number)
            raise _explained(error, self._target) from None
        return number, {"target": device, "mtu": mtu}


def _explained(error: HostError, target: str) -> HostError:
    if "not supported" in error.message or "Unknown device type" in error.message:
        return HostError(f"no macvtap on {target}: {error.message}", cure="modprobe macvtap")
    return error
