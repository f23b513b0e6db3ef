"""``hostel vsock``: standard input and output on a vsock port of a machine that runs.

::

    standard input  ──► its end is passed on ──► the guest's program reads end-of-file
    standard output ◄── until its end         ◄── the guest's program

It ends when both directions have, or when the guest's program has closed its end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import click

from hostel.errors import UserError

from . import terminal
from .clicked import Command, output
from .entry import OK

CHUNK = 1 << 16
ENDED_SECONDS = 0.5
"""How soon it is noticed that the guest's program no longer reads, while input is awaited: the kernel's
vsock does not report it."""


@click.command("vsock", cls=Command)
@click.argument("name")
@click.argument("port", type=int)
@output
def command(name: str, port: int) -> int:
    """Connect standard input and output to PORT of the machine NAME, which runs with --vsock.

    A program of the guest has to listen there (AF_VSOCK). The end of input is passed on; what the guest
    still sends is waited for.
    """
    from hostel.host import runtime, vsock

    directory = runtime.base() / name
    if not (directory / "lock").exists() or "/" in name:
        raise UserError(f"no machine named {name} runs", cure="start it with --name and --vsock")
    with vsock.connect(directory, port) as sock:
        _relay(sock)
    return OK


def _relay(sock: socket.socket) -> None:
    """Each direction for itself: a guest that answers while it reads may not be kept from either."""
    sender = threading.Thread(target=_send, args=(sock,), daemon=True)
    sender.start()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(CHUNK):
            terminal.write_all(terminal.STDOUT, data)
    while sender.is_alive() and _takes(sock):
        sender.join(ENDED_SECONDS)


def _send(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # nobody reads in the guest any more
        while data := os.read(terminal.STDIN, CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _takes(sock: socket.socket) -> bool:
    """Whether the guest would still read: a write of nothing fails if not."""
    try:
        sock.send(b"")
    except OSError:
        return False
    return True
