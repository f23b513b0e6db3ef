"""What a mini guest has around it, on every hypervisor: a debug console, a debug exit, and nobody else."""

from __future__ import annotations

from hostel.hypervisor import Exit, HaltExit, Interrupted, MmioExit, PioExit, ShutdownExit

CONSOLE, EXIT = 0xE9, 0xF4
ENDINGS = ("exit", "halt", "shutdown")


class Surroundings:
    """Of one guest; its vCPUs' exits come here, one at a time."""

    def __init__(self) -> None:
        self.said = bytearray()
        self.code = 0
        """What it gave to the debug exit."""
        self.writes: list[tuple[int, bytes]] = []
        """To what is no memory: address and bytes, in their order."""

    @property
    def words(self) -> str:
        return self.said.decode("latin-1")

    def answer(self, exit: Exit) -> str:
        """How the guest has ended by this: one of ``ENDINGS``, or an exit that it should not have; empty if
        it goes on. Where nobody is, a read gives ones."""
        match exit:
            case PioExit(port=port, is_write=True) if port == CONSOLE:
                self.said += exit.data
            case PioExit(port=port, is_write=True) if port == EXIT:
                self.code = exit.data[0]
                return "exit"
            case PioExit(port=port, is_write=False):
                exit.data[:] = (b"\xe9" if port == CONSOLE else b"\xff") * len(exit.data)
            case MmioExit(is_write=False):
                exit.data[:] = b"\xff" * len(exit.data)
            case MmioExit():
                self.writes.append((exit.address, bytes(exit.data)))
            case PioExit() | Interrupted():
                pass
            case HaltExit():
                return "halt"
            case ShutdownExit():
                return "shutdown"
            case _:
                return f"{exit}"
        return ""
