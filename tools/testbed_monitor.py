"""Where an emulated server's processors stand, as QEMU tells it over QMP: evidence for one that stood still.

::

    CPU 0: RIP=ffffffff81a2f0cb RFL=00000246 HLT=1; ISR (none); IRR 236

An interrupt that waits (IRR) at a processor that would take it (0x200 in RFL, the interrupt flag) and does
not, in both of two looks, is the emulation's loss: QEMU's VMRUN (helper_vmrun, as of 7.2) sets a bit of the
processor's requests without the lock under which another thread may set one at that moment.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from typing import TextIO

SECONDS = 3.0
"""For all questions: it is asked of a QEMU that may hang."""
APART = 0.3
_PLACE = re.compile(r"(RIP=\w+|EIP=\w+).*?(RFL=\w+|EFL=\w+).*?(HLT=\d)")
_WAITING = re.compile(r"^(ISR|IRR)\s+(.*?)\s*$", re.M)


def processors(sock: socket.socket, count: int) -> list[str]:
    """Two looks at each of ``count`` processors; as much as comes in time."""
    found: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        sock.settimeout(SECONDS)
        with sock.makefile("rw") as monitor:
            monitor.readline()  # its greeting
            _ask(monitor, "qmp_capabilities")
            for _ in range(2):
                places = _PLACE.findall(_human(monitor, "info registers -a"))
                for number in range(count):
                    waiting = _WAITING.findall(_human(monitor, f"info lapic {number}"))
                    place = " ".join(places[number]) if number < len(places) else "unknown"
                    found.append(f"CPU {number}: {place}; {'; '.join(map(' '.join, waiting))}")
                time.sleep(APART)
    return found


def _human(monitor: TextIO, command: str) -> str:
    return str(_ask(monitor, "human-monitor-command", **{"command-line": command}))


def _ask(monitor: TextIO, what: str, **arguments: str) -> object:
    monitor.write(json.dumps({"execute": what, "arguments": arguments}) + "\n")
    monitor.flush()
    while True:
        answer = json.loads(monitor.readline())
        if "event" not in answer:
            return answer["return"]
