"""A driver of the 82540EM that means harm: it stops its card, at most."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator

import pytest

from devices.e1000_driver import DATA, LAST, RING, RX_RING, TX_BUFFERS, TX_RING, CardDriver
from hostel.abi import e1000 as abi
from hostel.virtio.net_port import LENGTH, StreamPort
from hostel.virtio.rng import Rng
from virtio.netns import GUEST_MAC, HOST_MAC, frame
from virtio.rig import MEMORY, Rig, eventually

OUT = frame(b"out" * 30, to=HOST_MAC, sender=GUEST_MAC)
FAR = 1 << 45


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


class Pair:
    """A card on a stream, and the stream's other end."""

    def __init__(self, rig: Rig) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(10)
        self.driver = CardDriver(rig, StreamPort(ours))
        self.driver.start()

    def close(self) -> None:
        self.driver.card.close()
        self.sock.close()

    def offer(self, data: bytes) -> None:
        self.sock.sendall(len(data).to_bytes(LENGTH, "big") + data)

    def works(self) -> bool:
        """Both ways, after a reset."""
        self.driver.start()
        self.sock.setblocking(False)
        try:
            while self.sock.recv(1 << 20):
                pass
        except BlockingIOError:
            self.sock.settimeout(10)
        self.driver.send(OUT)
        if self.sock.recv(4096)[LENGTH:] != OUT:
            return False
        self.offer(frame(b"in"))
        while True:  # frames from before may have waited
            data = self.driver.receive()[0]
            if data[14:16] == b"in":
                return True


@pytest.fixture
def pair(rig: Rig) -> Iterator[Pair]:
    pair = Pair(rig)
    yield pair
    pair.close()


def ring_far_away(card: CardDriver) -> None:
    card.set(abi.TDBAH, FAR >> 32)
    card.send(OUT)


def ring_at_the_edge(card: CardDriver) -> None:
    card.set(abi.TDBAL, MEMORY - 128)
    card.tail = 12
    card.kick()


def tail_out_of_range(card: CardDriver) -> None:
    card.set(abi.TDT, RING + 1)


def head_out_of_range(card: CardDriver) -> None:
    card.set(abi.TDH, 0xFFFF)
    card.set(abi.TDT, 1)


def buffer_far_away(card: CardDriver) -> None:
    card.descriptor(abi.TX_DESC.pack(FAR, 100 | LAST, 0, 0, 0))
    card.kick()


def buffer_over_the_edge(card: CardDriver) -> None:
    card.descriptor(abi.TX_DESC.pack(MEMORY - 10, 100 | LAST, 0, 0, 0))
    card.kick()


def buffer_that_wraps(card: CardDriver) -> None:
    card.descriptor(abi.TX_DESC.pack(2**64 - 10, 100 | LAST, 0, 0, 0))
    card.kick()


@pytest.mark.parametrize(
    "attack",
    [
        ring_far_away,
        ring_at_the_edge,
        tail_out_of_range,
        head_out_of_range,
        buffer_far_away,
        buffer_over_the_edge,
        buffer_that_wraps,
    ],
)
def test_transmission_stops_the_card(pair: Pair, attack: Callable[[CardDriver], None]) -> None:
    attack(pair.driver)
    assert len(pair.driver.faults) == 1
    assert str(pair.driver.card.statistics()["fault"])
    pair.driver.send(OUT)
    assert len(pair.driver.faults) == 1, "it has stopped"
    assert pair.works()


def receive_ring_far_away(card: CardDriver) -> None:
    card.set(abi.RDBAH, FAR >> 32)


def receive_tail_out_of_range(card: CardDriver) -> None:
    card.set(abi.RDT, RING + 3)


def receive_buffer_far_away(card: CardDriver) -> None:
    card.memory.write_u64(RX_RING, FAR)


def receive_buffer_over_the_edge(card: CardDriver) -> None:
    card.memory.write_u64(RX_RING, MEMORY - 20)


@pytest.mark.parametrize(
    "attack",
    [
        receive_ring_far_away,
        receive_tail_out_of_range,
        receive_buffer_far_away,
        receive_buffer_over_the_edge,
    ],
)
def test_reception_stops_the_card(pair: Pair, attack: Callable[[CardDriver], None]) -> None:
    attack(pair.driver)
    pair.offer(frame(bytes(100)))
    assert eventually(lambda: len(pair.driver.faults) == 1)
    assert pair.works()


def test_nothing_but_contexts(pair: Pair) -> None:
    card = pair.driver
    for _ in range(3 * RING):
        card.context((255, 255, 255, 255), hdrlen=255, mss=0xFFFF)
        card.kick()
    assert not card.faults
    assert pair.works()


def test_a_frame_without_end(pair: Pair) -> None:
    """It grows to its limit and is dropped, and takes no more memory than that."""
    card = pair.driver
    for _ in range(400):
        card.descriptor(abi.TX_DESC.pack(TX_BUFFERS, 1 << 18 | DATA, 0, 0, 0))
        card.kick()
    held = sum(len(piece) for piece in card.card.transmitter._pieces)
    assert held <= 1 << 18
    for _ in range(2000):
        card.descriptor(abi.TX_DESC.pack(TX_BUFFERS, 1 | DATA, 0, 0, 0))
        card.kick()
    assert len(card.card.transmitter._pieces) <= 512
    card.piece(b"x", DATA | LAST)
    card.kick()
    assert card.sent
    assert card.card.transmitter.dropped == 1
    assert pair.works()


@pytest.mark.parametrize("size", [0, 1, 13])
def test_frames_that_are_none(pair: Pair, size: int) -> None:
    pair.driver.piece(OUT[:size], LAST)
    pair.driver.kick()
    assert pair.driver.sent
    assert pair.driver.card.transmitter.dropped == 1
    assert pair.works()


@pytest.mark.parametrize(("hdrlen", "mss"), [(54, 0), (54, 1), (255, 1000), (0, 1000), (20, 10)])
def test_segments_that_cannot_be(pair: Pair, hdrlen: int, mss: int) -> None:
    card = pair.driver
    bits = abi.TX_CONTEXT_TCP | abi.TX_CONTEXT_IPV4
    card.context((14, 24, 34, 50), hdrlen=hdrlen, mss=mss, bits=bits)
    card.piece(bytes(200) if hdrlen == 255 else bytes(60000), DATA | abi.TX_CMD_TSE | LAST, 3)
    card.kick()
    assert card.sent
    assert card.card.transmitter.dropped == 1
    assert pair.works()


def test_a_ring_too_small_for_a_frame(pair: Pair) -> None:
    card = pair.driver
    card.start(abi.RCTL_LPE | 3 << abi.RCTL_BSIZE_SHIFT)
    card.set(abi.RDLEN, 128)
    card.set(abi.RDT, 7)
    pair.offer(frame(bytes(9000)))
    pair.offer(frame(b"small"))
    assert card.receive()[0][14:19] == b"small"
    assert card.get(abi.MPC) == 1


def test_rings_of_no_descriptors(pair: Pair) -> None:
    card = pair.driver
    for first in (abi.RDBAL, abi.TDBAL):
        card.set(first + 8, 0)
        card.set(first + 0x18, 3)
    pair.offer(frame(b"nowhere to go"))
    assert not eventually(lambda: bool(card.faults), 0.1)
    assert pair.works()


@pytest.mark.parametrize("length", [1, 15, 17, 127, 129, 0xF_FFFF, 0xFFFF_FFFF])
def test_rings_of_odd_lengths(pair: Pair, length: int) -> None:
    """Longer than memory, or no multiple of anything: the card uses what there is of it, or stops."""
    card = pair.driver
    for first in (abi.RDBAL, abi.TDBAL):
        card.set(first + 8, length)
    for tail in (1, RING, 0xFFFF, 0xFFFF_FFFF):
        card.set(abi.RDT, tail)
        card.set(abi.TDT, tail)
        pair.offer(frame(b"for somewhere"))
    assert card.get(abi.STATUS)
    assert pair.works()


def test_a_ring_of_everything_starves_nobody(pair: Pair, rig: Rig) -> None:
    """All of memory as one ring that never ends: others have their turns, and a reset is the end of it."""
    card = pair.driver
    bystander = rig.on_pci(Rng(rig.loop))
    bystander.start(base=0x80_0000)
    card.memory.write(TX_RING, abi.TX_CONTEXT.pack(*[0] * 6, abi.TX_CMD_DEXT, 0, 0, 0) * 4096)
    card.set(abi.TDLEN, 16 * 4096)
    for _ in range(8):
        card.set(abi.TDT, (card.get(abi.TDH) - 1) % 4096)
        assert bystander.request(0, [], [32]).written == 32
    assert pair.works()


@pytest.mark.parametrize("done", range(4))
def test_a_reset_in_the_middle_of_a_frame(pair: Pair, done: int) -> None:
    """After the context, the first piece, the second, or all but the last: nothing of it is sent later."""
    card = pair.driver
    bits = abi.TX_CONTEXT_TCP | abi.TX_CONTEXT_IPV4
    card.context((14, 24, 34, 50), hdrlen=54, mss=100, bits=bits)
    for _ in range(done):
        card.piece(bytes(700), DATA | abi.TX_CMD_TSE, 3)
    card.kick()
    card.set(abi.CTRL, abi.CTRL_RST)
    assert not card.card.transmitter._pieces
    assert pair.works()


def test_anything_anywhere(pair: Pair) -> None:
    """Registers and descriptors at random, always the same: the card may stop, and comes back."""
    card, chance = pair.driver, random.Random(82540)
    known = sorted(
        {v for n, v in vars(abi).items() if n.isupper() and type(v) is int and v < 0x6000}
    )
    for turn in range(1500):
        register = chance.choice(known) & ~3
        value = chance.choice((0, 1, 7, 0xFFFF, 0xFFFF_FFFF, TX_BUFFERS, chance.getrandbits(32)))
        if register == abi.CTRL and turn % 8:
            continue  # else it is reset before it does anything
        card.set(register, value)
        card.get(chance.choice(known) & ~3)
        if turn % 5 == 0:
            card.descriptor(chance.randbytes(16))
            card.kick()
        if turn % 50 == 0:
            card.start()
            pair.offer(frame(chance.randbytes(chance.randrange(1400))))
    assert pair.works()
