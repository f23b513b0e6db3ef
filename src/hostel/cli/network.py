"""The options of a machine's network, and how their texts become ``Nic`` and ``Publish``.

::

    --net MODE[=TARGET][,KEY=VALUE…]   a NIC each          ─┐
    --net-plane PLANE                  of all without one   ├─► nics
    --allow DEST                       of all               ┘
    -p [IP:]HOST:GUEST[/PROTOCOL]      ports, or ranges     ──► publish
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import msgspec

from hostel.errors import SpecError, UserError
from hostel.spec import Limits, NetMode, NetPlane, Nic, Publish, Rate, parse_size

from .line import Option, option
from .options import meant

NONE = "none"
MODES = (*get_args(NetMode), NONE)
PLANES = get_args(NetPlane)
MODELS = ("virtio", "e1000")
MAX_RANGE = 1000
"""Ports of one ``-p``: each is a rule of the host's firewall."""

_PORTS = (
    r"(?:(?P<address>\[[0-9a-fA-F:.]+\]|[0-9.]*):)?"
    r"(?P<host>\d{1,5})(?:-(?P<host_end>\d{1,5}))?"
    r":(?P<guest>\d{1,5})(?:-(?P<guest_end>\d{1,5}))?"
    r"(?:/(?P<protocol>tcp|udp))?"
)


def nic(text: str) -> Nic | None:
    """``MODE[=TARGET][,KEY=VALUE…]``; None for ``none``."""
    first, *rest = text.split(",")
    mode, equals, target = first.partition("=")
    if mode not in MODES:
        from difflib import get_close_matches

        near = meant(get_close_matches(mode, MODES))
        raise UserError(f"not a network mode: {mode!r}{near}", cure=f"one of {', '.join(MODES)}")
    if equals and not target:
        raise UserError(f"no target behind {first!r}", cure=f"write {mode}=NAME, or {mode}")
    if mode == NONE:
        if target or rest:
            raise UserError("--net none has nothing to set")
        return None
    given: dict[str, Any] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in _KEYS or not (equals and value):
            raise UserError(
                f"not a setting of a NIC: {part!r}", cure=f"write KEY=VALUE, of {', '.join(_KEYS)}"
            )
        name, parse = _KEYS[key]
        if name in given:
            raise UserError(f"{key} is set twice in {text!r}")
        given[name] = parse(value)
    limits = Limits(bytes=given.pop("bytes", None), operations=given.pop("operations", None))
    return Nic(mode=mode, target=target, limits=limits, **given)  # type: ignore[arg-type]


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"not a number: {text!r}")
    return int(text)


def _choice(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise UserError(f"not one of {', '.join(choices)}: {text!r}")
        return text

    return parse


def _rate(text: str) -> Rate:
    return Rate(per_second=parse_size(text))


_KEYS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "mac": ("mac", str),
    "ip": ("address", str),
    "mtu": ("mtu", _number),
    "queues": ("queues", _number),
    "model": ("model", _choice(MODELS)),
    "plane": ("plane", _choice(PLANES)),
    "bps": ("bytes", _rate),
    "pps": ("operations", _rate),
}
"""What a person writes, the field that it is, and how it is read."""


def published(text: str) -> tuple[Publish, ...]:
    """``[IP:]HOST:GUEST[/udp]``; both may be ranges of the same length, as docker has them."""
    match = re.fullmatch(_PORTS, text)
    if match is None:
        raise UserError(
            f"not a port to publish: {text!r}",
            cure="write [IP:]HOST:GUEST[/udp], such as 8080:80 or 127.0.0.1:53:53/udp",
        )
    host, guest = _range(match, "host"), _range(match, "guest")
    if not all(1 <= len(ports) <= MAX_RANGE for ports in (host, guest)):
        raise UserError(f"a range has 1 to {MAX_RANGE} ports, the lowest first: {text!r}")
    if len(host) != len(guest):
        raise UserError(f"two ranges of different length: {text!r}")
    return tuple(
        Publish(
            host=one,
            guest=other,
            address=(match["address"] or "").strip("[]"),
            protocol=match["protocol"] or "tcp",  # type: ignore[arg-type]
        )
        for one, other in zip(host, guest, strict=True)
    )


def _range(match: re.Match[str], name: str) -> range:
    first = int(match[name])
    return range(first, int(match[f"{name}_end"] or first) + 1)


def options(default: str = NONE) -> tuple[Option, ...]:
    """``--net``, ``--net-plane``, ``-p``, ``--allow``. ``default``: what there is without ``--net``."""
    return (
        option(
            "Network",
            "--net",
            "--network",
            type=nic,
            multiple=True,
            metavar="MODE[=TARGET][,KEY=VALUE…]",
            help=f"A network: {', '.join(MODES)}. Keys: {', '.join(_KEYS)}. [default: {default}]",
        ),
        option(
            "Network",
            "--net-plane",
            choices=PLANES,
            default="auto",
            help="Who moves the packets of a NIC: this process, the host's kernel (vhost), or another "
            "process. [default: the best that the host has]",
        ),
        option(
            "Network",
            "-p",
            "--publish",
            type=published,
            multiple=True,
            metavar="[IP:]HOST:GUEST[/udp]",
            help="A port of the host, or a range, that leads to the guest's.",
        ),
        option(
            "Network",
            "--allow",
            multiple=True,
            metavar="DEST",
            help="All that the guest may reach: ADDRESS[/PREFIX] or NAME, with :PORT[/tcp|udp].",
        ),
    )


def nics(
    net: Sequence[Nic | None], plane: str, allow: Sequence[str], default: Callable[[], Nic | None]
) -> tuple[Nic, ...]:
    """The NICs of the command line; without ``--net``, the default one, if there is one."""
    if None in net and len(net) > 1:
        raise UserError("--net none beside another --net")
    chosen = [one for one in (net or (default(),)) if one is not None]
    if plane != "auto" and not chosen:
        raise SpecError("--net-plane is for a machine with a network")
    chosen = [_with_plane(one, plane) for one in chosen]
    if allow:
        if not chosen:
            raise SpecError("--allow is for a machine with a network")
        # Of every NIC: what is not on the list is not to be reached by another way.
        chosen = [msgspec.structs.replace(one, allow=tuple(allow)) for one in chosen]
    return tuple(chosen)


def _with_plane(nic: Nic, plane: str) -> Nic:
    """``--net-plane`` is a default: it goes to NICs that have a choice."""
    if nic.plane != "auto" or nic.model == "e1000" or nic.mode == "vhost-user":
        return nic
    return msgspec.structs.replace(nic, plane=plane)


def ports(publish: Sequence[tuple[Publish, ...]]) -> tuple[Publish, ...]:
    return tuple(port for ports in publish for port in ports)
