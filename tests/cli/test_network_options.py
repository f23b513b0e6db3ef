"""How the texts of ``--net``, ``--publish`` and ``--allow`` become a machine's NICs and ports."""

from __future__ import annotations

from typing import Any

import pytest

from cli.hostel_command import Hostel
from hostel.cli import network
from hostel.errors import HostelError, SpecError, UserError
from hostel.spec import Limits, Nic, Publish, Rate

NICS = [
    ("nat", Nic()),
    ("nat=lab", Nic(target="lab")),
    ("isolated=lab", Nic(mode="isolated", target="lab")),
    ("bridge=br0,mtu=9000", Nic(mode="bridge", target="br0", mtu=9000)),
    ("tap=tap0,queues=4,plane=vhost", Nic(mode="tap", target="tap0", queues=4, plane="vhost")),
    (
        "macvtap=eth0,mac=02:00:00:00:00:01",
        Nic(mode="macvtap", target="eth0", mac="02:00:00:00:00:01"),
    ),
    ("user", Nic(mode="user")),
    ("vhost-user=/run/a.sock", Nic(mode="vhost-user", target="/run/a.sock")),
    ("nat,ip=10.213.0.9,model=e1000", Nic(address="10.213.0.9", model="e1000")),
    (
        "nat,bps=1M,pps=1000",
        Nic(limits=Limits(bytes=Rate(per_second=1 << 20), operations=Rate(per_second=1000))),
    ),
    ("bridge=br0,ip=dhcp", Nic(mode="bridge", target="br0", address="dhcp")),
    ("none", None),
]


@pytest.mark.parametrize(("text", "nic"), NICS)
def test_nic(text: str, nic: Nic | None) -> None:
    assert network.nic(text) == nic


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a network mode"),
        ("isolate", "did you mean isolated"),
        ("none,mtu=9000", "nothing to set"),
        ("nat,colour=red", "not a setting"),
        ("nat,mtu", "not a setting"),
        ("nat,mtu=", "not a setting"),
        ("nat,mtu=1,mtu=2", "set twice"),
        ("nat,mtu=big", "not a number"),
        ("nat,mtu=67", "68 to 65521"),
        ("nat,mtu=65536", "68 to 65521"),
        ("nat,queues=0", "1 to 16 pairs"),
        ("nat,queues=17", "1 to 16 pairs"),
        ("nat,mac=52:54:00:12:34", "not the MAC"),
        ("nat,mac=01:00:5e:00:00:01", "not the MAC"),
        ("nat,mac=00:00:00:00:00:00", "not the MAC"),
        ("nat,ip=10.213.0", "not an IPv4 address"),
        ("nat,ip=10.213.0.0/24", "no machine can have"),
        ("nat,ip=10.213.0.255/24", "no machine can have"),
        ("nat,ip=127.0.0.1", "no machine can have"),
        ("nat,ip=::1", "not an IPv4 address"),
        ("nat,model=rtl8139", "not one of virtio, e1000"),
        ("nat,plane=fast", "not one of auto"),
        ("nat,plane=vhost-user", "vhost-user=SOCKET"),
        ("nat,model=e1000,plane=vhost", "emulated"),
        ("user,plane=vhost", "no plane vhost"),
        ("user=x", "not a network"),
        ("nat=a/b", "not a network"),
        ("bridge", "needs a target"),
        ("tap", "needs a target"),
        ("tap=much-too-long-a-name", "not the name of an interface"),
        ("nat,bps=fast", "not a size"),
    ],
)
def test_no_nic(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network.nic(text)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("8080:80", (Publish(host=8080, guest=80),)),
        (
            "127.0.0.1:53:5353/udp",
            (Publish(host=53, guest=5353, address="127.0.0.1", protocol="udp"),),
        ),
        ("80:80/tcp", (Publish(host=80, guest=80),)),
        ("8000-8001:80-81", (Publish(host=8000, guest=80), Publish(host=8001, guest=81))),
        ("[::1]:80:80", (Publish(host=80, guest=80, address="::1"),)),
    ],
)
def test_ports(text: str, ports: tuple[Publish, ...]) -> None:
    assert network.published(text) == ports


@pytest.mark.parametrize(
    "text",
    ["", "80", "80:", ":80", "a:b", "80:80/sctp", "0:80", "80:0", "65536:80", "1-3:1-2", "3-1:3-1",
     "1-5000:1-5000", "1.2.3:80:80", "1.2.3.400:80:80"],
)  # fmt: skip
def test_no_ports(text: str) -> None:
    with pytest.raises(UserError):
        network.published(text)


@pytest.mark.parametrize("wrong", [{"mode": "lan"}, {"model": "rtl8139"}, {"plane": "slow"}])
def test_words_that_no_nic_knows(wrong: dict[str, Any]) -> None:
    """In the library nobody else has looked at them."""
    with pytest.raises(SpecError, match=f"not a .*{next(iter(wrong.values()))}.* one of "):
        Nic(**wrong)


def test_a_range_backwards_is_called_so() -> None:
    with pytest.raises(UserError, match="lowest first"):
        network.published("8010-8000:9000-9010")


def test_defaults_go_where_they_can() -> None:
    nics = network.nics([Nic(), Nic(plane="python"), Nic(model="e1000")], "vhost", ["1.1.1.1"], bad)
    assert [nic.plane for nic in nics] == ["vhost", "python", "auto"]
    assert [nic.allow for nic in nics] == [("1.1.1.1",)] * 3
    assert network.nics([], "auto", [], lambda: Nic(mode="user")) == (Nic(mode="user"),)
    assert network.nics([None], "auto", [], bad) == ()


def bad() -> Nic | None:
    raise AssertionError("asked for a default although there is a --net")


@pytest.mark.parametrize(
    ("net", "allow", "message"),
    [
        ([None, Nic()], [], "none beside another"),
        ([None], ["1.1.1.1"], "machine with a network"),
        ([Nic(mode="user")], ["1.1.1.1"], "not filtered"),
        ([Nic(), Nic(mode="tap", target="tap0")], ["1.1.1.1"], "not filtered"),
    ],
)
def test_what_contradicts_itself(net: list[Nic | None], allow: list[str], message: str) -> None:
    with pytest.raises(HostelError, match=message):
        network.nics(net, "auto", allow, bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "none", "-p", "80:80"], "no NIC"),
        (["--net", "tap=tap0", "-p", "80:80"], "mode tap"),
        (["--net", "nat", "-p", "80:80", "-p", "80:81"], "published twice"),
        (["--net", "nat", "-p", "80:80", "-p", "127.0.0.1:80:81"], "published twice"),
        (["--net", "nat", "--allow", "1.2.3.4/99"], "not a destination"),
        (["--net", "tap=nosuch"], "no interface nosuch"),
        (
            ["--net", "bridge=lo"],
            "lo is no bridge; it carries no guest; see `ip link",
        ),
        (["--net", "nat,mtu=65522"], "68 to 65521"),
        (["--net", "nat,ip=dhcp"], "without DHCP"),
        (["--net", "user,ip=none"], "without DHCP"),
        (["--net", "nat="], "no target behind 'nat='"),
        (["--net", "none", "--net-plane", "vhost"], "--net-plane is for a machine with a network"),
        (["--net", "user", "--net", "user"], "two NICs of one machine on user; it serves one NIC"),
        (["--net", "tap=t0", "--net", "tap=t0"], "two NICs of one machine on tap t0"),
        (["--net", "vhost-user=/nosuch"], "no socket"),
        (["--net", "nat,model=e1000", "--transport", "mmio"], "PCI device"),
        (["--net", "nat,mac=02:00:00:00:00:01"] * 2, "same MAC"),
    ],
)
def test_what_cannot_be_is_said_before_the_start(
    hostel: Hostel, options: list[str], message: str
) -> None:
    result = hostel("run", "-q", *options, "true")
    assert result.returncode == 125
    assert message in result.stderr.decode()
    assert len(result.stderr.splitlines()) == 1
