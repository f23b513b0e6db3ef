"""What a machine asks of the outside, and who answers.

::

    question        asked                                          answered from outside by
    border          before each piece of a vCPU's turn             "input": the console has some now
    take            by the serial port, whenever it has room       "typed": bytes
    clock           by the real-time clock                         "clock": nanoseconds since the epoch
    idle            when all vCPUs sleep                           "idle": ns until input came; else the timer

Questions are numbered as they come. An answer that is not the usual one (nothing) is written with its
question's number; so is a ``mark`` now and then, that says no more than where the machine was.

Rules: one at a time, by whose turn it is; only ``tell`` may be called by others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from struct import Struct
from typing import NoReturn
from zlib import crc32

from hostel.errors import HostError
from hostel.hypervisor import Exit, MmioExit, PioExit

from .log import End, Entry, Kind, Log, Writer

Sleep = Callable[[int | None], bool]
"""For so many nanoseconds at most (None: without end). False: the vCPU was kicked."""
Position = Callable[[], tuple[int, int, int]]
"""Whose turn it is, instructions, time."""

MARK_EACH = 4096
"""Questions from one mark to the next."""
FROM_OUTSIDE = ("stopped", "panic", "error")
"""Endings that are not the guest's doing: a replay has to be told."""
_POSITION, _WRITE = Struct("<IQQ"), Struct("<QI")
_LATEST = 1 << 63


class Border(Enum):
    NOTHING = 0
    INPUT = 1
    OVER = 2


class Inputs(ABC):
    """Of one machine, over all its power-ons."""

    patience = 0.0
    """For so many seconds a kick waits for the end of a slice."""

    def __init__(self) -> None:
        self._asked = 0
        self._turns = 0
        self._position: Position = lambda: (0, 0, 0)
        self.cut = False
        """The machine was stopped within a slice."""

    def note(self, exit: Exit) -> None:
        """What the guest writes to a device is a part of what it does."""
        if isinstance(exit, PioExit) and exit.is_write:
            self._turns = crc32(exit.data, crc32(_WRITE.pack(exit.port, exit.size), self._turns))
        elif isinstance(exit, MmioExit) and exit.is_write:
            self._turns = crc32(exit.data, crc32(_WRITE.pack(exit.address, 0), self._turns))

    @property
    def instructions(self) -> int:
        return self._position()[1]

    def _count(self) -> int:
        """A question: its number."""
        self._turns = crc32(_POSITION.pack(*self._position()), self._turns)
        number, self._asked = self._asked, self._asked + 1
        return number

    def power_on(self, memory: str, position: Position) -> None:
        self._position = position
        self._power_on(memory)

    @abstractmethod
    def _power_on(self, memory: str) -> None: ...
    def ending(self, end: End) -> End:
        """What counts when the machine ends like this, now."""
        return end

    @abstractmethod
    def power_off(self, end: End) -> None: ...
    @abstractmethod
    def tell(self) -> None:
        """The console has input. From any thread."""

    @abstractmethod
    def border(self) -> Border: ...
    @abstractmethod
    def take(self, limit: int) -> bytes: ...
    @abstractmethod
    def clock(self) -> int: ...
    @abstractmethod
    def idle(self, left: int | None, sleep: Sleep) -> int | None:
        """Nanoseconds that pass, at most to the timer; None: the vCPU was kicked, or the machine is over."""

    @abstractmethod
    def close(self) -> None:
        """When the machine has ended. Idempotent."""


class Recorder(Inputs):
    """``source(n)`` gives up to ``n`` bytes that were typed."""

    patience = 1.0

    def __init__(self, log: Writer, source: Callable[[int], bytes]) -> None:
        super().__init__()
        self._log = log
        self._source = source
        self._told = False

    def tell(self) -> None:
        self._told = True

    def border(self) -> Border:
        number = self._ask()
        if not self._told:
            return Border.NOTHING
        self._told = False
        self._put(number, "input", None)
        return Border.INPUT

    def take(self, limit: int) -> bytes:
        number = self._ask()
        if data := self._source(limit):
            self._put(number, "typed", data.decode("latin-1"))
        return data

    def clock(self) -> int:
        number, now = self._ask(), time.time_ns()
        self._put(number, "clock", now)
        return now

    def idle(self, left: int | None, sleep: Sleep) -> int | None:
        begun, passed = time.monotonic_ns(), 0
        while not self._told and (left is None or passed < left):
            if not sleep(None if left is None else left - passed):
                return None
            passed = time.monotonic_ns() - begun
        number = self._ask()
        if left is not None and passed >= left:
            return left
        self._put(number, "idle", passed)
        return passed

    def _ask(self) -> int:
        number = self._count()
        if number % MARK_EACH == 0:
            self._put(number, "mark", None)
        return number

    def _put(self, number: int, kind: Kind, value: str | int | End | None) -> None:
        self._log.put(Entry(number, self.instructions, kind, value, self._turns))

    def _power_on(self, memory: str) -> None:
        self._put(self._asked, "on", memory)

    def power_off(self, end: End) -> None:
        """Where in a slice it was cut off a replay cannot tell: it ends behind it, with another state."""
        if self.cut:
            end = End(end.kind, end.code, end.detail, "", ())
        self._put(self._asked, "off", end)

    def close(self) -> None:
        self._log.close()


class Replayer(Inputs):
    """``on_over`` is called when the recorded machine was ended from outside, where this is now."""

    def __init__(self, log: Log, on_over: Callable[[End], None]) -> None:
        super().__init__()
        self._entries = log.entries
        self._at = 0
        self._on_over = on_over
        self._left = self._over = False

    def tell(self) -> None:
        """Who types now is not heard."""

    def border(self) -> Border:
        if self._is_over():
            return Border.OVER
        return Border.NOTHING if self._ask("input") is None else Border.INPUT

    def take(self, limit: int) -> bytes:
        if (entry := self._ask("typed")) is None:
            return b""
        if not isinstance(entry.value, str) or len(entry.value) > limit:
            self._leaves(f"it typed {entry.value!r} where the serial port has room for {limit}")
        return entry.value.encode("latin-1", "replace")

    def clock(self) -> int:
        entry = self._ask("clock")
        if entry is None:
            self._leaves("it did not read the clock, as this one does")
        return self._number(entry, _LATEST)

    def idle(self, left: int | None, sleep: Sleep) -> int | None:
        if self._is_over():
            return None
        if (entry := self._ask("idle")) is not None:
            return self._number(entry, _LATEST if left is None else left)
        if left is None:
            self._leaves("it went on, where this one sleeps for ever")
        return left

    def _number(self, entry: Entry, most: int) -> int:
        if not isinstance(entry.value, int) or not 0 <= entry.value <= most:
            self._leaves(f"it has {entry.value!r} for {entry.kind}")
        return entry.value

    def _ask(self, kind: Kind) -> Entry | None:
        number = self._count()
        entry = self._here(number)
        if entry is not None and entry.kind == "mark":
            self._at += 1
            entry = self._here(number)
        if entry is None:
            return None
        if entry.kind != kind:
            self._leaves(f"it has {entry.kind!r} where this one asks for {kind!r}")
        self._at += 1
        return entry

    def _here(self, number: int) -> Entry | None:
        """The log's entry for this question; what it says of the way here has to fit."""
        entry = self._next
        if entry is None:
            self._leaves("it ends before")
        if entry.question > number:
            return None
        self._compare(entry)
        return entry

    @property
    def _next(self) -> Entry | None:
        return self._entries[self._at] if self._at < len(self._entries) else None

    def _compare(self, entry: Entry) -> None:
        if entry.instructions != self.instructions:
            self._leaves(f"it was at instruction {entry.instructions} here")
        if entry.turns != self._turns:
            self._leaves("its turns or its writes to devices until here were others")

    def _is_over(self) -> bool:
        entry = self._next
        if entry is None or entry.kind != "off" or entry.question != self._asked:
            return False
        if not isinstance(entry.value, End) or entry.value.kind not in FROM_OUTSIDE:
            self._leaves("it ended by its guest's doing here")
        self._over = True
        self._on_over(entry.value)
        return True

    def _power_on(self, memory: str) -> None:
        if (entry := self._next) is None or entry.kind != "on":
            self._leaves("it has no further power-on")
        if entry.value != memory:
            raise HostError(
                "this is not the machine of the log: its memory differs at power-on",
                cost="a replay would be of another machine",
                cure="the kernel or initrd has changed: record anew",
            )
        self._compare(entry)
        self._at += 1

    def ending(self, end: End) -> End:
        """The recorded machine may have been stopped in the very piece that ends with its own ending: then
        that came second."""
        entry = self._next
        if end.kind in FROM_OUTSIDE or entry is None or entry.question != self._asked:
            return end
        if not isinstance(entry.value, End) or entry.value.kind not in FROM_OUTSIDE:
            return end
        self._over = True
        return entry.value

    def power_off(self, end: End) -> None:
        if self._left:  # and has said so
            return
        if end.kind == "stopped" and not self._over:  # by who has seen enough of it
            return
        entry = self._next
        was = entry.value if entry and entry.kind == "off" else None
        if entry is None or not isinstance(was, End) or entry.question != self._asked:
            self._leaves(f"it went on, where this one ended: {end.kind} {end.detail}".rstrip())
        if (was.kind, was.code) != (end.kind, end.code):
            self._leaves(f"it ended by {was.kind} {was.code}, this one by {end.kind} {end.code}")
        self._at += 1
        if was.vcpus:
            self._compare_ends(entry, was, end)

    def _compare_ends(self, entry: Entry, was: End, end: End) -> None:
        self._compare(entry)
        if was.memory != end.memory:
            self._leaves("it left other bytes in memory")
        for number, (before, now) in enumerate(zip(was.vcpus, end.vcpus, strict=False)):
            if before != now:
                self._leaves(f"it left vCPU {number} with other registers")

    def _leaves(self, how: str) -> NoReturn:
        self._left = True
        last = self._entries[self._at - 1].instructions if self._at else 0
        raise HostError(
            f"the replay leaves the log at instruction {self.instructions}: {how}",
            cost=f"they were last seen to agree at instruction {last}",
        )

    def close(self) -> None:
        pass
