"""A network namespace with a tap in it: what a NIC under test is plugged into, and the host at the other end.

::

    with Namespace() as net:                       # a thread of its own lives in it
        net.run("ip tuntap add tap0 mode tap")
        fd, = net.call(open_tap, "tap0")           # descriptors work everywhere
        sock = net.call(socket.socket, …)

It goes with its thread and the last descriptor that belongs to it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import pytest

from guests.namespaces import leave_network
from hostel.host.tap import open_tap

T = TypeVar("T")
ETH_P_ALL = 3
HOST_IP, GUEST_IP = "10.99.0.1", "10.99.0.2"
GUEST_MAC = bytes.fromhex("525400aabb01")
HOST_MAC = bytes.fromhex("525400aabb99")
TYPE = b"\x88\xb5"  # IEEE 802 local experimental


class Namespace:
    def __init__(self) -> None:
        if not os.path.exists("/dev/net/tun"):
            pytest.skip("no /dev/net/tun here")
        self._pool = ThreadPoolExecutor(1)
        try:
            self.call(leave_network)
        except OSError as error:
            self._pool.shutdown()
            pytest.skip(f"no network namespace: {error.strerror}")

    def call(self, work: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        return self._pool.submit(work, *arguments, **keywords).result()

    def run(self, command: str) -> str:
        """One program, in the namespace."""
        done = self.call(
            subprocess.run, command.split(), check=True, capture_output=True, text=True
        )
        return str(done.stdout)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()


def make_tap(net: Namespace, name: str = "tap0", *, several: bool = False) -> None:
    """Up, quiet, and with addresses that tests know."""
    net.run(f"ip tuntap add {name} mode tap{' multi_queue' if several else ''}")
    net.run(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
    net.run(f"ip link set {name} address {HOST_MAC.hex(':')}")
    net.run(f"ip addr add {HOST_IP}/24 dev {name}")
    net.run(f"ip link set {name} up")
    net.run(f"ip neigh replace {GUEST_IP} lladdr {GUEST_MAC.hex(':')} dev {name}")


def plug(net: Namespace, name: str = "tap0", queues: int = 1) -> list[int]:
    """The tap's descriptors, once the kernel has noticed its carrier: what it sends before is lost."""
    fds = net.call(open_tap, name, queues)
    deadline = time.monotonic() + 10
    while "state UP" not in net.run(f"ip -o link show {name}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return fds


@contextmanager
def raw_socket(net: Namespace, name: str = "tap0") -> Iterator[socket.socket]:
    """Frames of our experimental type, as the host sees them on its end."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
        sock.bind((name, 0x88B5))
        sock.settimeout(10)
        return sock

    with net.call(make) as sock:
        yield sock


def frame(
    payload: bytes = b"hello", *, to: bytes = GUEST_MAC, sender: bytes = HOST_MAC, tag: int = -1
) -> bytes:
    vlan = b"" if tag < 0 else b"\x81\x00" + tag.to_bytes(2, "big")
    return to + sender + vlan + TYPE + payload
