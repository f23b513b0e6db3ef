"""The steps of SETUP through the real agent, in mount, UTS and network namespaces of its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hostel.errors import AgentError
from hostel.guest.client import AgentClient
from hostel.guest.steps import (
    Bind,
    DeviceNode,
    EnterRoot,
    Hostname,
    Link,
    MakeDirectory,
    Mount,
    Overlay,
    Remove,
    Symlink,
    Touch,
    WaitFor,
    WriteFile,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, which only root may")


@pytest.fixture
def inside(start_agent: Callable[..., AbstractContextManager[Any]]) -> Iterator[AgentClient]:
    with start_agent(["unshare", "--mount", "--uts", "--net", "--propagation", "private"]) as agent:
        client = AgentClient(agent.socket)
        client.wait_hello(10)
        yield client
        client.close()


PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def shell(client: AgentClient, script: str) -> str:
    process = client.spawn(["sh", "-c", script], env=PATH)
    out, err, status = process.communicate(timeout=20)
    return (out + err).decode() + (f"exit {status.returncode}" if status.returncode else "")


def test_mounts_and_files(inside: AgentClient, tmp_path: Path) -> None:
    base = f"{tmp_path}/m"
    inside.setup(
        [
            MakeDirectory(f"{base}/deep/er"),
            Mount("tmpfs", "tmpfs", base, data="size=1m,mode=0700"),
            WriteFile(f"{base}/motd", b"wel\0come", 0o600),
            Touch(f"{base}/empty"),
            Touch(f"{base}/motd"),
            Symlink("motd", f"{base}/link"),
            Symlink("other", f"{base}/link"),
            DeviceNode(f"{base}/null", 1, 3, mode=0o666),
            MakeDirectory(f"{base}/private", 0o700),
            Hostname("inner"),
            WaitFor(f"{base}/null", 1),
        ]
    )
    assert inside.get(f"{base}/motd") == b"wel\0come"
    assert inside.get(f"{base}/empty") == b""
    assert shell(
        inside, f"cd {base}; readlink link; stat -c %a,%t,%T null private .; uname -n"
    ) == ("motd\n666,1,3\n700,0,0\n700,0,0\ninner\n")
    assert os.uname().nodename != "inner"
    assert not (tmp_path / "m" / "motd").exists()


def test_root_needs_no_list_of_users(inside: AgentClient) -> None:
    assert shell(inside, "mount -t tmpfs none /etc") == ""
    process = inside.spawn(["/bin/sh", "-c", "echo $(id -u) $(id -g)"], env=PATH, user="root")
    assert process.communicate(timeout=20)[0] == b"0 0\n"
    process = inside.spawn(["/bin/true"], user="nobody")
    with pytest.raises(AgentError, match="the guest has no user 'nobody'"):
        process.communicate(timeout=20)


MAC, OTHER_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:0b"


@pytest.fixture
def wired(inside: AgentClient) -> AgentClient:
    """With two interfaces that are down, the ends of one wire."""
    shell(inside, "ip link add w0 type veth peer name w1; ip link set w0 address " + MAC)
    shell(inside, "ip link set w1 address " + OTHER_MAC)
    return inside


def addresses(client: AgentClient, interface: str) -> list[dict[str, Any]]:
    """Without the link-local ones, which the kernel makes."""
    found = json.loads(shell(client, f"ip -j addr show dev {interface}"))[0]
    return [address for address in found["addr_info"] if address["scope"] != "link"]


def test_an_interface(wired: AgentClient) -> None:
    link = Link(MAC.upper(), 1400, ["10.9.8.7/24", "fd00::7/64"], ["10.9.8.1", "fd00::1"])
    wired.setup([link, link])
    found = json.loads(shell(wired, "ip -j addr show dev w0"))[0]
    assert (found["mtu"], "UP" in found["flags"]) == (1400, True)
    local = [(address["local"], address["prefixlen"]) for address in addresses(wired, "w0")]
    assert local == [("10.9.8.7", 24), ("fd00::7", 64)]
    assert not any(address.get("tentative") for address in addresses(wired, "w0"))
    assert shell(wired, "ip route show default").startswith("default via 10.9.8.1 dev w0 ")
    assert shell(wired, "ip -6 route show default").startswith("default via fd00::1 dev w0 ")
    assert addresses(wired, "w1") == []


def test_a_gateway_outside_of_the_prefix(wired: AgentClient) -> None:
    wired.setup([Link(MAC, 0, ["10.9.8.7/32"], ["172.20.0.1"]), Link(OTHER_MAC)])
    routes = shell(wired, "ip route").splitlines()
    assert [" ".join(route.split()[:5]) for route in routes] == [
        "default via 172.20.0.1 dev w0",
        "172.20.0.1 dev w0 scope link",
    ]
    assert "UP" in json.loads(shell(wired, "ip -j link show dev w1"))[0]["flags"]


def test_files_in_place_of_links(inside: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").symlink_to("/run/nowhere/stub")
    (tmp_path / "dangling").symlink_to("/run/nowhere/stub")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost")
    inside.setup(
        [
            Remove(f"{tmp_path}/resolv.conf"),
            Remove(f"{tmp_path}/none"),
            WriteFile(f"{tmp_path}/resolv.conf", b"nameserver 10.9.8.1\n"),
            WriteFile(f"{tmp_path}/dangling", b"new"),
            *[WriteFile(f"{tmp_path}/hosts", b"\n10.9.8.7 me\n", append=True)] * 2,
            WriteFile(f"{tmp_path}/fresh", b"x", append=True),
        ]
    )
    assert not (tmp_path / "resolv.conf").is_symlink()
    assert (tmp_path / "resolv.conf").read_text() == "nameserver 10.9.8.1\n"
    assert (tmp_path / "dangling").read_text() == "new"
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost" + "\n10.9.8.7 me\n" * 2
    assert (tmp_path / "fresh").read_text() == "x"


def test_binds(inside: AgentClient, tmp_path: Path) -> None:
    for name in ("from", "to", "to_ro"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "f").write_text("1")
    inside.setup(
        [
            Bind(f"{tmp_path}/from", f"{tmp_path}/to"),
            Bind(f"{tmp_path}/from", f"{tmp_path}/to_ro", read_only=True),
            Touch(f"{tmp_path}/one"),
            Bind(f"{tmp_path}/from/f", f"{tmp_path}/one"),
        ]
    )
    script = f"cd {tmp_path}; cat one; echo 2 > to/f; cat one; echo 3 > to_ro/f"
    out = shell(inside, script)
    assert out.startswith("12\n")
    assert "Read-only file system" in out
    assert (tmp_path / "from" / "f").read_text() == "2\n"


def test_overlay_and_new_root(inside: AgentClient, tmp_path: Path) -> None:
    """What hostel does in every machine: the host's root below, nothing written reaches it."""
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "here").write_text("lower")
    base = f"{tmp_path}/b"
    inside.setup(
        [
            MakeDirectory(base),
            Mount("tmpfs", "tmpfs", base),
            *(MakeDirectory(f"{base}/{name}") for name in ("upper", "work", "root")),
            Overlay("/", f"{base}/upper", f"{base}/work", f"{base}/root"),
            EnterRoot(f"{base}/root", keep=("/proc", "/dev")),
        ]
    )
    script = f"cat {lower}/here; echo upper > {lower}/here; echo x > /new; ls -d /dev/null /proc/1; id -u"
    assert shell(inside, script) == "lower/dev/null\n/proc/1\n0\n"
    assert inside.get(str(lower / "here")) == b"upper\n"
    assert (lower / "here").read_text() == "lower"
    assert not Path("/new").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Mount("ext4", "/dev/nothing", "/mnt"), "mount ext4 /dev/nothing on /mnt: No such file"),
        (Mount("no-such-type", "none", "/mnt"), "mount no-such-type none on /mnt: No such device"),
        (Bind("/nowhere", "/mnt"), "bind /nowhere on /mnt: No such file or directory"),
        (MakeDirectory("/proc/x/y"), "make directory /proc/x/y: "),
        (Touch("/nowhere/x"), "make file /nowhere/x: No such file or directory"),
        (WriteFile("/nowhere/x", b""), "write /nowhere/x: No such file or directory"),
        (WriteFile("/dev/full", b"x"), "write /dev/full: No space left on device"),
        (Symlink("x", "/nowhere/y"), "link /nowhere/y: No such file or directory"),
        (DeviceNode("/nowhere/x", 1, 3), "make device /nowhere/x: No such file or directory"),
        (Hostname("x" * 200), "set host name x+: Invalid argument"),
        (Remove("/proc"), "remove /proc: Is a directory"),
        (Link("02:00"), "configure interface 02:00: Invalid argument"),
        (Link(f"{MAC}:00"), f"configure interface {MAC}:00: Invalid argument"),
        (WaitFor("/nowhere", 0.02), "wait for /nowhere: Connection timed out"),
        (EnterRoot("/nowhere"), "enter root /nowhere: "),
        (EnterRoot("/usr", keep=()), "enter root /usr: Invalid argument"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_failure_names_its_step(inside: AgentClient, step: Any, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        inside.setup([MakeDirectory("/"), step, Hostname("never")])
    assert shell(inside, "uname -n") == f"{os.uname().nodename}\n"


@pytest.mark.parametrize(
    "link",
    [
        Link("02:00:00:00:00:ff"),
        Link(MAC, mtu=10),
        Link(MAC, addresses=["10.9.8"]),
        Link(MAC, addresses=["10.9.8.7/33"]),
        Link(MAC, addresses=["10.9.8.7/"]),
        Link(MAC, addresses=["10.9.8.7/2x"]),
        Link(MAC, gateways=["fd00::1/1000"]),
    ],
)
@pytest.mark.timeout(30)
def test_an_interface_that_cannot_be_configured(wired: AgentClient, link: Link) -> None:
    with pytest.raises(AgentError, match=f"configure interface {link.mac}: "):
        wired.setup([link])


def test_steps_that_are_done_stay_done(inside: AgentClient, tmp_path: Path) -> None:
    inside.setup([MakeDirectory(f"{tmp_path}/x/y/z", 0o700)] * 2)
    assert stat.S_IMODE((tmp_path / "x/y/z").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "x/y").stat().st_mode) == 0o755


def test_shutdown_of_an_ordinary_process(
    start_agent: Callable[..., AbstractContextManager[Any]],
) -> None:
    with start_agent() as agent:
        client = AgentClient(agent.socket)
        client.shutdown()
        assert agent.process.wait(10) == 0
        client.close()
