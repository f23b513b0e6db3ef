from __future__ import annotations

import threading
from typing import Any

import pytest

from hostel.hypervisor import MmioExit, PioExit
from hostel.vmm.bus import MAX_UNCLAIMED, Bus


class Recorder:
    """Answers each byte read with its offset, and keeps what is written."""

    def __init__(self) -> None:
        self.log: list[tuple[int, bytes | int]] = []

    def read(self, offset: int, size: int) -> bytes:
        self.log.append((offset, size))
        return bytes(range(offset, offset + size))

    def write(self, offset: int, data: bytes) -> None:
        self.log.append((offset, data))

    def reset(self) -> None:
        self.log.clear()

    def save(self) -> dict[str, Any]:
        return {"log": list(self.log)}

    def load(self, state: dict[str, Any]) -> None:
        self.log = list(state["log"])


def pio(port: int, size: int, data: bytearray, *, write: bool) -> PioExit:
    return PioExit(port, size, len(data) // size, write, memoryview(data))


def test_device_sees_offsets() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x100, 8, device, "d")
    assert bus.read(0x102, 2) == b"\x02\x03"
    bus.write(0x104, b"ab")
    assert device.log == [(2, 2), (4, b"ab")]
    assert bus.statistics() == {"d": {"reads": 1, "writes": 1}}


@pytest.mark.parametrize(("base", "size"), [(0x100, 1), (0x107, 1), (0xF8, 9), (0x0, 0x1000)])
def test_overlap_is_refused(base: int, size: int) -> None:
    bus = Bus()
    bus.add(0x100, 8, Recorder(), "first")
    with pytest.raises(ValueError, match="overlaps first"):
        bus.add(base, size, Recorder(), "second")


def test_neighbours_touch_without_overlap() -> None:
    bus, low, high = Bus(), Recorder(), Recorder()
    bus.add(0x108, 8, high, "high")
    bus.add(0x100, 8, low, "low")
    bus.read(0x107, 1)
    bus.read(0x108, 1)
    assert low.log == [(7, 1)]
    assert high.log == [(0, 1)]


def test_nobody_reads_as_ones_and_is_counted() -> None:
    bus = Bus()
    assert bus.read(0x80, 4) == b"\xff" * 4
    bus.write(0x80, b"\0")
    assert bus.unclaimed == {0x80: 2}


def test_unclaimed_addresses_cost_bounded_memory() -> None:
    bus = Bus()
    for address in range(MAX_UNCLAIMED + 10):
        bus.read(address, 1)
    assert bus.unclaimed[-1] == 10
    assert len(bus.unclaimed) == MAX_UNCLAIMED + 1


def test_wide_access_to_narrow_device_is_split() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x3F8, 8, device, "uart", width=1)
    assert bus.read(0x3F8, 4) == b"\0\1\2\3"
    bus.write(0x3FA, b"xy")
    assert device.log == [(0, 1), (1, 1), (2, 1), (3, 1), (2, b"x"), (3, b"y")]


def test_access_across_the_end_is_split() -> None:
    bus, device, after = Bus(), Recorder(), Recorder()
    bus.add(0x10, 4, device, "d")
    bus.add(0x16, 4, after, "after")
    assert bus.read(0x12, 6) == b"\x02\x03\xff\xff\x00\x01"
    assert bus.read(0x0E, 4) == b"\xff\xff\x00\x01"
    bus.write(0x12, b"abcd")
    assert device.log[-2:] == [(2, b"a"), (3, b"b")]


def test_string_io_repeats_on_one_port() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x60, 4, device, "d")
    bus.handle_pio(pio(0x60, 2, bytearray(b"aabbcc"), write=True))
    assert device.log == [(0, b"aa"), (0, b"bb"), (0, b"cc")]
    data = bytearray(8)
    bus.handle_pio(pio(0x61, 2, data, write=False))
    assert data == b"\x01\x02" * 4


def test_mmio() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0xE000_0000, 0x1000, device, "d")
    data = bytearray(8)
    bus.handle_mmio(MmioExit(0xE000_0010, False, memoryview(data)))
    assert data == bytes(range(0x10, 0x18))
    bus.handle_mmio(MmioExit(0xE000_0FF8, True, memoryview(data)))
    assert device.log[-1] == (0xFF8, bytes(data))


def test_remove_leaves_nobody() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x10, 4, device, "d")
    bus.remove(0x10)
    assert bus.read(0x10, 1) == b"\xff"
    assert not list(bus.devices())


def test_device_at_two_places_has_one_lock() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x10, 4, device, "a")
    lock = bus.lock(device)
    bus.add(0x20, 4, device, "b")
    bus.remove(0x10)
    assert bus.lock(device) is lock
    assert list(bus.devices()) == [device]


def test_exits_wait_while_a_bus_is_held() -> None:
    bus = Bus()
    bus.hold()
    answer = bytearray(4)
    early = threading.Thread(
        target=bus.handle_mmio, args=(MmioExit(0x1000, False, memoryview(answer)),)
    )
    early.start()
    early.join(0.1)
    assert early.is_alive()
    bus.add(0x1000, 4, Recorder(), "late")
    bus.release()
    early.join(5)
    assert not early.is_alive()
    assert not bus.unclaimed
    assert answer == bytes(range(4))
