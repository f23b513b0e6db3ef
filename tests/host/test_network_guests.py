"""Two real Linux machines on a network of hostel's own: names, the world, a published port."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guests.namespaces import HOST, OUTSIDE, Echo, Namespace, ask, missing, world
from hostel.host import runtime

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

SERVER = """
import socket
s = socket.create_server(("", 80))
print("listens", flush=True)
while True:
    c, peer = s.accept()
    with c:
        c.recv(1)
        c.send(peer[0].encode())
"""

DRIVER = f"""
import json, sys
from hostel import Machine
from hostel.spec import Nic, Publish
one = Machine(engine="qemu", name="one", nics=(Nic(),))
two = Machine(engine="qemu", name="two", nics=(Nic(allow=("one",)),), publish=(Publish(host=8080, guest=80),))
three = Machine(engine="qemu", nics=(Nic(mode="user"),), publish=(Publish(host=8081, guest=80),))
with one, two, three:
    for machine in (two, three):
        server = machine.popen(["python3", "-IS", "-c", {SERVER!r}], user="root", stdin=None)
        assert server.read() == ("stdout", b"listens\\n")
    print("ready", flush=True)
    for line in sys.stdin:
        who, *argv = json.loads(line)
        result = dict(one=one, two=two, three=three)[who].exec(argv, timeout=30)
        print(json.dumps([result.exit_code, result.stdout.decode()]), flush=True)
"""


class Driver:
    """The process whose machines they are."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *command: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def ask(self, who: str, name: str, port: int) -> str:
        """Whom a server takes that machine for; "" if it cannot be reached."""
        talk = f"exec 3<>/dev/tcp/{name}/{port} && echo -n x >&3 && cat <&3"
        return str(self.run(who, "timeout", "2", "bash", "-c", talk)[1])


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Namespace, Namespace, Driver]]:
    with world() as (host, outside), Echo(outside, 7), Echo(host, 7):
        driver = Driver()
        try:
            yield host, outside, driver
        finally:
            driver.process.kill()
            driver.process.wait()
            for stream in (driver.process.stdin, driver.process.stdout):
                assert stream
                stream.close()
        deadline = time.monotonic() + 5
        while "hostel0" in host.run("ip -o link") or any(runtime.base().glob(".net-*")):
            assert time.monotonic() < deadline, "a network outlives its killed machines"
            time.sleep(0.05)
        assert host.run("nft list ruleset") == ""
        runtime.sweep()


def test_machines_on_a_network(places: tuple[Namespace, Namespace, Driver]) -> None:
    host, outside, driver = places
    assert driver.run("one", "cat", "/etc/resolv.conf")[1].split() == [
        *("nameserver", "10.213.0.1", "search", "hostel")
    ]
    own = driver.run("one", "hostname", "-I")[1].strip()
    assert driver.ask("one", "two", 80) == own == driver.ask("one", "two.hostel", 80)
    assert driver.ask("one", OUTSIDE, 7) == HOST
    assert ask(outside, HOST, 8080) == OUTSIDE
    assert ask(host, "127.0.0.1", 8080) == "10.213.0.1"


def test_the_limited_one(places: tuple[Namespace, Namespace, Driver]) -> None:
    _, _, driver = places
    assert driver.ask("two", OUTSIDE, 7) == ""
    assert driver.ask("two", "10.213.0.1", 7) == ""
    assert driver.ask("one", "10.213.0.1", 7) != ""
    assert (
        driver.run("two", "getent", "hosts", "one")[1].split()[0]
        == driver.run("one", "hostname", "-I")[1].strip()
    )
    assert driver.run("two", "getent", "hosts", "two.example")[0] != 0


def test_user_mode(places: tuple[Namespace, Namespace, Driver]) -> None:
    host, outside, driver = places
    assert driver.ask("three", OUTSIDE, 7) == HOST
    assert ask(outside, HOST, 8081) != ""
    assert ask(host, "127.0.0.1", 8081) != ""
