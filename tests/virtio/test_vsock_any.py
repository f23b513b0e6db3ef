"""Any packets at all into the socket device, while programs of the host do anything too."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.virtio import vsock
from virtio.rig import EVENT_INDEX, Rig
from virtio.vsock_guest import CID, GUEST_PORT, HOST, PORT, WINDOW, Guest, Packet, Program, client

REQUEST, RESPONSE, RST = abi.VSOCK_OP_REQUEST, abi.VSOCK_OP_RESPONSE, abi.VSOCK_OP_RST
RW, SHUTDOWN = abi.VSOCK_OP_RW, abi.VSOCK_OP_SHUTDOWN
UPDATE, ASK = abi.VSOCK_OP_CREDIT_UPDATE, abi.VSOCK_OP_CREDIT_REQUEST
POOL = (0, 1, 2, 3, 7, PORT, GUEST_PORT, GUEST_PORT + 1, 1 << 30, 0xFFFF_FFFF)


def nonsense(dice: random.Random) -> Packet:
    data = dice.randbytes(dice.choice((0, 0, 1, 100, 5000, 65536)))
    odd = dice.random() < 0.02
    return Packet(
        dice.choice(
            (REQUEST, RESPONSE, RST, SHUTDOWN, RW, RW, RW, UPDATE, ASK, dice.randrange(12))
        ),
        dice.choice((GUEST_PORT, GUEST_PORT + 1, GUEST_PORT + 2, 22)),
        dice.choice((PORT, PORT, PORT, 1 << 30, 6)),
        data,
        dice.choice((0, 1, 2, 3, dice.getrandbits(32))),
        dice.choice((WINDOW, 1000, 0, dice.getrandbits(32))),
        dice.choice((0, 1, 1000, dice.getrandbits(32))),
        src_cid=dice.choice(POOL) if odd else CID,
        dst_cid=dice.choice(POOL) if odd else HOST,
        type=dice.choice(POOL) & 0xFFFF if odd else 1,
        len=len(data) + (dice.random() < 0.005),
    )


class Careless(Guest):
    """Does not look at what comes."""

    def hear(self, packet: Packet) -> None:
        assert packet.len == len(packet.data)


@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_any_packets(rig: Rig, tmp_path: Path, features: int) -> None:
    dice = random.Random(7 + features)
    guest = Careless(rig, tmp_path, features=features)
    program = Program(guest)
    program.listener.setblocking(False)
    socks: list[socket.socket] = []
    stopped = 0
    for number in range(3000):
        if guest.driver.needs_reset:
            stopped += 1
            guest.start()
        guest.send(nonsense(dice))
        guest.pump()
        with contextlib.suppress(BlockingIOError):
            socks.append(program.listener.accept()[0])
        if number % 50 == 0:
            socks.append(client(guest, dice.choice((22, 23))))
        for sock in dice.sample(socks, min(2, len(socks))):
            act(dice, sock)
        while len(socks) > 20:
            socks.pop(dice.randrange(20)).close()
        assert len(guest.device._outbox) <= 2 * vsock.OUTBOX
    for sock in socks:
        sock.close()
    assert stopped > 0, "some packets were longer than their chains"
    honest = Guest.__new__(Guest)
    honest.__dict__.update(guest.__dict__)
    honest.start()
    assert honest.connect().seen == [RESPONSE]
    program.close()


def act(dice: random.Random, sock: socket.socket) -> None:
    """A program of the host does something."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        what = dice.randrange(20)
        if what < 8:
            sock.recv(1 << 20)
        elif what < 17:
            sock.send(bytes(dice.choice((1, 5000, 200_000))))
        else:
            sock.shutdown(dice.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
