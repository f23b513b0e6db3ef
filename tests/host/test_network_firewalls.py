"""Hosts that look at senders (rp_filter), and hosts whose firewall drops what it forwards, with real packets.

::

    "outside" 203.0.113.1 ── veth ── 203.0.113.2 "host": its own rules, and hostel's ── hostel0 ── guest

Either all that a network promises works there, or a line says what does not, and what to do.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guests.names import look_up
from guests.namespaces import HOST, OUTSIDE, Echo, Guest, Namespace, ask, load_rules, missing
from hostel.host import runtime
from hostel.host.net import firewall, kernel
from hostel.host.network import attach
from hostel.spec import Nic, Publish

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PUBLISH = [Publish(host=8080, guest=80), Publish(host=8080, guest=80, protocol="udp")]
Make = Callable[[], "Scene"]


class Scene:
    """A machine on a network of ours, who answers outside, and what hostel had to say."""

    def __init__(
        self, host: Namespace, outside: Namespace, guest: Guest, notes: tuple[str, ...]
    ) -> None:
        self.host, self.outside, self.guest, self.notes = host, outside, guest, notes

    def works(self) -> list[str]:
        """What is promised, and holds."""
        tried = {"names": self.finds_names()}
        for kind in ("tcp", "udp"):
            tried[f"out by {kind}"] = ask(self.guest, OUTSIDE, 7, kind, 0.5) == HOST
            tried[f"in by {kind}"] = ask(self.outside, HOST, 8080, kind, 0.5) == OUTSIDE
        tried["own port"] = ask(self.host, "127.0.0.1", 8080, patience=0.5) != ""
        return [what for what, is_so in tried.items() if is_so]

    def finds_names(self) -> bool:
        try:
            return look_up(self.guest, "one", patience=0.5) == [self.guest.address]
        except OSError:
            return False


ALL = ["names", "out by tcp", "in by tcp", "out by udp", "in by udp", "own port"]


@pytest.fixture
def make(places: tuple[Namespace, Namespace], tmp_path: Path) -> Iterator[Make]:
    """Once the host is as it is to be. Afterwards its rules are as they were."""
    host, outside = places
    rules: list[str] = []
    with ExitStack() as stack:

        def one() -> Scene:
            rules.append(host.run("nft list ruleset"))
            networks = stack.enter_context(attach([Nic()], PUBLISH, tmp_path, "one", cpus=1))
            guest = Guest(host, networks.attachments[0])
            stack.callback(guest.close)
            for server in (Echo(outside, 7), Echo(guest, 80)):
                stack.enter_context(server)
            return Scene(host, outside, guest, networks.notes)

        yield one
    deadline = time.monotonic() + 5
    while any(runtime.base().glob(".net-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rules == [host.run("nft list ruleset")]


def chain(table: str, name: str, hook: str, policy: str, *rules: str) -> str:
    head = f"{{ type filter hook {hook} priority 0; policy {policy}; }}"
    lines = [f"add table {table}", f"add chain {table} {name} {head}"]
    return "\n".join([*lines, *(f"add rule {table} {name} {rule}" for rule in rules), ""])


@pytest.mark.parametrize("mode", ["1", "2"], ids=["strict", "loose"])
def test_senders_are_looked_at(make: Make, mode: str) -> None:
    """Everywhere: the stricter of what holds for all interfaces and for one counts (ip-sysctl.rst)."""
    for name in ("all", "default", "eth0"):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text(mode)
    scene = make()
    assert scene.works() == ALL
    assert scene.notes == ()


RETURN = "ct state established,related accept"
HARMLESS = {
    "IPv6 alone": chain("ip6 filter", "FORWARD", "forward", "drop"),
    "iptables by policy": chain("ip filter", "FORWARD", "forward", "drop"),
    "iptables by its last rule": chain(
        *("ip filter", "FORWARD", "forward", "accept", RETURN),
        "counter reject with icmp type host-prohibited",
    )
    + chain("ip filter", "INPUT", "input", "accept", RETURN, "counter drop"),
    "accepts in the end": chain("inet mine", "f", "forward", "accept", "tcp dport 25 drop"),
}


@pytest.mark.parametrize("rules", HARMLESS.values(), ids=HARMLESS)
def test_all_works(make: Make, rules: str) -> None:
    load_rules(rules)
    scene = make()
    assert scene.works() == ALL
    assert scene.notes == ()


FORWARDED = (
    "drops what it forwards: guests reach nothing but their host; let the interface hostel0 through"
)
FOR_US = "drops what comes to the host: guests find no names before its rule "
FOR_US += 'iifname "hostel0" ct status dnat accept'
IN_THE_WAY = {
    "by policy": (
        chain("inet mine", "f", "forward", "drop"),
        f"inet mine {FORWARDED}",
        ["names", "own port"],
    ),
    "by its last rule": (
        chain("inet mine", "f", "forward", "accept", "tcp dport 25 drop", 'reject comment "no"'),
        f"inet mine {FORWARDED}",
        ["names", "own port"],
    ),
    "a table of iptables' name": (
        chain("ip filter", "forward", "forward", "drop"),
        f"ip filter {FORWARDED}",
        ["names", "own port"],
    ),
}


@pytest.mark.parametrize(("rules", "line", "left"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_a_line_says_what_does_not(make: Make, rules: str, line: str, left: list[str]) -> None:
    load_rules(rules)
    scene = make()
    assert scene.notes == (f"the firewall table {line}",)
    assert scene.works() == left


@pytest.mark.skipif(not shutil.which("iptables-legacy"), reason="iptables is not installed")
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("-P FORWARD DROP", FORWARDED),
        ("-A INPUT -j REJECT", FOR_US),
        ("-A INPUT -p tcp --dport 25 -j DROP", ""),
    ],
    ids=["by policy", "by its last rule", "accepts in the end"],
)
def test_the_older_iptables(
    make: Make, places: tuple[Namespace, Namespace], command: str, line: str
) -> None:
    """nft does not show its tables."""
    places[0].run(f"iptables-legacy {command}")
    scene = make()
    assert scene.notes == ((f"iptables (legacy) {line}",) if line else ())
    assert (scene.works() == ALL) == (not line)


@pytest.mark.parametrize(("switch", "told"), [("1", True), ("0", False)])
def test_frames_of_a_bridge_of_the_hosts(
    places: tuple[Namespace, Namespace], tmp_path: Path, switch: str, told: bool
) -> None:
    """Docker has them pass its rules, which drop them."""
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not path.exists():
        pytest.skip("this kernel has no br_netfilter")
    host, outside = places
    path.write_text(switch)
    host.run("ip link add br7 type bridge forward_delay 0", "ip link set br7 up")
    host.run("ip addr flush dev eth0", "ip link set eth0 master br7")
    load_rules(chain("ip filter", "FORWARD", "forward", "drop"))
    nic = Nic(mode="bridge", target="br7")
    with attach([nic], [], tmp_path, "", cpus=1) as networks, Echo(outside, 7):
        with Guest(host, networks.attachments[0]) as guest:
            guest.run("ip addr add 203.0.113.77/24 dev eth0")
            assert (ask(guest, OUTSIDE, 7, patience=0.5) == "") is told
        assert [line.partition(", whose")[0] for line in networks.notes] == (
            ["frames on br7 pass the host's firewall"] if told else []
        )


def test_a_bridge_of_the_hosts_needs_no_nft(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not path.exists():
        pytest.skip("this kernel has no br_netfilter")
    path.write_text("1")
    host.run("ip link add br7 type bridge forward_delay 0", "ip link set br7 up")
    monkeypatch.setattr(kernel, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert firewall.across("br7") == []
