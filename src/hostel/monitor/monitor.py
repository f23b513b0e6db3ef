"""One machine of engine ``kvm`` or ``soft``, from ``start`` to its ending.

::

                    ┌──────────── reset, and on_reboot "restart" ───────────┐
                    ▼                                                       │
    start ──► Board running ──poweroff, reset, panic, crash, …──► _settle ──┴──► Ending
                    └──────────────────── stop ───────────────────┘

Whatever ends a power-on is reported once, on any thread, and only stops the vCPUs there. A thread of
its own (``_settle``) then takes the board down, for no vCPU can wait for itself.

Lock order: a device's lock, then ``_lock``. With ``_lock`` held nothing of the board is waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hostel.console import Console
from hostel.errors import GuestError, HostelError, HostError, MachineStopped, SpecError
from hostel.plan import Balloon, Ending, Plan
from hostel.vmm.loop import EventLoop

from .loading import Loading
from .panic import PanicWatch

if TYPE_CHECKING:
    import socket

    from hostel.virtio.balloon import Balloon as BalloonDevice

    from .board import Board, Named
    from .soft import SoftSide

MAX_FAULTS = 16
EVENT_SHUTDOWN, EVENT_RESET = 1, 2  # KVM_SYSTEM_EVENT_*
STOP_SECONDS = 60.0
"""For all that a stop waits for; data on its way to a slow disk is most of it."""
COST = "its memory stays taken until this process has gone"


class Monitor:
    """Implements ``plan.Engine``; to its board it is the ``Owner``."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.console = Console(log=plan.runtime / "console.log")
        self.restarts = 0
        self.faults: list[str] = []
        """Of virtio devices that stopped, the last few: the guest or the host gave them no choice."""
        self._life = threading.Lock()
        """Held while ``start`` runs."""
        self._lock = threading.Lock()
        self._report: Ending | None = None
        """Why the present board is to go."""
        self._stopping = False
        self._stopped = Ending("stopped")
        """What a stop between two power-ons ends with."""
        self._ending: Ending | None = None
        self._settled = threading.Event()
        self._settler: threading.Thread | None = None
        self._stuck: HostError | None = None
        """A thread of ours hangs."""
        self._undo = ExitStack()
        self._undo.callback(self.console.close)
        self._board: Board | None = None
        self._soft: SoftSide | None = None
        self._agent: socket.socket | None = None
        self._agent_is_taken = False
        self._guest_end: socket.socket | None = None
        self._statistics: dict[str, Any] = {}

    # -- the engine's contract ----------------------------------------------------------------

    @property
    def agent(self) -> socket.socket:
        """Belongs to who takes it. It reads as ended when the machine has."""
        if self._agent is None:
            raise ValueError("a machine without agent, or one that has not started")
        self._agent_is_taken = True
        return self._agent

    def start(self) -> None:
        """Any HostelError leaves nothing behind."""
        with self._life:
            if self._settled.is_set():
                raise MachineStopped("this machine has been stopped")
            try:
                check_pins(self.plan.spec.pin)
                self._open_soft()
                with Loading(self.plan) as loading:  # before all else: it takes the longest
                    self._open()
                    self._power_on(loading)
            except BaseException as error:
                self._abandon(Ending("error", str(error)))
                raise

    def _abandon(self, ending: Ending) -> None:
        """A signal may interrupt a start whose guest runs already."""
        with self._lock:
            board = self._board if self._report is None else None
            if board is not None:
                self._report, self._board = ending, None
        if board is not None:
            board.close(ending)
        self._finish(ending)

    def wait(self, timeout: float | None = None) -> Ending | None:
        return self._ending if self._settled.wait(timeout) else None

    def stop(self, code: int = 0) -> None:
        """Not from the event loop or a console's subscriber: it waits for both. ``HostError`` where a thread
        of ours hangs: then what that may still use is left behind."""
        with self._life:
            if not self._settled.is_set():
                self._stop(Ending("stopped", code=code))
        if not self._settled.wait(STOP_SECONDS) and self._settler is not None:
            from hostel.vmm.vcpu_thread import place

            self._stuck = HostError(f"the machine does not stop: {place(self._settler)}", cost=COST)
        if self._stuck is not None:
            raise self._stuck

    def _stop(self, ending: Ending) -> None:
        with self._lock:
            self._stopping, self._stopped = True, ending
            never_started = self._board is None and self._report is None
        if never_started:
            self._finish(ending)
        else:
            self._end(ending)

    def resize_disk(self, index: int, size: int) -> None:
        with self._lock:
            board = self._board
        if board is None:
            raise MachineStopped("the machine does not run")
        board.resize_disk(index, size)

    def set_link(self, nic: int, up: bool) -> None:
        self._device(f"net{nic}").set_link(up)

    def announce(self) -> None:
        for index, nic in enumerate(self.plan.nics):
            if nic.model == "virtio":
                self._device(f"net{index}").announce()

    def _device(self, name: str) -> Any:
        with self._lock:
            board = self._board if self._report is None else None
        devices: list[Named] = [*board.virtio, *board.cards] if board else []
        for device in devices:
            if device.name == name:
                return device
        raise MachineStopped("the machine does not run")

    def statistics(self) -> dict[str, Any]:
        """Counters of the present power-on; the last ones when it has ended."""
        with self._lock:
            if self._board is not None and self._report is None:
                self._statistics = self._board.statistics() | self._own_statistics()
            return self._statistics

    def balloon(self, target: int | None = None) -> Balloon:
        device: BalloonDevice = self._device("balloon")
        if target is not None:
            device.set_target(target)
        statistics = device.ask_statistics()
        return Balloon(device.actual, device.target, statistics)

    # -- what the board reports, from any thread ----------------------------------------------

    def poweroff(self) -> None:
        self._end(Ending("poweroff"))

    def reset(self) -> None:
        self._end(Ending("reset"))

    def debug_exit(self, code: int) -> None:
        self._end(Ending("debug-exit", code=code))

    def system_event(self, type: int) -> None:
        if type == EVENT_SHUTDOWN:
            self.poweroff()
        elif type == EVENT_RESET:
            self.reset()
        else:
            self._end(Ending("crash", f"the guest reported a crash (KVM system event {type})"))

    def failed(self, error: HostelError) -> None:
        self._end(Ending("crash" if isinstance(error, GuestError) else "error", str(error)))

    def device_failed(self, device: Named, error: HostelError) -> None:
        words = str(error).removeprefix(f"{device.name}: ")
        self.faults = [*self.faults[1 - MAX_FAULTS :], f"{device.name}: {words}"]

    def _halted_in_panic(self) -> None:
        self._end(Ending("panic", self._panic.message))

    def _loop_failed(self, error: Exception) -> None:
        from hostel.vmm.vcpu_thread import bug

        self.failed(error if isinstance(error, HostelError) else bug(error))

    # -- life cycle ---------------------------------------------------------------------------

    def _open_soft(self) -> None:
        if self.plan.engine == "soft":
            from .soft import SoftSide

            self._soft = SoftSide(self.plan, self.console, self._end)
            self._undo.callback(self._soft.close)

    def _open(self) -> None:
        """What outlives a reset."""
        self._loop = EventLoop(self._loop_failed)
        self._undo.callback(self._loop.stop)
        self._loop.start()
        self._panic = PanicWatch(self.console, self._loop.call_later, self._halted_in_panic)
        self._undo.callback(self._panic.cancel)
        if self.plan.agent:
            import socket

            self._agent, self._guest_end = socket.socketpair()
            self._undo.callback(self._close_agent)
        self.console.on_input = lambda: self._loop.call_soon(self._input)

    def _close_agent(self) -> None:
        if self._guest_end is not None:
            self._guest_end.close()
        if self._agent is not None and not self._agent_is_taken:
            self._agent.close()

    def _input(self) -> None:
        if (board := self._board) is not None:
            board.poll_input()

    def _power_on(self, loading: Loading) -> bool:
        """Whether the machine is on: not if it is being stopped."""
        end = self._guest_end
        board = self._make_board(loading, None if end is None else end.fileno())
        self._panic.power_on()
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._report = None
                self._board = board
                board.start()
        if stopping:
            board.close(self._stopped)
        else:
            self._seat(board)
        return not stopping

    def _make_board(self, loading: Loading, agent_fd: int | None) -> Board:
        """The kernel is on its way into memory while Python imports what makes the rest."""
        from .board import Board

        return Board(
            self.plan,
            loading,
            self._loop,
            self.console,
            self,
            agent_fd=agent_fd,
            soft=self._soft,
        )

    def _seat(self, board: Board) -> None:
        """The guest runs already. If it has ended meanwhile, that is what counts."""
        try:
            board.seat()
        except BaseException as error:
            with self._lock:
                if self._report is not None:
                    return
                self._report = report = Ending("error", str(error))
                self._board = None
            board.close(report)
            raise

    def _end(self, report: Ending) -> None:
        """The first report counts."""
        if self._soft is not None:
            report = self._soft.ending(report)
        with self._lock:
            if self._report is not None:
                return
            self._report = report
            board = self._board
            if board is not None:
                self._statistics = board.statistics() | self._own_statistics()
                board.halt()
        self._settler = threading.Thread(target=self._settle, name="hostel-settle", daemon=True)
        self._settler.start()

    def _settle(self) -> None:
        """Take the board down; then another power-on, or the ending."""
        try:
            ending = self._power_off()
            if ending.kind == "reset" and self.plan.spec.on_reboot == "restart":
                self.restarts += 1
                with Loading(self.plan) as loading:
                    if self._power_on(loading):
                        return  # to its own ending, of which there may be word by now
                ending = self._stopped
        except HostelError as error:
            ending = Ending("error", str(error))
        except Exception as error:
            from hostel.vmm.vcpu_thread import bug

            ending = Ending("error", str(bug(error)))
        self._finish(ending)

    def _power_off(self) -> Ending:
        board, self._board = self._board, None
        report = self._report
        assert report is not None
        if board is not None and (at := board.close(report)):
            self._stuck = HostError(f"a vCPU's thread does not end: {at}", cost=COST)
            return Ending("error", str(self._stuck))
        if report.kind == "reset" and self._panic.message:
            return Ending("panic", self._panic.message)
        return self._soft.told(report) if self._soft is not None else report

    def _finish(self, ending: Ending) -> None:
        if self._stuck is None:
            try:
                self._undo.close()
            except HostelError as error:  # a recording that cannot be finished
                ending = Ending("error", str(error))
        else:  # the thread that hangs may hold what closing waits for
            self._close_agent()
        self._ending = ending
        self._settled.set()

    # -- statistics ---------------------------------------------------------------------------

    def _own_statistics(self) -> dict[str, Any]:
        return {
            "engine": self.plan.engine,
            "restarts": self.restarts,
            "faults": self.faults,
            "console_bytes": self.console.total,
            "threads": len(os.listdir("/proc/self/task")),
            "fds": len(os.listdir("/proc/self/fd")),
        }


def check_pins(pin: Iterable[int]) -> None:
    """That this process may run on each of these pCPUs."""
    allowed = os.sched_getaffinity(0)
    if wrong := sorted(set(pin) - allowed):
        raise SpecError(
            f"there is no pCPU {wrong[0]} to pin a vCPU to",
            cure=f"choose among {', '.join(map(str, sorted(allowed)))}",
        )
