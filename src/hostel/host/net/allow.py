"""Allow-lists: ``ADDRESS[/PREFIX]`` or a name, each with an optional ``:PORT[/tcp|udp]``.

A single address means that one, whoever has it: another machine, the host. A prefix means the world out
there only: ``0.0.0.0/0:443`` does not open the host's own services, nor other machines.
"""

from __future__ import annotations

import re
import socket

from hostel.errors import SpecError

_ENTRY = re.compile(
    r"(?P<host>[A-Za-z0-9_.-]+)(?:/(?P<prefix>\d{1,2}))?"
    r"(?::(?P<port>\d{1,5})(?:/(?P<protocol>tcp|udp))?)?"
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


class Allowed:
    """One entry. ``kind`` says what ``host`` is: ``address``, ``prefix`` or ``name``."""

    def __init__(self, kind: str, host: str, port: int, protocol: str) -> None:
        self.kind, self.host, self.port, self.protocol = kind, host, port, protocol

    def service(self) -> str:
        """The part of an nft rule about protocol and port; empty if there is none."""
        if not self.port:
            return ""
        if self.protocol:
            return f"{self.protocol} dport {self.port}"
        return f"meta l4proto {{ tcp, udp }} th dport {self.port}"


def parse(text: str) -> Allowed:
    """``SpecError`` for what is none."""
    if text.count(":") > 1:
        raise SpecError(
            f"not a destination to allow: {text!r}",
            cost="networks of hostel's own carry IPv4 only: no IPv6 address is reached anyway",
            cure="write ADDRESS[/PREFIX] or NAME, and :PORT[/tcp|udp] if need be",
        )
    match = _ENTRY.fullmatch(text)
    if match is None or int(match["port"] or 1) not in range(1, 65536):
        raise _wrong(text)
    host, prefix = match["host"].lower().rstrip("."), match["prefix"]
    kind = "prefix" if prefix and prefix != "32" else "address"
    if re.fullmatch(r"[0-9.]+", host):
        if int(prefix or 32) > 32 or not _is_address(host):
            raise _wrong(text)
        host = f"{host}/{prefix}" if kind == "prefix" else host
    elif prefix or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise _wrong(text)
    else:
        kind = "name"
    return Allowed(kind, host, int(match["port"] or 0), match["protocol"] or "")


def _is_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET, text)
    except OSError:
        return False
    return True


def _wrong(text: str) -> SpecError:
    return SpecError(
        f"not a destination to allow: {text!r}",
        cure="write ADDRESS[/PREFIX] or NAME, and :PORT[/tcp|udp] if need be",
    )
