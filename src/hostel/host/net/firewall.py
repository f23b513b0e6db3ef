"""The host's own firewall, where it would keep our packets: a way through for our bridge.

Docker and ufw drop what is forwarded (table ``ip filter``, chain ``FORWARD``, policy drop; also made by
iptables-nft). No accept of our own table helps against that: their chain asks too. So two rules, with
our name as comment, go in front: into ``DOCKER-USER``, which is there for this, or ``FORWARD`` itself;
and one for names into ``INPUT`` if that drops. Any other firewall is the administrator's: we say so.
"""

from __future__ import annotations

import re

from . import kernel

_CHAIN = re.compile(
    r"^\tchain (\S+) \{(?:\n\t\ttype filter hook (\w+) [^;]*; policy (\w+);)?", re.M
)


def look(bridge: str) -> tuple[str, list[str]]:
    """Rules to let the bridge's packets through; and what is in the way and not ours, as notes."""
    ways, notes = "", []
    for family, table, chains in _tables():
        hooks = {hook for hook, policy in chains.values() if policy == "drop"}
        dropping = hooks & {"forward", "input"}
        if (family, table) == ("ip", "filter"):
            ways += "".join(_openings(bridge, chains))
        elif table == "firewalld":
            cure = f"firewall-cmd --zone=trusted --add-interface={bridge}"
            notes.append(f"firewalld may keep the guests from the network: {cure}")
        elif family in ("ip", "inet"):
            notes += (_note(bridge, f"{family} {table}", hook) for hook in sorted(dropping))
    return ways, notes


def is_open(bridge: str, ways: str) -> bool:
    """Whether our rules, ``ways``, stand there."""
    text = kernel.run([kernel.find("nft"), "list", "table", "ip", "filter"])
    return text.count(_mark(bridge)) == ways.count(_mark(bridge))


def close(bridge: str) -> None:
    """Take our rules out of the host's chains again."""
    mark = _mark(bridge)
    for family, table, chains in _tables():
        if (family, table) != ("ip", "filter"):
            continue
        for chain in chains:
            text = kernel.run([kernel.find("nft"), "-a", "list", "chain", family, table, chain])
            ours = [line for line in text.splitlines() if mark in line]
            handles = [line.rpartition("# handle ")[2] for line in ours]
            kernel.nft("".join(f"delete rule ip filter {chain} handle {h}\n" for h in handles))


def _tables() -> list[tuple[str, str, dict[str, tuple[str, str]]]]:
    """Family, name, and each chain's hook and policy (empty for one without)."""
    text = kernel.run([kernel.find("nft"), "list", "chains"])
    found = []
    for part in text.split("table ")[1:]:
        family, table = part.split()[:2]
        found.append(
            (family, table, {m[1]: (m[2] or "", m[3] or "") for m in _CHAIN.finditer(part)})
        )
    return found


def _mark(bridge: str) -> str:
    return f'comment "hostel {bridge}"'


def _openings(bridge: str, chains: dict[str, tuple[str, str]]) -> list[str]:
    rule = f"accept {_mark(bridge)}\n"
    lines = []
    if chains.get("FORWARD", ("", ""))[1] == "drop":
        chain = "DOCKER-USER" if "DOCKER-USER" in chains else "FORWARD"
        for side in ("iifname", "oifname"):
            lines.append(f'insert rule ip filter {chain} {side} "{bridge}" counter {rule}')
    if chains.get("INPUT", ("", ""))[1] == "drop":
        lines.append(
            f'insert rule ip filter INPUT iifname "{bridge}" ct status dnat counter {rule}'
        )
    return lines


def _note(bridge: str, table: str, hook: str) -> str:
    """Of chains whose policy is to drop, as far as there are any; what rules drop is not seen."""
    if hook == "forward":
        return (
            f"the firewall table {table} drops what it forwards: let the interface {bridge} through"
        )
    rule = f'iifname "{bridge}" ct status dnat accept'
    return f"the firewall table {table} drops what comes in: no names for machines before its rule {rule}"
