"""A guest that offers without end, as a process of its own: as fast as another pCPU would be.

usage: storm.py MEMORY_FD MEMORY_SIZE [AVAIL_INDEX USED_INDEX QUEUE_SIZE KICK_FD]…
"""

from __future__ import annotations

import mmap
import os
import sys


def main(memory_fd: int, size: int, *numbers: int) -> None:
    words = memoryview(mmap.mmap(memory_fd, size)).cast("H")
    queues = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
    os.write(1, b"!")
    turn = 0
    while True:
        turn += 1
        for avail, used, entries, kick in queues:
            words[avail // 2] = words[used // 2] + entries & 0xFFFF
            if turn % 64 == 1:
                os.eventfd_write(kick, 1)


main(*map(int, sys.argv[1:]))
