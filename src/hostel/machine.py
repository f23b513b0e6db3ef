"""The public machine: picks the engine, wires it, runs its life.

::

    new ──start──► booting ──wait_ready──► ready ──stop, or the guest ends──► ended
                      ▲                      │
                      └──── guest reboots ───┘      (on_reboot "restart")

Threads: the caller's, the reader of the agent's socket (``guest/connection.py``), and whatever the engine
runs. Methods may be called from any thread.

Start-up order matters for speed: networks and file system daemons are started first and come up while
the plan is finished; the engine starts; ``wait_ready`` sends the agent all its steps at once, so that
setting up the root costs one round trip.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import (
    AgentError,
    BootError,
    HelperError,
    HostelError,
    MachineStopped,
    MachineTimeout,
    SpecError,
)
from .plan import CONSOLE_LINES, ENDED, Balloon, Ending, Engine, Plan, explain_ending
from .spec import MachineSpec

if TYPE_CHECKING:
    import socket

    from .console import Console
    from .guest.client import AgentClient, GuestProcess, Hello, Ids, Word
    from .guest.protocol import Buffer
    from .host.networks import Networks
    from .host.shares import Served, Share
    from .host.storage import Daemon
    from .prepare import Preparation

BOOT_SECONDS = {"kvm": 60.0, "tcg": 180.0}
"""How long a guest may take to reach its agent, by what runs its vCPUs. Emulation is slow, and slower
on a busy host; a guest that is dead ends long before, by its console or its exit."""
STOP_SECONDS = 10.0
ENDING_SECONDS = 2.0
"""How long to wait for the engine to say why the agent's stream ended."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Result(msgspec.Struct, frozen=True):
    """How a command ended, and what it wrote."""

    exit_code: int
    """As a shell has it: 128 + n for a signal."""
    stdout: bytes
    stderr: bytes
    signal: int | None = None


class Machine:
    """One virtual machine. ``with Machine(...) as vm:`` starts it and stops it at the end."""

    def __init__(self, spec: MachineSpec | None = None, **fields: Any) -> None:
        """From a ``MachineSpec``, or its fields as keywords."""
        self.spec = spec.replace(**fields) if spec else MachineSpec(**fields)
        self.timings: dict[str, float] = {}
        """Seconds from ``start`` to: the plan made, the engine started, the agent there, ready."""
        self.restarts = 0
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._undo = ExitStack()
        self._power = ExitStack()
        """What one power-on has to give back."""
        self._prepared: Preparation | None = None
        self._daemons: dict[int, Daemon] = {}
        self._engine: Engine | None = None
        self._client: AgentClient | None = None
        self._hello: Hello | None = None
        self._ending: Ending | None = None

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> Machine:
        """Power on. Returns as soon as the guest runs; any HostelError leaves nothing behind."""
        from .host import descriptors, runtime
        from .host.attaching import attached

        with self._lock:
            if self._engine is not None or self._ending is not None:
                raise MachineStopped("a machine can be started once")
            descriptors.ensure(self.spec)
            self._begun = time.monotonic()
            try:
                self._runtime = self._undo.enter_context(runtime.Runtime(self.spec.name))
                networks = self._undo.enter_context(attached(self.spec, self._runtime.path))
                self._undo.callback(self._power.close)
                self._power_on(networks)
            except BaseException:
                self._undo.close()
                raise
            finally:
                runtime.sweep()  # now that the guest runs there is time for what others left
        return self

    def _power_on(self, networks: Networks | None = None) -> None:
        """In the order of the top of this file; after a reboot again, with the same plan."""
        from . import disks, prepare, root
        from .guest.client import AgentClient

        shares = self._serve(root.shared_paths(self.spec))
        if self._prepared is None:
            self._prepared = prepare.prepare(self.spec, self._runtime.path, networks=networks)
            self._undo.enter_context(disks.overlays(self._prepared.plan))
        self._mark("prepare")
        self._daemons = self._power.enter_context(disks.daemons(self._prepared.plan))
        self._engine = engine = make_engine(self._prepared.plan)
        self._power.callback(engine.stop)
        try:
            engine.start()
        except HelperError:
            for share in shares:
                share.check()  # if a daemon has ended, that is the reason
            raise
        for daemon in self._daemons.values():
            daemon.wait_up()
        self._mark("start")
        self._client = AgentClient(engine.agent, explain=lambda error: self._explain(engine, error))
        self._power.callback(self._client.close)

    def _serve(self, wanted: Sequence[Served]) -> list[Share]:
        from .host.shares import share

        shares = []
        for one in wanted:
            shares.append(share(self._runtime.path, one, memory=self.spec.memory))
            self._power.callback(shares[-1].stop)
        return shares

    def _mark(self, what: str) -> None:
        self.timings[what] = time.monotonic() - self._begun

    def wait_ready(self, timeout: float | None = None) -> None:
        """Until commands can run: the agent is there and has set up the root.

        ``BootError`` names the step that failed and carries the console's last lines.
        """
        with self._lock:
            if self._hello is not None:
                return
            client, prepared = self._running()
            limit = BOOT_SECONDS[prepared.plan.accel] if timeout is None else timeout
            try:
                hello = client.wait_hello(limit)
                self._mark("boot")
                prepared.heard(client.setup(prepared.steps))
            except AgentError as error:
                tail = self.console.tail(CONSOLE_LINES)
                raise BootError(f"the guest could not be set up: {error}", console=tail) from None
            except MachineTimeout:
                raise self._silence(limit) from None
            self._mark("ready")
            self._hello = hello

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the machine; idempotent. With a writable disk the guest has ``timeout`` to shut down."""
        if self._process != os.getpid():
            return  # a forked child leaves its ``with``; none of our threads is in it
        with self._lock:
            if self._engine is not None and self._ending is None:
                if self._hello and any(drive.keeps_writes for drive in self.plan.disks):
                    self._shut_down(timeout)
                self._ending = self._engine.wait(0) or Ending("stopped")
            self._undo.close()

    def _shut_down(self, timeout: float) -> None:
        client, _ = self._running()
        with contextlib.suppress(HostelError):  # it is going down already
            client.shutdown()
        self._driven().wait(timeout)

    def _restart(self) -> None:
        """The guest rebooted: power on anew. Commands wait; those that ran have ended."""
        with self._lock:
            if self._ending is not None:
                return
            self._hello = None
            self.restarts += 1
            self._begun = time.monotonic()
            try:
                self._power.close()
                self._power_on()
            except HostelError as error:
                self._ending = Ending("error", str(error))

    def __enter__(self) -> Machine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def resize_disk(self, index: int, size: int) -> None:
        """Disk ``index`` of the spec has ``size`` bytes from now on, and the guest sees it. What lay behind a
        smaller size is lost. A block device has the size that the host gave it: that is the one to name."""
        from . import disks

        with self._lock:
            disks.resize(self.plan, self._driven(), self._daemons, index, size)

    # -- commands --------------------------------------------------------------------------------

    def popen(
        self,
        argv: Sequence[Word],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Word | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: int | bool | None = True,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> GuestProcess:
        """Start a command and return at once.

        ``stdin``: True to feed it with ``write``, a host file descriptor to pass on, None or False for
        nothing. ``stdout``, ``stderr``: host file descriptors, or None to ``read``. ``tty``: rows and
        columns. The user is the caller where the root is the host's, else root. ``env`` is added to what a
        login gives: PATH, HOME, USER, LOGNAME and SHELL.
        """
        from .guest.client import Tty, check_argv, check_env

        check_argv(argv)  # before a boot, should it be the first
        self._running()
        self.wait_ready()
        client, _ = self._running()
        return client.spawn(
            argv,
            env={"PATH": PATH, **check_env(env)},
            cwd=cwd or self._directory(),
            user=user or self._user(),
            tty=Tty(*tty) if tty else None,
            stdin=False if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            login_env=True,
        )

    def exec(
        self,
        argv: Sequence[Word],
        *,
        input: Buffer | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Word | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a command to its end. ``MachineTimeout`` after ``timeout`` seconds. Whatever keeps us from its
        end, Ctrl-C too, kills it."""
        from .guest.client import check_input

        data = check_input(input)
        process = self.popen(argv, env=env, cwd=cwd, user=user, stdin=input is not None)
        try:
            stdout, stderr, status = process.communicate(data, timeout)
        except MachineTimeout:
            process.signal(9)
            raise MachineTimeout(f"{argv[0]} did not end within {timeout:g} s") from None
        except BaseException:
            process.signal(9)
            raise
        if status.error:
            stderr += f"{status.error}\n".encode()
        return Result(status.returncode, stdout, stderr, status.signal)

    def copy_in(self, source: str | os.PathLike[str], target: str) -> None:
        """A file or tree of the host into the guest, with its modes and symbolic links."""
        from .guest.files import copy_in

        self.wait_ready()
        copy_in(self._running()[0], Path(source), target)

    def copy_out(self, source: str, target: str | os.PathLike[str]) -> None:
        """A file or tree of the guest to the host. Nothing is written outside ``target``."""
        from .guest.files import copy_out

        self.wait_ready()
        copy_out(self._running()[0], source, Path(target))

    def balloon(self, size: int | str | None = None) -> Balloon:
        """The guest's memory now. With ``size`` (bytes, or such as ``"256M"``) it is asked to make do with
        that much; it does so in its own time, and not where it cannot."""
        target = Balloon.aim(self.spec, size)
        self.wait_ready()
        return self._driven().balloon(target)

    def set_link(self, nic: int = 0, *, up: bool) -> None:
        """Plug the cable of NIC ``nic`` of the spec in, or pull it: the guest sees its carrier come or go."""
        if not 0 <= nic < len(self.spec.nics):
            raise SpecError(f"the machine has no NIC {nic}")
        self._driven().set_link(nic, up)

    def announce(self) -> None:
        """Have the guest tell its networks where it is now (gratuitous ARP), once it has moved on them."""
        self._driven().announce()

    def vsock_connect(self, port: int) -> socket.socket:
        """A stream to the program that listens on vsock ``port`` of the guest."""
        from .host import vsock

        self.wait_ready()
        return vsock.connect(self._runtime.path, port)

    def vsock_listen(self, port: int) -> socket.socket:
        """A listening socket for the guest's connections to ``port`` of its host (CID 2)."""
        from .host import vsock

        self._running()
        return vsock.listen(self._runtime.path, port)

    # -- what can be seen ------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What is run, or what would be if the machine were started now."""
        if self._prepared is None:
            from . import prepare

            return prepare.prepare(self.spec, Path("/nonexistent")).plan
        return self._prepared.plan

    @property
    def addresses(self) -> tuple[str, ...]:
        """The guest's addresses on its networks, in the order of its NICs; those by DHCP once it is ready."""
        return self._running()[1].addresses()

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as a user may expect, and is no error; known after ``wait_ready``."""
        return self._running()[1].notes()

    @property
    def console(self) -> Console:
        """The serial console: its history, subscribers, and input."""
        if self._engine is None:
            raise MachineStopped("the machine has not been started")
        return self._engine.console

    @property
    def ending(self) -> Ending | None:
        """How the machine ended; None while it runs."""
        if self._ending is None and self._engine is not None:
            self._ending = self._engine.wait(0)
        return self._ending

    def statistics(self) -> dict[str, Any]:
        """A snapshot: the engine's counters, and where the time of the start went (seconds)."""
        counters = {} if self._engine is None else self._engine.statistics()
        guest = {"kernel": self._hello.started, "agent": self._hello.ready} if self._hello else {}
        nics = [] if self._prepared is None else self._prepared.nics()
        return {**counters, "nics": nics, "timings": dict(self.timings), "guest": guest}

    # -- inside ----------------------------------------------------------------------------------

    def _running(self) -> tuple[AgentClient, Preparation]:
        if self._process != os.getpid():
            raise MachineStopped("the machine is of the process that this one was forked from")
        if self._client is None or self._prepared is None:
            raise MachineStopped("the machine has not been started")
        return self._client, self._prepared

    def _driven(self) -> Engine:
        self._running()
        assert self._engine is not None
        return self._engine

    def _explain(self, engine: Engine, error: HostelError) -> HostelError:
        """Why the agent's stream ended, if the engine knows. Called on the reader's thread."""
        ending = engine.wait(ENDING_SECONDS)
        if ending is None:
            return error
        if ending.kind == "reset" and self.spec.on_reboot == "restart":
            threading.Thread(target=self._restart, name="hostel-restart", daemon=True).start()
            return MachineStopped(ENDED["reset"])
        self._ending = ending
        return explain_ending(ending, engine.console)

    def _silence(self, limit: float) -> BootError:
        tail = self.console.tail(CONSOLE_LINES)
        where = "" if tail else "; its kernel printed nothing"
        return BootError(f"no word from the guest's agent in {limit:g} s{where}", console=tail)

    def _user(self) -> Ids:
        from .guest.client import Ids
        from .host.user import caller

        if self.spec.root.kind != "host":
            return Ids(0, 0)
        who = caller()
        return Ids(who.uid, who.gid, who.groups)

    def _directory(self) -> str:
        return os.getcwd() if self.spec.root.kind == "host" else "/"


def run(
    argv: Sequence[Word],
    *,
    input: Buffer | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Word | None = None,
    user: str | None = None,
    timeout: float | None = None,
    **fields: Any,
) -> Result:
    """Run one command in a machine of its own. ``fields`` are those of ``MachineSpec``."""
    from .guest.client import check_argv, check_env, check_input

    check_argv(argv)  # now, not when the machine is there
    check_env(env)
    check_input(input)
    with Machine(**{"on_reboot": "stop", **fields}) as machine:
        return machine.exec(argv, input=input, env=env, cwd=cwd, user=user, timeout=timeout)


def make_engine(plan: Plan) -> Engine:
    """The engine that the plan names, not started."""
    if plan.engine != "qemu":
        from .monitor import Monitor

        return Monitor(plan)
    from .qemu import QemuEngine

    return QemuEngine(plan)
