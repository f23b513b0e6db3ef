"""Storms: a guest that offers without end, and what must be true after one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from virtio.malice import kick_all
from virtio.rig import Driver


class Storm:
    """``storm.py`` on queues, each with its request: each slot of a ring names it, and the ring is always
    full."""

    def __init__(
        self, driver: Driver, hot: Mapping[int, tuple[Sequence[bytes], Sequence[int]]]
    ) -> None:
        memory = driver.rig.memory
        arguments, self._fds = [], [memory.fd]
        for index, (readable, writable) in hot.items():
            queue = driver.queues[index]
            head = queue.add(readable, writable)
            for slot in range(queue.size):
                memory.write_u16(queue.avail + 4 + 2 * slot, head)
            kick = driver.transport.queues[index].kick
            arguments += [queue.avail + 2, queue.used + 2, queue.size, kick]
            self._fds.append(kick)
        script = Path(__file__).with_name("storm.py")
        self._command = [sys.executable, "-IS", str(script), str(memory.fd), str(memory.size)]
        self._command += map(str, arguments)

    def __enter__(self) -> Storm:
        self._process = subprocess.Popen(
            self._command, pass_fds=self._fds, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        assert self._process.stdout.read(1) == b"!"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def sees_no_more(driver: Driver) -> bool:
    """Of a device that was reset: nobody writes to what were its rings, whatever is kicked."""
    memory = driver.rig.memory
    areas = [(queue.desc, queue.end - queue.desc) for queue in driver.queues.values()]
    for start, size in areas:
        memory.write(start, b"\x5a" * size)
    time.sleep(0.01)
    kick_all(driver)
    return all(memory.view(start, size) == b"\x5a" * size for start, size in areas)
