"""How networks begin and end: nothing is left, whoever is killed; and what cannot be is said in a line."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guests.killed import Victim, gone_within, lives
from guests.names import NameServer, look_up
from guests.namespaces import (
    HOST,
    OUTSIDE,
    Echo,
    Guest,
    Namespace,
    ask,
    load_rules,
    missing,
    open_tap,
    reached,
    world,
)
from hostel.errors import HostelError, HostError, SpecError, UserError
from hostel.host import runtime
from hostel.host.interface import Attachment
from hostel.host.network import attach, preview
from hostel.spec import Limits, Nic, Publish, Rate

LIMITS = Limits(bytes=Rate(per_second=1 << 20))

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SCRIPT = """
import sys, time, msgspec
from pathlib import Path
from hostel.host.network import attach
from hostel.spec import Nic, Publish
nics, publish = msgspec.json.decode(sys.argv[1], type=tuple[list[Nic], list[Publish]])
networks = attach(nics, publish, Path(sys.argv[2]), sys.argv[3], cpus=2)
attachments = networks.attachments
networks.hold_rates()
print(msgspec.json.encode(attachments).decode(), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Namespace, Namespace]]:
    with world() as both:
        yield both


@pytest.fixture
def host(places: tuple[Namespace, Namespace]) -> Iterator[Namespace]:
    """A host on which nothing is left afterwards."""
    deadline = time.monotonic() + 5
    while any(runtime.base().glob(".net-*")) and time.monotonic() < deadline:
        time.sleep(0.02)  # of another module's last machine
    before = snapshot(places[0])
    yield places[0]
    deadline = time.monotonic() + 5
    while (now := snapshot(places[0])) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before


def snapshot(host: Namespace) -> tuple[str, ...]:
    links = sorted(line.split()[1] for line in host.run("ip -o link").splitlines())
    forwarding = Path("/proc/sys/net/ipv4/conf/eth0/forwarding").read_text()
    folders = sorted(path.name for path in runtime.base().glob(".net-*"))
    return (*links, forwarding, host.run("nft list ruleset"), *folders)


def machine(folder: Path, name: str, *nics: Nic, publish: tuple[Publish, ...] = ()) -> Victim:
    """Somebody else's hostel, with these NICs, to be killed."""
    return Victim(SCRIPT, msgspec.json.encode((nics, publish)).decode(), str(folder), name)


def attachments(victim: Victim) -> list[Attachment]:
    return msgspec.json.decode(victim.line, type=list[Attachment])


def keepers() -> list[int]:
    """The pids of living keepers, by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and lives(int(entry.name)):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"net/start.py" in command and os.fsencode(runtime.base()) in command:
                found.append(int(entry.name))
    return found


def test_all_goes_when_the_machine_is_killed(host: Namespace, tmp_path: Path) -> None:
    nics = (
        Nic(allow=("192.0.2.1",), queues=2),
        Nic(mode="isolated", limits=LIMITS),
        Nic(target="m" * 63),
    )
    with machine(tmp_path, "one", *nics, publish=(Publish(host=8080, guest=80),)) as victim:
        assert len(attachments(victim)) == 3
        pids = keepers()
        assert len(pids) == 3
        victim.kill()
        assert all(gone_within(pid, 5) for pid in pids)


def test_the_network_stays_while_another_uses_it(
    host: Namespace, outside: Namespace, tmp_path: Path
) -> None:
    """The first machine started the keeper and is killed; the second one's packets still pass."""
    with machine(tmp_path, "one", Nic()) as victim, machine(tmp_path, "two", Nic()) as other:
        (pid,) = keepers()
        with Guest(host, attachments(other)[0]) as guest, Echo(outside, 7):
            assert ask(guest, OUTSIDE, 7) == HOST
            victim.kill()
            until(lambda: attachments(victim)[0].interface.target not in host.run("ip -o link"))
            assert ask(guest, OUTSIDE, 7, "udp") == HOST
            assert keepers() == [pid]


def test_machines_that_start_at_once_share_one_network(host: Namespace, tmp_path: Path) -> None:
    argument = msgspec.json.encode(([Nic()], [])).decode()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, argument, str(tmp_path), f"m{n}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    try:
        lines = [process.stdout.readline() for process in started if process.stdout]
        found = [msgspec.json.decode(line, type=list[Attachment])[0] for line in lines]
        assert len({one.interface.target for one in found}) == 4
        assert len({one.link.addresses for one in found if one.link}) == 4
        assert len({one.link.gateway for one in found if one.link}) == 1
        assert len(keepers()) == 1
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def test_a_killed_keeper_is_cleared_away_after(host: Namespace, tmp_path: Path) -> None:
    nic = Nic(limits=LIMITS)
    with machine(tmp_path, "one", nic, publish=(Publish(host=8080, guest=80),)) as victim:
        (pid,) = keepers()
        os.kill(pid, signal.SIGKILL)
        assert gone_within(pid, 5)
        victim.kill()
        assert "limit octets" in host.run("nft list ruleset")
        assert "hostel0" in host.run("ip -o link")
        assert any(name.startswith(".net-nat") for name in runtime.sweep())


def test_a_killed_keeper_harms_no_running_machine(
    host: Namespace, outside: Namespace, tmp_path: Path
) -> None:
    """Its bridge stays until it ends; a new machine gets a network beside it."""
    with machine(tmp_path, "one", Nic()) as victim:
        with Guest(host, attachments(victim)[0]) as guest, Echo(outside, 7):
            (pid,) = keepers()
            os.kill(pid, signal.SIGKILL)
            assert gone_within(pid, 5)
            with attach([Nic()], (), tmp_path, "two", cpus=1) as networks:
                link = networks.attachments[0].link
                assert link is not None
                assert link.addresses[0].rpartition(".")[0] != guest.address.rpartition(".")[0]
                runtime.sweep()
                assert ask(guest, OUTSIDE, 7) == HOST
            until(lambda: not keepers())
        victim.kill()
        until(lambda: bool(runtime.sweep()))


def test_a_keeper_that_is_told_to_end_takes_all_down(host: Namespace, tmp_path: Path) -> None:
    with attach([Nic()], (), tmp_path, "", cpus=1) as networks:
        assert networks.attachments
        (pid,) = keepers()
        os.kill(pid, signal.SIGTERM)
        assert gone_within(pid, 5)
        assert "hostel0" not in host.run("ip -o link")


def test_forwarding_is_closed_by_the_last_network(host: Namespace, tmp_path: Path) -> None:
    switch = Path("/proc/sys/net/ipv4/conf/eth0/forwarding")
    assert switch.read_text() == "0\n"
    with attach([Nic(target="red")], (), tmp_path, "", cpus=1) as red:
        assert red.attachments
        with attach([Nic(target="blue")], (), tmp_path, "", cpus=1) as blue:
            assert blue.attachments
        until(lambda: len(keepers()) == 1)
        assert switch.read_text() == "1\n"
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"


def test_docker_s_firewall(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    """A table like iptables-nft makes, with the policy that Docker sets."""
    table = "add table ip filter; add chain ip filter DOCKER-USER; add chain ip filter FORWARD "
    table += "{ type filter hook forward priority 0; policy drop; };"
    table += "add rule ip filter FORWARD jump DOCKER-USER;"
    table += "add chain ip filter INPUT { type filter hook input priority 0; policy drop; };"
    table += "add rule ip filter INPUT ct state established accept;"
    load_rules(table)
    before = host.run("nft list table ip filter")
    try:
        networks = attach([Nic()], [Publish(host=8080, guest=80)], tmp_path, "one", cpus=1)
        with networks, Echo(outside, 7), Guest(host, networks.attachments[0]) as guest:
            with Echo(guest, 80):
                assert ask(guest, OUTSIDE, 7) == HOST
                assert ask(outside, HOST, 8080) == OUTSIDE
            assert look_up(guest, "one") == [guest.address]
            assert networks.notes == ()
        until(lambda: not keepers())
        assert host.run("nft list table ip filter") == before
    finally:
        host.run("nft delete table ip filter")


def test_any_other_firewall_is_named(host: Namespace, tmp_path: Path) -> None:
    chain = "{ type filter hook forward priority 0; policy drop; }"
    text = f"add table inet mine; add chain inet mine f {chain}"
    load_rules(text)
    try:
        with attach([Nic()], (), tmp_path, "", cpus=1) as networks:
            assert networks.attachments
            assert len(networks.notes) == 1
            assert "inet mine" in networks.notes[0]
    finally:
        host.run("nft delete table inet mine")


# -- networks of the host's ---------------------------------------------------------------------


def test_bridge_of_the_host(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    host.run(
        "ip link add br7 type bridge", "ip addr add 192.0.2.1/24 dev br7", "ip link set br7 up"
    )
    try:
        with machine(tmp_path, "", Nic(mode="bridge", target="br7")) as victim:
            (attachment,) = attachments(victim)
            assert attachment.link is None
            with Guest(host, attachment) as guest, Echo(host, 7):
                guest.run("ip addr add 192.0.2.2/24 dev eth0")
                assert ask(guest, "192.0.2.1", 7) == "192.0.2.2"
            victim.kill()
            until(lambda: not keepers())
        assert attachment.interface.target not in host.run("ip -o link")
    finally:
        host.run("ip link del br7")


def test_macvtap(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    with machine(tmp_path, "", Nic(mode="macvtap", target="eth0")) as victim:
        (attachment,) = attachments(victim)
        assert attachment.interface.target.startswith("/dev/tap")
        with Guest(host, attachment) as guest, Echo(outside, 7):
            guest.run("ip addr add 203.0.113.77/24 dev eth0")
            assert ask(guest, OUTSIDE, 7) == "203.0.113.77"
        victim.kill()
        until(lambda: not keepers())
    assert not os.path.exists(attachment.interface.target)


def test_a_macvtap_in_use_outlives_its_keeper(host: Namespace, tmp_path: Path) -> None:
    with machine(tmp_path, "", Nic(mode="macvtap", target="eth0")) as victim:
        target = attachments(victim)[0].interface.target
        fd = os.open(target, os.O_RDWR)
        os.kill(keepers()[0], signal.SIGKILL)
        until(lambda: not keepers())
        assert runtime.sweep() == []
        os.close(fd)
    assert len(runtime.sweep()) == 1
    assert not os.path.exists(target)


def test_tap_of_the_host(host: Namespace, tmp_path: Path) -> None:
    host.run("ip tuntap add dev mine mode tap")
    try:
        with attach([Nic(mode="tap", target="mine")], (), tmp_path, "", cpus=1) as networks:
            assert networks.attachments[0].interface.target == "mine"
            os.close(open_tap("mine"))
        assert "mine" in host.run("ip -o link")
    finally:
        host.run("ip link del mine")


def test_user_mode(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    """passt: the guest's connections are the host's own; and it ends with a killed hostel."""
    ports = (Publish(host=8080, guest=80), Publish(host=8080, guest=80, protocol="udp"))
    folder = runtime.base() / "user"
    folder.mkdir()
    with machine(folder, "", Nic(mode="user"), publish=ports) as victim:
        pid, _ = (folder / "passt0.pid").read_text().split()
        link = attachments(victim)[0].link
        assert link is not None
        with (
            Guest(host, attachments(victim)[0]) as guest,
            Echo(outside, 7),
            Echo(host, 9, "127.0.0.1"),
        ):
            assert ask(guest, OUTSIDE, 7) == HOST
            assert ask(guest, OUTSIDE, 7, "udp") == HOST
            with NameServer(host, outside, {"some.test": OUTSIDE}):
                assert look_up(guest, "some.test", server=link.dns[0]) == [OUTSIDE]
            with Echo(guest, 80):
                assert ask(outside, HOST, 8080)
                assert ask(outside, HOST, 8080, "udp")
            gate = guest.address.rpartition(".")[0] + ".1"
            assert reached(guest, [(gate, 9, "tcp"), (gate, 9, "udp")]) == []
        victim.kill()
        assert gone_within(int(pid), 5)
    assert "user" in runtime.sweep()


# -- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nic", "error", "words"),
    [
        (Nic(mode="bridge", target="nothere"), UserError, "there is no interface nothere"),
        (Nic(mode="bridge", target="eth0"), UserError, "eth0 is no bridge.*macvtap=eth0"),
        (Nic(mode="macvtap", target="nothere"), UserError, "there is no interface nothere"),
        (Nic(mode="macvtap", target="lo"), UserError, "lo carries no Ethernet frames"),
        (Nic(mode="tap", target="lo"), UserError, "lo is no tap.*ip tuntap add"),
        (Nic(mode="tap", target="nothere"), UserError, "no interface nothere.*ip tuntap add"),
        (Nic(mode="vhost-user", target="/nothere"), UserError, "/nothere is no socket"),
        (Nic(mode="user", address="10.0.0.1"), SpecError, "an address is for"),
    ],
)
def test_one_line_for_what_cannot_be(
    host: Namespace, tmp_path: Path, nic: Nic, error: type[HostelError], words: str
) -> None:
    with pytest.raises(error, match=words), attach([nic], (), tmp_path, "", cpus=1) as networks:
        assert not networks.attachments


def test_ports_need_a_network_of_ours(host: Namespace, tmp_path: Path) -> None:
    ports = [Publish(host=80, guest=80)]
    for nics in ([], [Nic(mode="bridge", target="br0")]):
        with pytest.raises(SpecError, match="publish"):
            attach(nics, ports, tmp_path, "", cpus=1)


def test_an_ordinary_user_is_sent_to_user_mode(host: Namespace, tmp_path: Path) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(HostError, match=r"needs root.*--net user"):
            attach([Nic()], (), tmp_path, "", cpus=1)
    finally:
        os.seteuid(0)


def test_a_mac_that_is_in_use(host: Namespace, tmp_path: Path) -> None:
    nic = Nic(mac="02:00:00:00:00:01")
    networks = attach([nic, nic], (), tmp_path, "", cpus=1)
    with networks, pytest.raises(UserError, match="in use on this network"):
        assert networks.attachments


def test_preview_makes_nothing(host: Namespace, tmp_path: Path) -> None:
    nics = [Nic(), Nic(mode="isolated"), Nic(mode="user"), Nic(mode="macvtap", target="eth0")]
    found = preview(nics, (), tmp_path, "one", cpus=1).attachments
    with attach(nics[:1], (), tmp_path, "one", cpus=1) as networks:
        assert networks.attachments[0] == msgspec.structs.replace(found[0])
    assert [one.interface.backend for one in found] == ["tap", "tap", "stream", "macvtap"]
    assert found[3].link is None


def until(condition: object, seconds: float = 5) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_another_users_networks_are_seen(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runtime directories on one host: neither bridges nor subnets nor the uplinks' state clash."""
    switch = Path("/proc/sys/net/ipv4/conf/eth0/forwarding")
    with contextlib.ExitStack() as stack:
        links = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / name))
            networks = stack.enter_context(attach([Nic()], (), tmp_path, "", cpus=1))
            links.append((networks, networks.attachments[0].interface.target))
        assert [link for _, link in links] == ["hostel0-1", "hostel1-1"]
        links[0][0].close()
        until(lambda: "hostel0" not in host.run("ip -o link"))
        assert switch.read_text() == "1\n"
    until(lambda: "hostel1" not in host.run("ip -o link"))


def test_a_runtime_directory_that_is_taken_away(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    with attach([Nic()], (), tmp_path, "", cpus=1) as networks:
        assert networks.attachments
        (pid,) = keepers()
        shutil.rmtree(folder)
    assert gone_within(pid, 5)
