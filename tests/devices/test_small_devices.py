"""i8042, RTC, power and the debug ports, from the guest's side."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hostel.abi import acpi
from hostel.devices.debug import DebugConsole, DebugExit
from hostel.devices.i8042 import I8042
from hostel.devices.power import Power, ResetControl
from hostel.devices.rtc import Rtc

# --- i8042 -----------------------------------------------------------------------------------


@pytest.fixture
def resets() -> list[int]:
    return []


@pytest.fixture
def keyboard(resets: list[int]) -> I8042:
    return I8042(lambda: resets.append(1))


def command(device: I8042, value: int, parameter: int | None = None) -> int:
    """Send a command as a driver does; its answer."""
    device.write(4, bytes((value,)))
    assert not device.read(4, 1)[0] & 2  # never busy
    if parameter is not None:
        device.write(0, bytes((parameter,)))
    assert device.read(4, 1)[0] & 1
    return device.read(0, 1)[0]


def test_i8042_passes_its_tests(keyboard: I8042) -> None:
    assert command(keyboard, 0xAA) == 0x55
    assert command(keyboard, 0xAB) == 0x00
    assert command(keyboard, 0xD3, 0x5A) != 0x5A  # no mouse
    assert command(keyboard, 0xA9) != 0x00
    assert not keyboard.read(4, 1)[0] & 1


def test_i8042_keeps_its_configuration(keyboard: I8042) -> None:
    keyboard.write(4, b"\x60")
    keyboard.write(0, b"\x47")
    assert command(keyboard, 0x20) == 0x47
    keyboard.write(4, b"\xad")
    assert command(keyboard, 0x20) == 0x57


def test_i8042_says_that_no_keyboard_answers(keyboard: I8042) -> None:
    keyboard.write(0, b"\xf2")
    assert keyboard.read(4, 1)[0] & 0x41 == 0x41
    assert keyboard.read(0, 1) == b"\xfe"
    assert not keyboard.read(4, 1)[0] & 0x41


def test_i8042_leaves_its_neighbours_alone(keyboard: I8042) -> None:
    keyboard.write(1, b"\xfe")
    assert [keyboard.read(n, 1) for n in (1, 2, 3)] == [b"\xff"] * 3


def test_i8042_resets(keyboard: I8042, resets: list[int]) -> None:
    keyboard.write(4, b"\xff")
    assert resets == []
    keyboard.write(4, b"\xfe")
    keyboard.write(4, b"\xd1")
    keyboard.write(0, b"\xfe")
    assert resets == [1, 1]


# --- RTC -------------------------------------------------------------------------------------


class Cmos:
    def __init__(self, *when: int) -> None:
        self.now = datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]
        self.rtc = Rtc(lambda: self.now)

    def get(self, index: int) -> int:
        self.rtc.write(0, bytes((index,)))
        return self.rtc.read(1, 1)[0]

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, bytes((index,)))
        self.rtc.write(1, bytes((value,)))

    def time(self) -> list[int]:
        return [self.get(index) for index in (0x32, 9, 8, 7, 4, 2, 0)]


def test_rtc_tells_the_time_in_bcd() -> None:
    cmos = Cmos(2025, 12, 31, 23, 58, 59)
    assert cmos.time() == [0x20, 0x25, 0x12, 0x31, 0x23, 0x58, 0x59]
    assert cmos.get(6) == 4  # a Wednesday
    assert not cmos.get(0x0A) & 0x80
    assert cmos.get(0x0D) == 0x80


@pytest.mark.parametrize(
    ("hour", "bcd"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_rtc_in_twelve_hours(hour: int, bcd: int) -> None:
    cmos = Cmos(2025, 1, 1, hour, 0, 0)
    cmos.put(0x0B, 0x00)
    assert cmos.get(4) == bcd
    cmos.put(4, bcd)
    cmos.put(0x0B, 0x02)
    assert cmos.get(4) == hour // 10 << 4 | hour % 10


def test_rtc_in_binary() -> None:
    cmos = Cmos(2025, 12, 31, 23, 58, 59)
    cmos.put(0x0B, 0x06)
    assert cmos.time() == [20, 25, 12, 31, 23, 58, 59]


def test_rtc_can_be_set_and_goes_on() -> None:
    cmos = Cmos(2025, 1, 1, 0, 0, 0)
    cmos.put(0x0B, 0x82)
    for index, value in (
        (0x32, 0x19),
        (9, 0x99),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ):
        cmos.put(index, value)
    cmos.now += 10
    cmos.put(0x0B, 0x02)
    cmos.now += 2
    assert cmos.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_rtc_ignores_a_date_that_does_not_exist() -> None:
    cmos = Cmos(2025, 3, 1, 12, 0, 0)
    cmos.put(8, 0x02)
    cmos.put(7, 0x31)
    cmos.put(8, 0xFF)
    assert cmos.time()[:4] == [0x20, 0x25, 0x03, 0x01]


def test_rtc_keeps_its_memory_over_a_reset() -> None:
    cmos = Cmos(2025, 1, 1, 0, 0, 0)
    cmos.put(0x40, 0x77)
    cmos.put(0x0B, 0x42)
    cmos.rtc.reset()
    assert cmos.get(0xC0) == 0x77  # bit 7 is the NMI mask
    assert cmos.get(0x0B) == 0x02
    other = Rtc(lambda: cmos.now)
    other.load(cmos.rtc.save())
    assert other.save() == cmos.rtc.save()


# --- power -----------------------------------------------------------------------------------


def test_poweroff_by_pm1_control() -> None:
    offs: list[int] = []
    power = Power(lambda: offs.append(1))
    assert power.read(acpi.PM1_CONTROL, 2) == b"\x01\x00"
    power.write(acpi.PM1_CONTROL, (5 << acpi.SLP_TYP_SHIFT | acpi.SLP_EN).to_bytes(2, "little"))
    power.write(acpi.PM1_CONTROL, (acpi.SLP_TYP_S5 << acpi.SLP_TYP_SHIFT).to_bytes(2, "little"))
    assert offs == []
    power.write(acpi.PM1_CONTROL, (0x2000).to_bytes(2, "little"))
    assert offs == [1]
    assert power.read(acpi.PM1_CONTROL, 2) == b"\x01\x00"


def test_pm1_event_registers() -> None:
    power = Power(lambda: None)
    power.write(acpi.PM1_ENABLE, b"\x20\x03")
    power.write(acpi.PM1_STATUS, b"\xff\xff")
    assert power.read(acpi.PM1_STATUS, 4) == b"\0\0\x20\x03"
    other = Power(lambda: None)
    other.load(power.save())
    assert other.read(acpi.PM1_STATUS, 4) == b"\0\0\x20\x03"
    power.reset()
    assert power.read(acpi.PM1_ENABLE, 2) == b"\0\0"


def test_pm_timer_runs_at_its_frequency_and_wraps() -> None:
    now = 0
    power = Power(lambda: None, clock=lambda: now)
    values = []
    for now in (0, 1_000_000_000, 5_000_000_000):  # noqa: B007 — read by the clock
        values.append(int.from_bytes(power.read(acpi.PM_TIMER, 4), "little"))
    assert values == [0, 3_579_545, 5 * 3_579_545 % (1 << 24)]


def test_reset_register_acts_on_a_rise() -> None:
    resets: list[int] = []
    control = ResetControl(lambda: resets.append(1))
    control.write(0, b"\x02")
    assert control.read(0, 1) == b"\x02"
    assert resets == []
    control.write(0, b"\x06")
    assert resets == [1]
    control.load(control.save())
    control.reset()
    assert control.read(0, 1) == b"\x00"


# --- debug -----------------------------------------------------------------------------------


def test_debug_console() -> None:
    out: list[bytes] = []
    console = DebugConsole(out.append)
    assert console.read(0, 1) == b"\xe9"
    console.write(0, b"!")
    assert out == [b"!"]


@pytest.mark.parametrize(
    ("value", "code"), [(b"\0", 1), (b"\x10", 33), (b"\x03\0\0\0", 7), (b"\xff", 255)]
)
def test_debug_exit(value: bytes, code: int) -> None:
    codes: list[int] = []
    DebugExit(codes.append).write(0, value)
    assert codes == [code]
