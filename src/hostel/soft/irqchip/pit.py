"""The 8254 timer (Intel 8254 data sheet): channel 0 ticks, channel 2 is what software calibrates by.

Counters are not stepped: what one reads is computed from the time that has passed since its count was
written. Modes 0, 2, 3 and 4; 1 and 5 need a gate that only channel 2 has, and count as 0 and 4 do.
"""

from __future__ import annotations

from collections.abc import Callable

PORTS, CONTROL, SPEAKER = 0x40, 0x43, 0x61
HZ = 1_193_182
_SECOND = 1_000_000_000


class Channel:
    """One counter. Times are nanoseconds of the machine's clock."""

    def __init__(self) -> None:
        self.mode = 3
        self.access = 3
        self.count = 0x10000
        self.start: int | None = None
        self.gate = True
        self.low: int | None = None
        self.high_next = False
        self.latched: list[int] = []
        self.status: int | None = None
        """Latched by a read-back; read before the count."""

    @property
    def repeats(self) -> bool:
        return self.mode in (2, 3)

    @property
    def period(self) -> int:
        return self.count * _SECOND // HZ

    def ticks(self, now: int) -> int:
        return (now - self.start) * HZ // _SECOND if self.start is not None else 0

    def value(self, now: int) -> int:
        ticks = self.ticks(now)
        if self.start is None:
            return 0
        if self.mode == 3:  # counts down by twos, twice a period
            return (self.count - 2 * ticks % self.count) & 0xFFFF
        return (self.count - (ticks % self.count if self.repeats else ticks)) & 0xFFFF

    def output(self, now: int) -> bool:
        ticks = self.ticks(now)
        if self.start is None:
            return self.mode != 0
        match self.mode:
            case 0:
                return ticks >= self.count
            case 2:
                return ticks % self.count != self.count - 1
            case 3:
                return ticks % self.count < (self.count + 1) // 2
        return ticks != self.count

    def program(self, control: int) -> None:
        mode = control >> 1 & 7
        self.mode = mode & 3 if mode > 5 else {1: 0, 5: 4}.get(mode, mode)
        self.access = control >> 4 & 3
        self.start = self.low = self.status = None
        self.high_next = False
        self.latched = []

    def latch(self, value: int) -> None:
        if not self.latched:
            both = [value & 0xFF, value >> 8]
            self.latched = {1: both[:1], 2: both[1:]}.get(self.access, both)

    def read(self, now: int) -> int:
        if self.status is not None:
            status, self.status = self.status, None
            return status
        if self.latched:
            return self.latched.pop(0)
        value = self.value(now)
        if self.access == 3:
            self.high_next = not self.high_next
            return value & 0xFF if self.high_next else value >> 8
        return value >> 8 if self.access == 2 else value & 0xFF

    def write(self, value: int, now: int) -> bool:
        """True when the count is whole: it starts now."""
        if self.access == 3 and self.low is None:
            self.low = value
            return False
        low = self.low if self.access == 3 and self.low is not None else value
        self.count = {1: value, 2: value << 8}.get(self.access, value << 8 | low) or 0x10000
        self.low, self.start = None, now
        return True


class Pit:
    """``tick`` is called at each rise of channel 0's output; ``fire`` when ``deadline`` has come."""

    def __init__(self, clock: Callable[[], int], tick: Callable[[], None]) -> None:
        self._clock, self._tick = clock, tick
        self.reset()

    def reset(self) -> None:
        self.channels = [Channel() for _ in range(3)]
        self.channels[2].gate = False
        self._speaker = 0
        self.deadline: int | None = None

    def read(self, port: int) -> int:
        now = self._clock()
        if port == SPEAKER:
            refresh = now // 15_085 & 1  # DRAM refresh, the toggle that old software delays by
            out = self.channels[2].output(now)
            return self._speaker | refresh << 4 | out << 5
        return self.channels[port & 3].read(now) if port != CONTROL else 0

    def write(self, port: int, value: int) -> None:
        if port == SPEAKER:
            self._set_speaker(value & 3)
        elif port == CONTROL:
            self._control(value)
        elif self.channels[port & 3].write(value, self._clock()) and port == PORTS:
            self.deadline = self._clock() + self.channels[0].period

    def _set_speaker(self, value: int) -> None:
        """A rising gate starts channel 2's count anew (modes 2 and 3, and the one-shots)."""
        if value & 1 and not self._speaker & 1 and self.channels[2].start is not None:
            self.channels[2].start = self._clock()
        self._speaker = value

    def _control(self, value: int) -> None:
        now, number = self._clock(), value >> 6
        if number == 3:
            self._read_back(value, now)
        elif value & 0x30:
            self.channels[number].program(value)
            if number == 0:
                self.deadline = None
        else:
            self.channels[number].latch(self.channels[number].value(now))

    def _read_back(self, value: int, now: int) -> None:
        for number, channel in enumerate(self.channels):
            if not value >> number + 1 & 1:
                continue
            if not value & 0x20:
                channel.latch(channel.value(now))
            if not value & 0x10 and channel.status is None:
                channel.status = channel.output(now) << 7 | channel.access << 4 | channel.mode << 1

    def fire(self, now: int) -> None:
        """If the deadline has come. Periods that were missed are one tick."""
        if self.deadline is None or self.deadline > now:
            return
        channel = self.channels[0]
        if channel.repeats and channel.period:
            missed = (now - self.deadline) // channel.period
            self.deadline += (missed + 1) * channel.period
        else:
            self.deadline = None
        self._tick()
