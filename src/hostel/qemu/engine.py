"""Engine ``qemu``: a machine as a QEMU process. Implements ``plan.Engine``.

::

    start ──► QEMU ◄── socket pairs ──► agent          the caller's
                                        serial, debug  event loop ──► Console
                                        qmp            QMP thread ──► why it ended
             ── pipe ──► log of resets                 event loop ──► FaultLog (TCG)
    QEMU ends ──► _settle: what is left to read is read, then the ending is judged

How it ended, the first that holds: we stopped it; a panic; a triple fault, or resets without end; QEMU's
own word for it (QMP, SHUTDOWN); the debug exit port, which is QEMU's exit code; else QEMU failed, and its
last words say why.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostel.boot import elf, image
from hostel.boot.fits import check_fits
from hostel.boot.source import Source
from hostel.console import Console
from hostel.errors import HostError, MachineStopped, SpecError
from hostel.host import toolbox
from hostel.host.process import GRACE, Helper
from hostel.memory import GuestMemory
from hostel.plan import Balloon, Ending, EndingKind, Plan
from hostel.vmm.loop import EventLoop

from . import command, nic, tsc
from .control import Control
from .fault import SOON, FaultLog, ResetLoop
from .stream import ConsoleStream

if TYPE_CHECKING:
    from .vsock import QemuVsock

STOP_SECONDS = 60.0
STATISTICS_SECONDS = 3.0
"""How long the first ones of a balloon's guest may take: QEMU asks after a second."""
REASONS: dict[str, EndingKind] = {
    "guest-shutdown": "poweroff",
    "guest-reset": "reset",
    "guest-panic": "panic",
}
"""Of a SHUTDOWN event (QEMU QMP reference, ShutdownCause)."""
NO_MEMORY = ("backing store for guest RAM", "set up guest memory", "phys-bits too low")
"""What QEMU says where the host has no room for a guest's memory, or its processor no addresses."""
LOCKED = re.compile(r'Failed to get .*"\w+" lock .*\[(.*)\]')
"""And where another program has a disk's image, which it names in brackets."""
NOTE_PVH = 18  # XEN_ELFNOTE_PHYS32_ENTRY


class QemuEngine:
    """One machine. Thread-safe."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.console = Console(log=plan.runtime / "console.log")
        self._undo = ExitStack()
        self._undo.callback(self.console.close)
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._ending: Ending | None = None
        self._reason = ""
        self._stopping = False
        self._stop_code = 0
        self._resets = 0
        """Its firmware adds some of its own to each of the guest's."""
        self._crash = ""
        """Why the guest could not go on, if it could not."""
        self._reset_loop = ResetLoop()
        self._log: FaultLog | None = None
        self._helper: Helper | None = None
        self._agent: socket.socket | None = None
        self._agent_is_taken = False
        self._vsock: QemuVsock | None = None
        self._target = plan.spec.memory
        self._polled = False

    # -- the engine's contract ----------------------------------------------------------------

    @property
    def agent(self) -> socket.socket:
        """Belongs to who takes it. It reads as ended when the machine has."""
        if self._agent is None:
            raise ValueError("a machine without agent, or one that has not started")
        self._agent_is_taken = True
        return self._agent

    def start(self) -> None:
        """Returns when QEMU has made all devices. Any HostelError leaves nothing behind."""
        self._check_pins()
        with self._lock:
            if self._stopping:
                raise MachineStopped("this machine has been stopped")
            try:
                self._helper = self._power_on()
            except BaseException:
                self._undo.close()
                raise
        if not self._control.wait_up():
            self._settled.wait()
            if self._stopping:
                raise MachineStopped("this machine has been stopped")
            raise self._failure(self._helper)
        self._pin()

    def wait(self, timeout: float | None = None) -> Ending | None:
        return self._ending if self._settled.wait(timeout) else None

    def stop(self, code: int = 0) -> None:
        """Not from a console's subscriber: it waits for that one's thread."""
        with self._lock:
            self._stopping, self._stop_code = True, code
            if self._helper is None:
                self._finish(Ending("stopped", code=code))
                return
        writable = any(drive.keeps_writes for drive in self.plan.disks)
        self._helper.stop(GRACE if writable else 0)
        if not self._settled.wait(STOP_SECONDS):
            raise HostError("QEMU has ended, and what served it hangs")

    def resize_disk(self, index: int, size: int) -> None:
        self._running_control().execute(
            "block_resize", **{"node-name": f"disk{index}", "size": size}
        )

    def _running_control(self) -> Control:
        if self._helper is None:
            raise MachineStopped("the machine does not run")
        return self._control

    def set_link(self, nic: int, up: bool) -> None:
        self._running_control().execute("set_link", name=f"net{nic}", up=up)

    def announce(self) -> None:
        self._running_control().execute("announce-self", initial=50, max=100, rounds=2, step=50)

    def statistics(self) -> dict[str, Any]:
        """What the host says of the QEMU process."""
        own: dict[str, Any] = {"engine": "qemu", "accel": self.plan.accel, "resets": self._resets}
        own["console_bytes"] = self.console.total
        if self._vsock is not None:
            own["virtio"] = {"vsock": self._vsock.statistics()}
        if self._helper is None or not self._helper.alive():
            return own
        return own | self._helper.usage()

    def balloon(self, target: int | None = None) -> Balloon:
        """The guest is asked for its statistics once a second from the first call on: they are that old
        at most."""
        ask = self._control.execute
        if target is not None:
            self._target = target
            ask("balloon", value=target)
        if not self._polled:
            self._polled = True
            where = {"path": command.BALLOON, "property": "guest-stats-polling-interval"}
            ask("qom-set", **where, value=1)
        statistics = self._guest_statistics()
        return Balloon(ask("query-balloon")["actual"], self._target, statistics)

    def _guest_statistics(self) -> dict[str, int]:
        deadline = time.monotonic() + STATISTICS_SECONDS
        while True:
            found = self._control.execute("qom-get", path=command.BALLOON, property="guest-stats")
            if found["last-update"] or time.monotonic() > deadline:
                return command.balloon_statistics(found["stats"])
            time.sleep(0.1)

    # -- start --------------------------------------------------------------------------------

    def _power_on(self) -> Helper:
        """QEMU first; all else while it starts."""
        cmdline = self._cmdline()
        self._check_memory(cmdline)
        qemu, kernel = toolbox.find_qemu(), self._kernel()
        ours, theirs = {}, {}
        for name in command.streams(self.plan):
            ours[name], theirs[name] = socket.socketpair()
            self._undo.callback(theirs[name].close)
            self._undo.callback(self._close_agent if name == "agent" else ours[name].close)
        self._agent = ours.get("agent")
        self._open_vsock()
        fds = {name: end.fileno() for name, end in theirs.items()}
        if log := self._open_log():
            fds["log"] = log[1].fileno()
        if self._vsock is not None:
            fds["vsock"] = self._vsock.fd
        taps = self._undo.enter_context(ExitStack())
        fds |= nic.open_taps(self.plan, taps)
        argv = command.arguments(self.plan, kernel, cmdline, fds)
        helper = Helper(
            "qemu",
            [qemu, *argv],
            runtime=self.plan.runtime,
            pass_fds=tuple(fds.values()),
            on_end=self._on_end,
        )
        for end in theirs.values():
            end.close()
        taps.close()
        self._attach(ours)
        if log:
            log[1].close()
            self._log = FaultLog(self._loop, log[0], self._met_triple_fault)
            self._undo.callback(self._log.close)
        return helper

    def _open_vsock(self) -> None:
        if self.plan.vsock is not None:
            from .vsock import QemuVsock

            self._vsock = QemuVsock(self.plan)
            self._undo.callback(self._vsock.close)
            self.plan = self._vsock.plan

    def _open_log(self) -> tuple[FileIO, FileIO] | None:
        """Both ends of a pipe, where the log says what QMP does not."""
        if self.plan.accel != "tcg":
            return None
        ends = os.pipe2(os.O_CLOEXEC)
        read, write = FileIO(ends[0], "r"), FileIO(ends[1], "w")
        self._undo.callback(read.close)
        self._undo.callback(write.close)
        return read, write

    def _attach(self, ends: dict[str, socket.socket]) -> None:
        from hostel.monitor.panic import PanicWatch  # with the whole monitor: not before QEMU runs

        self._control = Control(ends["qmp"], self._on_event, hold=not self.plan.agent)
        self._control.start()
        self._loop = EventLoop(self._loop_failed)
        self._loop.start()
        self._undo.callback(self._loop.stop)
        if self._vsock is not None:
            self._undo.callback(self._vsock.close)  # before the loop, which it needs for it
            self._vsock.serve(self._loop)
        self._panic = PanicWatch(self.console, self._loop.call_later, self._halted_in_panic)
        self._undo.callback(self._panic.cancel)
        self._streams = [
            ConsoleStream(self._loop, self.console, end, accepts_input=name == "serial")
            for name, end in ends.items()
            if name in ("serial", "debug")
        ]
        for stream in self._streams:
            self._undo.callback(stream.close)

    def _close_agent(self) -> None:
        if self._agent is not None and not self._agent_is_taken:
            self._agent.close()

    def _kernel(self) -> Path:
        """As QEMU loads it soonest: the ELF, if it can enter that. It does so by the PVH note only."""
        unpacked = image.vmlinux_for(self.plan.kernel)
        if unpacked == self.plan.kernel:
            return unpacked
        with Source.open(unpacked) as source:
            return unpacked if _has_entry(source) else self.plan.kernel

    def _cmdline(self) -> str:
        """What the caller appended stays last: the last word counts."""
        rate = tsc.frequency_khz() if self.plan.accel == "tcg" else None
        words = [f"tsc_early_khz={rate}"] if rate else []
        if self.plan.spec.transport == "mmio":
            # microvm is hardware-reduced ACPI: there Linux asks EFI, and without one reboots by a triple
            # fault, which is a crash; its reset register works.
            words.append("reboot=a")
        return " ".join([*words, self.plan.cmdline])

    def _check_memory(self, cmdline: str) -> None:
        """What QEMU would leave to the guest to find out, or say in its own words."""
        plan = self.plan
        with image.open_kernel(plan.kernel) as kernel:
            if kernel.protocol == "sector":
                raise SpecError(
                    "engine qemu boots no boot sectors", cure="use --engine kvm or soft"
                )
            check_fits(kernel, cmdline=cmdline, initrd=plan.initrd, memory=plan.spec.memory)
            bare = kernel.protocol == "linux" and kernel.header is None  # an ELF as it came
            if bare and not _has_entry(kernel.source):
                message = f"{plan.kernel} has no PVH note, by which alone engine qemu enters an ELF"
                raise SpecError(message, cure="use --engine kvm, or the kernel's bzImage")
        if plan.spec.hugepages:
            GuestMemory(plan.spec.memory, hugepages=True).close()

    def _failure(self, helper: Helper) -> HostError:
        error = helper.failure()
        if match := LOCKED.search(error.message):
            return HostError(
                f"disk {match[1]} is in use",
                cure="stop the other machine, or give the disk to both as read-only",
            )
        if not any(words in error.message for words in NO_MEMORY):
            return error
        return HostError(
            f"{self.plan.spec.memory >> 20} MiB of guest memory is more than this host gives a guest:"
            f" {error.message}",
            cure="ask for less",
        )

    def _check_pins(self) -> None:
        if self.plan.spec.pin:
            from hostel.monitor.monitor import check_pins

            check_pins(self.plan.spec.pin)

    def _pin(self) -> None:
        if self.plan.spec.pin:
            for cpu in self._control.execute("query-cpus-fast"):
                os.sched_setaffinity(cpu["thread-id"], {self.plan.spec.pin[cpu["cpu-index"]]})

    # -- what happens -------------------------------------------------------------------------

    def _on_event(self, event: str, data: dict[str, Any]) -> None:
        """On the QMP thread."""
        if event == "SHUTDOWN":
            self._reason = data.get("reason", "")
        elif event == "RESET" and data.get("guest"):
            self._loop.call_soon(self._was_reset)

    def _was_reset(self) -> None:
        """The machine started again by itself, as it should, unless a panic did it."""
        self._drain()
        if self._crash:
            return  # it is being killed, and may be faster for a while than that
        self._reset_loop.reset()
        if self._panic.message:
            self._halted_in_panic()
        elif self._reset_loop.endless:
            times = f"{self._reset_loop.count} times in a row"
            self._crashed(f"the guest reset itself {times}, each within {SOON:g} s of its start")
        else:
            self._resets += 1
            self._panic.power_on()

    def _met_triple_fault(self) -> None:
        self._crashed("triple fault")

    def _crashed(self, why: str) -> None:
        assert self._helper is not None
        self._crash = self._crash or why
        self._helper.kill()

    def _halted_in_panic(self) -> None:
        assert self._helper is not None
        self._reason = "guest-panic"
        self._helper.kill()

    def _loop_failed(self, error: Exception) -> None:
        """A console's subscriber raised: its own affair, but not one to hide."""
        threading.excepthook(
            threading.ExceptHookArgs((type(error), error, error.__traceback__, None))
        )

    def _drain(self) -> None:
        for stream in self._streams:
            stream.drain()
        if self._log:
            self._log.drain()

    # -- the end ------------------------------------------------------------------------------

    def _on_end(self) -> None:
        """QEMU has been reaped. On the helpers' thread, which must not wait."""
        threading.Thread(target=self._settle, name="hostel-settle", daemon=True).start()

    def _settle(self) -> None:
        with self._lock:  # start has attached all, or failed and undone it
            helper = self._helper
        if helper is None:
            return
        self._control.ended()
        self._loop.run_sync(self._drain)
        if self._log and self._log.ends_in_fault():
            self._met_triple_fault()
        self._finish(self._judge(helper))

    def _judge(self, helper: Helper) -> Ending:
        message = self._panic.message
        kind = REASONS.get(self._reason)
        if self._stopping:
            return Ending("stopped", code=self._stop_code)
        if kind == "panic" or (message and (kind == "reset" or self._crash)):
            return Ending("panic", message)
        if self._crash:
            return Ending("crash", self._crash)
        if kind is not None:
            return Ending(kind)
        code = helper.wait(0) or 0
        if code > 0 and code & 1 and not self.plan.agent and not helper.last_lines():
            return Ending("debug-exit", code=code)
        return Ending("error", str(helper.failure()))

    def _finish(self, ending: Ending) -> None:
        self._undo.close()
        self._ending = ending
        self._settled.set()


def _has_entry(source: Source) -> bool:
    """Whether QEMU can enter this ELF."""
    return elf.parse(source).note(b"Xen\0", NOTE_PVH) is not None
