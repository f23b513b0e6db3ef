"""Rules that somebody else takes away are put back: a firewall that is loaded anew flushes all there are.

``nft flush ruleset`` stands first in Debian's nftables.conf; without its rules a machine reaches all that the
host does. The kernel tells of every change (linux/netfilter/nfnetlink.h, NFNLGRP_NFTABLES) once it is done:
for some milliseconds the rules are missing.

A message: nlmsghdr, nfgenmsg (family, version, resource), attributes, of which the first is the table's name.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Protocol

from hostel.errors import HostError
from hostel.vmm.loop import EventLoop

from .flows import HEADER, NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, pack, unpack
from .state import State

SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES = 270, 1, 7
TABLES = 10 << 8
"""NFNL_SUBSYS_NFTABLES << 8"""
NEW_TABLE, GET_TABLE = TABLES, TABLES | 1
NEWS = {TABLES | kind for kind in (0, 2, 3, 5, 6, 8)}
"""NFT_MSG_NEW… and NFT_MSG_DEL… of tables, chains and rules; not of what a set holds."""
TABLE_NAME = 1
FAMILIES = {"inet": 1, "ip": 2, "bridge": 7}
HOSTS_OWN = (FAMILIES["ip"], "filter")
PAUSE = 0.3
"""Seconds: who changes the host's firewall does so in many steps."""


class Kept(Protocol):
    """What has rules."""

    state: State

    def restore(self) -> None:
        """All tables of its own, again."""

    def reopen(self) -> None:
        """The way through the host's firewall, if it is closed."""


class Watch:
    """As long as ``loop`` runs."""

    def __init__(self, loop: EventLoop, kept: Kept) -> None:
        self._loop, self._kept = loop, kept
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        self._due = False
        loop.add(self._socket.fileno(), self._news)

    def _news(self) -> None:
        if not (changed := self._changed()):
            return
        lost = self._lost()
        if (lost or HOSTS_OWN in changed) and not self._due:
            self._due = True
            self._loop.call_later(PAUSE, self._reopen)
        if lost:
            self._mend()

    def _changed(self) -> set[tuple[int, str]]:
        """The tables that there is news of."""
        changed = set[tuple[int, str]]()
        while True:
            try:
                changed.update(_tables(self._socket.recv(1 << 16)))
            except BlockingIOError:
                return changed
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                changed.add(HOSTS_OWN)  # some of it was lost

    def _lost(self) -> bool:
        return not all(map(is_there, self._kept.state.names("table")))

    def _mend(self) -> None:
        try:
            self._kept.restore()
        except HostError:
            self._loop.call_later(PAUSE, self._mend)
            raise

    def _reopen(self) -> None:
        self._due = False
        self._kept.reopen()


def is_there(table: str) -> bool:
    """``FAMILY:NAME``, as in a network's state."""
    family, _, name = table.partition(":")
    body = bytes((FAMILIES[family], 0, 0, 0)) + pack(TABLE_NAME, name.encode() + b"\0")
    size, flags = HEADER.size + len(body), NLM_F_REQUEST | NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.send(HEADER.pack(size, GET_TABLE, flags, 1, 0) + body)
        answer = HEADER.unpack_from(sock.recv(1 << 12))[1]
    return bool(answer == NEW_TABLE)  # else it is an error


def _tables(data: bytes) -> Iterator[tuple[int, str]]:
    while data:
        size, kind, *_ = HEADER.unpack_from(data)
        if kind in NEWS:
            name = dict(unpack(data[HEADER.size + 4 : size])).get(TABLE_NAME, b"")
            yield data[HEADER.size], name.rstrip(b"\0").decode()
        data = data[(size + 3) & ~3 :]
