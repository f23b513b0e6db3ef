"""The host's own firewall, where it would keep our packets: a way through, or a line that says so.

Docker, ufw and others drop what is forwarded (table ``ip filter``, chain ``FORWARD``, by its policy or its
last rule; made by iptables-nft). No accept of our own table helps against that: their chain asks too. So two
rules, with our name as comment, go in front: into ``DOCKER-USER``, which is there for this, or ``FORWARD``
itself; and one for names into ``INPUT`` if that drops. Any other firewall is the administrator's: we say what
it costs.

Only what keeps IPv4 counts: our networks have no IPv6. The tables of the older iptables are not nftables';
its own program shows them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hostel.errors import MissingTool

from . import kernel

_CHAIN = re.compile(r"^\tchain (\S+) \{(?:\n\t\ttype (\w+) hook (\w+) [^;]*; policy (\w+);)?", re.M)
_REFUSAL = re.compile(
    r'(counter( packets \d+ bytes \d+)? )?(drop|reject( with [^"]*)?)( comment ".*")?'
)
"""A rule that says no to every packet. One that is narrower begins with what it matches."""
OPENED = {"forward": "FORWARD", "input": "INPUT"}
"""The chains of ``ip filter`` that iptables makes: there we may open a way."""
LEGACY_TABLES = "/proc/thread-self/net/ip_tables_names"
_COSTS = {
    "forward": "guests reach nothing but their host; let the interface {} through",
    "input": 'guests find no names before its rule iifname "{}" ct status dnat accept',
}


class Table(NamedTuple):
    """One that may keep packets of ours."""

    family: str
    name: str
    chains: list[str]
    closed: dict[str, str]
    """By hook, the chain that says no to what nothing else lets through."""

    @property
    def is_iptables(self) -> bool:
        return (self.family, self.name) == ("ip", "filter")


def look(bridge: str) -> tuple[str, list[str]]:
    """Rules to let the bridge's packets through; and what is in the way and not ours, as notes."""
    ways, notes = "", _legacy(bridge)
    for table in _tables():
        for hook, chain in table.closed.items():
            if table.is_iptables and chain == OPENED[hook]:
                ways += "".join(_openings(bridge, hook, table.chains))
            else:
                cost = _COSTS[hook].format(bridge)
                notes.append(
                    f"the firewall table {table.family} {table.name} drops {_what(hook)}: {cost}"
                )
        if table.name == "firewalld":
            cure = f"firewall-cmd --zone=trusted --add-interface={bridge}"
            notes.append(f"firewalld may keep the guests from the network: {cure}")
    return ways, notes


def across(bridge: str) -> list[str]:
    """The same for a bridge of the host's, whose frames may be made to pass its IP rules; all is as notes."""
    if kernel.sysctl("bridge/bridge-nf-call-iptables") != "1":
        return []
    try:
        tables = _tables()
    except MissingTool:  # such a bridge needs no nft; what its rules are stays unknown
        return []
    closed = [f"{table.family} {table.name}" for table in tables if "forward" in table.closed]
    closed += ["filter of iptables-legacy"] if "forward" in _legacy_closed() else []
    return [
        f"frames on {bridge} pass the host's firewall, whose table {table} drops what it forwards: the"
        f" guest may reach nothing; let {bridge} through, or"
        " `sysctl -w net.bridge.bridge-nf-call-iptables=0`"
        for table in closed
    ]


def is_open(bridge: str, ways: str) -> bool:
    """Whether our rules, ``ways``, stand there."""
    text = kernel.run([kernel.find("nft"), "list", "table", "ip", "filter"])
    return text.count(_mark(bridge)) == ways.count(_mark(bridge))


def close(bridge: str) -> None:
    """Take our rules out of the host's chains again."""
    mark = _mark(bridge)
    for table in _tables():
        for chain in table.chains if table.is_iptables else ():
            ours = [line for line in _rules("ip", "filter", chain) if mark in line]
            handles = [line.rpartition("# handle ")[2] for line in ours]
            kernel.nft("".join(f"delete rule ip filter {chain} handle {h}\n" for h in handles))


def _what(hook: str) -> str:
    return "what it forwards" if hook == "forward" else "what comes to the host"


def _mark(bridge: str) -> str:
    return f'comment "hostel {bridge}"'


def _openings(bridge: str, hook: str, chains: list[str]) -> list[str]:
    rule = f"accept {_mark(bridge)}\n"
    if hook == "input":
        return [f'insert rule ip filter INPUT iifname "{bridge}" ct status dnat counter {rule}']
    chain = "DOCKER-USER" if "DOCKER-USER" in chains else "FORWARD"
    return [
        f'insert rule ip filter {chain} {side} "{bridge}" counter {rule}'
        for side in ("iifname", "oifname")
    ]


# -- what there is ------------------------------------------------------------------------------------


def _tables() -> list[Table]:
    """Those of the host that see IPv4. Chains that let pass in the end are looked at, rule by rule."""
    text = kernel.run([kernel.find("nft"), "list", "chains"])
    found = []
    for part in text.split("table ")[1:]:
        family, name = part.split()[:2]
        if family not in ("ip", "inet") or name.startswith("hostel"):
            continue
        table = Table(family, name, [], {})
        for match in _CHAIN.finditer(part):
            chain, kind, hook, policy = match.groups()
            table.chains.append(chain)
            if kind == "filter" and hook in OPENED and _is_closed(table, chain, policy):
                table.closed[hook] = chain
        found.append(table)
    return found


def _is_closed(table: Table, chain: str, policy: str) -> bool:
    if table.name == "firewalld":
        return False
    if policy == "drop":
        return True
    last = _rules(table.family, table.name, chain)[-1:]
    return any(_REFUSAL.fullmatch(line.rpartition(" # handle ")[0]) for line in last)


def _rules(family: str, table: str, chain: str) -> list[str]:
    """The rules of a chain, each with its handle."""
    text = kernel.run([kernel.find("nft"), "-a", "list", "chain", family, table, chain])
    lines = [line.strip() for line in text.splitlines() if line.startswith("\t\t")]
    return [line for line in lines if not line.startswith("type ")]


def _legacy(bridge: str) -> list[str]:
    closed = _legacy_closed()
    return [
        f"iptables (legacy) drops {_what(hook)}: {_COSTS[hook].format(bridge)}"
        for hook in OPENED
        if hook in closed
    ]


def _legacy_closed() -> list[str]:
    """The hooks at which the older iptables says no in the end."""
    try:
        with open(LEGACY_TABLES) as file:
            if "filter" not in file.read().split():
                return []
        text = kernel.run([kernel.find("iptables-legacy"), "-S"])
    except (OSError, MissingTool):  # no such tables; or whoever made them is not of this host
        return []
    last = {line.split()[1]: line for line in text.splitlines()}
    refusal = re.compile(r"-P \w+ DROP|-A \w+ -j (DROP|REJECT).*")
    rules = text.splitlines()
    return [
        hook
        for hook, chain in OPENED.items()
        if f"-P {chain} DROP" in rules or refusal.fullmatch(last.get(chain, ""))
    ]
