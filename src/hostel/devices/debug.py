"""Two ports that people who write kernels know from QEMU and Bochs.

* ``DebugConsole``, port 0xE9: each byte written is output; a read gives 0xE9, which says it is there.
* ``DebugExit``, port 0xF4: writing ``v`` ends the machine with the exit code ``v << 1 | 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class DebugConsole:
    """Bochs' "port E9 hack"."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def read(self, offset: int, size: int) -> bytes:
        return b"\xe9"

    def write(self, offset: int, data: bytes) -> None:
        self._output(data)

    def reset(self) -> None:
        """It has no state."""

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """It has no state."""


class DebugExit:
    """QEMU's isa-debug-exit with ``iobase=0xf4,iosize=4``."""

    def __init__(self, exit: Callable[[int], None]) -> None:
        self._exit = exit

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        self._exit((int.from_bytes(data, "little") << 1 | 1) & 0xFF)

    def reset(self) -> None:
        """It has no state."""

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """It has no state."""
