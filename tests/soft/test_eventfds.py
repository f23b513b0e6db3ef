"""Eventfds as interrupts and as notifications."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from hostel.errors import HostError
from hostel.soft.eventfds import Ioeventfds, Irqfds


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


class Heard:
    def __init__(self) -> None:
        self.gsis: list[int] = []
        self.one = threading.Event()

    def __call__(self, gsi: int) -> None:
        self.gsis.append(gsi)
        self.one.set()


def test_a_write_raises_its_gsi_until_it_is_deassigned(fd: int) -> None:
    heard = Heard()
    irqfds = Irqfds(heard)
    irqfds.assign(24, fd)
    os.eventfd_write(fd, 3)
    assert heard.one.wait(10)
    irqfds.deassign(24, fd)
    os.eventfd_write(fd, 1)
    irqfds.close()
    assert heard.gsis == [24]
    assert os.eventfd_read(fd) == 1, "what came after it stays"


def test_signalled_before_it_was_assigned(fd: int) -> None:
    os.eventfd_write(fd, 1)
    heard = Heard()
    irqfds = Irqfds(heard)
    irqfds.assign(5, fd)
    assert heard.one.wait(10)
    irqfds.close()


def test_irqfds_refuse_what_is_not_theirs(fd: int) -> None:
    irqfds = Irqfds(Heard())
    irqfds.assign(5, fd)
    with pytest.raises(HostError, match="already"):
        irqfds.assign(6, fd)
    with pytest.raises(HostError, match="does not stand for GSI 6"):
        irqfds.deassign(6, fd)
    irqfds.close()


def test_closing_one_that_was_never_used() -> None:
    Irqfds(Heard()).close()


def test_ioeventfds_match_address_length_and_value(fd: int) -> None:
    eventfds = Ioeventfds()
    eventfds.assign(0x1000, 4, fd, 7, pio=False)
    seven = (7).to_bytes(4, "little")
    assert not eventfds.write(0x1000, seven, pio=True)
    assert not eventfds.write(0x1000, seven[:2], pio=False)
    assert not eventfds.write(0x1000, bytes(4), pio=False)
    assert not eventfds.write(0x1004, seven, pio=False)
    assert eventfds.write(0x1000, seven, pio=False)
    assert os.eventfd_read(fd) == 1
    with pytest.raises(HostError, match="already"):
        eventfds.assign(0x1000, 4, fd, 7, pio=False)
    eventfds.deassign(0x1000, 4, fd, 7, pio=False)
    assert not eventfds.write(0x1000, seven, pio=False)
    with pytest.raises(HostError, match="no such"):
        eventfds.deassign(0x1000, 4, fd, 7, pio=False)


def test_length_0_matches_any(fd: int) -> None:
    eventfds = Ioeventfds()
    eventfds.assign(0xC000, 0, fd, None, pio=True)
    assert eventfds.write(0xC000, b"\1", pio=True)
    assert eventfds.write(0xC000, b"\1\2\3\4", pio=True)
    assert os.eventfd_read(fd) == 2
