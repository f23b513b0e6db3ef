"""``hostel run``: a command in a fresh machine, as if it ran here.

::

    options ──> MachineSpec ──> Machine: start, wait_ready ──> popen ──> wait ──> exit code
                   └─ --dry-run: the plan, shown

Standard output carries the guest's bytes only; the client of the agent pumps the three streams. What
hostel says goes to standard error (``say.py``).
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from hostel.errors import HostelError, HostError, MachineTimeout, UserError
from hostel.spec import DEFAULT_MEMORY, Disk, MachineSpec, Nic, Publish, Root, Volume

from . import network, terminal
from . import options as opt
from .entry import EndedBySignal, failure
from .line import Line, Verb, option
from .say import say

if TYPE_CHECKING:
    from hostel.guest.client import ExitStatus, GuestProcess
    from hostel.machine import Machine
    from hostel.plan import Plan

    from .signals import Signals

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_TIMEOUT = "10"
HELP = "see `hostel run --help`"
SHOW_BOOT = "loglevel=7"
"""Undoes the ``quiet`` of a machine that nobody watches: the last word counts."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    command: tuple[str, ...]
    engine: str
    cpus: int
    memory: int | None
    kernel: str
    initrd: str
    append: str
    disks: tuple[Disk, ...]
    pin: tuple[int, ...] | None
    hugepages: bool
    balloon: bool
    vsock: str
    transport: str
    net: tuple[Nic | None, ...]
    net_plane: str
    publish: tuple[tuple[Publish, ...], ...]
    allow: tuple[str, ...]
    root: str
    volumes: tuple[Volume, ...]
    tmpfs: tuple[str, ...]
    read_only: bool
    env: tuple[str, ...]
    env_file: tuple[str, ...]
    workdir: str
    user: str
    hostname: str | None
    name: str
    tty: bool | None
    stdin: bool
    timeout: float | None
    stop_timeout: float
    console: bool
    as_json: bool
    dry_run: bool
    rm: bool


OPTIONS = (
    option(
        "Command",
        "-e",
        "--env",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Set a variable; a bare NAME copies the host's.",
    ),
    option("Command", "--env-file", multiple=True, metavar="FILE", help="Variables, one a line."),
    option(
        "Command",
        "-w",
        "--workdir",
        default="",
        metavar="DIR",
        help="Where CMD starts. [default: this directory if the root is the host's, else /]",
    ),
    option(
        "Command",
        "-u",
        "--user",
        default="",
        metavar="USER[:GROUP]",
        help="Who runs CMD: names or numbers. [default: you]",
    ),
    option(
        "Command",
        "-t",
        "--tty",
        flag=True,
        off=("-T", "--no-tty"),
        default=None,
        help="A terminal for CMD; Ctrl-C three times within a second ends the machine. [default: if "
        "input and output are terminals]",
    ),
    option(
        "Command",
        "-i",
        "--interactive",
        name="stdin",
        flag=True,
        off=("--no-stdin",),
        default=True,
        help="Pass standard input on. [default: yes]",
    ),
    option(
        "Command",
        "--timeout",
        type=opt.duration,
        metavar="TIME",
        help="End CMD after so long, such as 90, 1.5 or 2m; the exit code is then 124.",
    ),
    option(
        "Command",
        "--stop-timeout",
        type=opt.duration,
        default=STOP_TIMEOUT,
        metavar="TIME",
        help="How long CMD may take to end when told to. [default: 10]",
    ),
    option(
        "Files",
        "--root",
        default="host",
        metavar="host|PATH[,server=…]",
        completes="path",
        help="The root: this host's, a directory or a disk image, under a layer of its own.",
    ),
    option(
        "Files",
        "-v",
        "--volume",
        name="volumes",
        type=opt.volume,
        multiple=True,
        metavar="HOST:GUEST[:ro][,…]",
        help="A file or directory of the host, shared. More words: cache=, owner=UID:GID, server= "
        "(docs/files.md).",
    ),
    option(
        "Files", "--tmpfs", multiple=True, metavar="DIR", help="An empty file system in memory."
    ),
    option("Files", "--read-only", flag=True, help="The root cannot be written."),
    *network.options(default="nat; without root, user"),
    *opt.MACHINE,
    option("Machine", "--name", default="", metavar="NAME", help="The machine's name."),
    option("Machine", "-H", "--hostname", type=opt.hostname, metavar="NAME", help="Its host name."),
    option("Machine", "--rm", flag=True, help="Remove it at its end: what always happens."),
    option("Output", "--console", flag=True, help="Show the guest's console, on standard error."),
    option(
        "Output",
        "--json",
        name="as_json",
        flag=True,
        help="What was run and how long it took, as the last line of standard error.",
    ),
    option("Output", "--dry-run", flag=True, help="Show what would be started."),
    *opt.OUTPUT,
)


def run(line: Line) -> int:
    """Run CMD in a fresh virtual machine and exit with its exit code.

    The machine's root is a view of this host's: what CMD writes is gone at the end. CMD runs as you, in
    this directory. Without CMD, on a terminal: a shell.
    """
    options = Options(**line.values)
    spec = machine_spec(options)
    if options.dry_run:
        return _dry_run(spec, options.as_json)
    return _Run(options, spec).run()


VERB = Verb("run", run, OPTIONS, command="[--] [CMD [ARG…]]")


def machine_spec(options: Options) -> MachineSpec:
    """The machine of the command line."""
    return MachineSpec(
        name=options.name,
        engine=options.engine,  # type: ignore[arg-type]  # the choice has been checked
        cpus=options.cpus,
        pin=options.pin or (),
        memory=DEFAULT_MEMORY if options.memory is None else options.memory,
        hugepages=options.hugepages,
        balloon=options.balloon,
        vsock=options.vsock,  # type: ignore[arg-type]
        kernel=options.kernel,
        initrd=options.initrd,
        append=f"{options.append} {SHOW_BOOT}" if options.console else options.append,
        transport=options.transport,  # type: ignore[arg-type]
        root=_root(options.root),
        read_only=options.read_only,
        disks=options.disks,
        nics=network.nics(options.net, options.net_plane, options.allow, _default_nic),
        publish=network.ports(options.publish),
        volumes=options.volumes,
        tmpfs=options.tmpfs,
        hostname=options.hostname or "",
        on_reboot="stop",
    )


def _default_nic() -> Nic | None:
    from hostel.host.reach import default_nic

    nic, reason = default_nic()
    say.detail(f"network {nic.mode if nic else network.NONE}: {reason}")
    return nic


def _root(given: str) -> Root:
    text, server = opt.root(given)
    if text == "host":
        return Root(server=server)
    path = os.path.abspath(text)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(
            f"root {text}: {error.strerror}", cure="give host, a directory or a disk image"
        ) from None
    kind: Literal["directory", "image"] = "directory" if stat.S_ISDIR(mode) else "image"
    return Root(kind=kind, path=path, server=server)


def _dry_run(spec: MachineSpec, as_json: bool) -> int:
    from hostel.machine import Machine

    plan = Machine(spec).plan
    rows = _rows(plan)
    if as_json:
        import json

        print(json.dumps(rows))
    else:
        for name, value in rows.items():
            print(f"{name:<9} {'; '.join(value) if isinstance(value, list) else value}")
    return 0


def _tell_what_failed(machine: Machine) -> None:
    """What the guest saw as I/O errors, or as requests without an answer; also when its command timed out."""
    from hostel import disks

    for line in (*disks.full(machine.plan), *machine.statistics().get("faults", ())):
        say.note(line)


class _Run:
    """One run, from the machine's start to its end."""

    def __init__(self, options: Options, spec: MachineSpec) -> None:
        self._options = options
        self._spec = spec
        self._tty = terminal.interactive() if options.tty is None else options.tty
        self._argv = self._command()
        self._env = self._environment()
        self._cwd = self._directory()

    def run(self) -> int:
        try:
            return self._run()
        except HostelError as error:
            if not self._options.as_json:
                raise
            code = failure(error)
            terminal.write_json({"error": str(error), "exit_code": code})
            return code

    def _run(self) -> int:
        from .signals import Signals

        signals = Signals(timeout=self._options.timeout, stop_timeout=self._options.stop_timeout)
        with signals, contextlib.ExitStack() as stack:
            machine = self._start(stack)
            stack.callback(_tell_what_failed, machine)
            self._boot(machine)
            status, seconds = self._execute(machine, signals)
            signals.ending()
        if status.error:
            say.fail(status.error)
        self._report(machine, status.returncode, seconds)
        return status.returncode

    def _start(self, stack: contextlib.ExitStack) -> Machine:
        """A network that nobody asked for is no reason to fail."""
        from hostel.machine import Machine

        options, spec = self._options, self._spec
        try:
            return stack.enter_context(Machine(spec))
        except HostError as error:
            if not spec.nics or options.net or options.publish or options.allow:
                raise
            machine = stack.enter_context(Machine(spec.replace(nics=())))
            say.note(f"no network: {error}")  # if it was something else, that has been raised again
            return machine

    def _boot(self, machine: Machine) -> None:
        """Until the guest can run commands; what runs it is said first, should it fail."""
        opt.announce(machine.plan)
        if self._options.console:
            machine.console.subscribe(_to_stderr, replay=True)
        say.progress(f"hostel: booting Linux {machine.plan.release} …")
        try:
            machine.wait_ready()
        finally:
            say.progress("")
        for note in machine.notes:
            say.note(note)

    def _execute(self, machine: Machine, signals: Signals) -> tuple[ExitStatus, float]:
        begun = time.monotonic()
        with terminal.raw() if self._tty else contextlib.nullcontext():
            process = machine.popen(
                self._argv,
                env=self._env,
                cwd=self._cwd,
                user=self._options.user or None,
                tty=terminal.size() if self._tty else None,
                stdin=self._options.stdin,
                stdout=terminal.STDOUT,
                stderr=terminal.STDERR,
            )
            signals.running(process)
            if self._options.stdin:
                raw = self._tty and os.isatty(terminal.STDIN)
                process.pump_input(terminal.STDIN, signals.keys if raw else None)
            status = self._wait(process, signals)
        return status, time.monotonic() - begun

    def _wait(self, process: GuestProcess, signals: Signals) -> ExitStatus:
        try:
            status = process.wait()
        except EndedBySignal:
            if not signals.timed_out:
                raise
        if signals.timed_out:
            limit = self._options.timeout
            raise MachineTimeout(f"{self._argv[0]} did not end within {limit:g} s (--timeout)")
        return status

    def _report(self, machine: Machine, code: int, seconds: float) -> None:
        timings = {**_steps(machine.timings), "command": seconds}
        words = ", ".join(f"{name} {value:.2f} s" for name, value in timings.items())
        say.detail(f"exit code {code}; {words}")
        if self._options.as_json:
            record = {**_rows(machine.plan), "addresses": machine.addresses}
            terminal.write_json({**record, "exit_code": code, "timings": timings})

    def _command(self) -> list[str]:
        if self._options.command:
            if not self._options.command[0]:
                raise UserError("an empty command", cure=HELP)
            return list(self._options.command)
        if not (self._tty and terminal.interactive()):
            raise UserError("no command, and no terminal for a shell", cure=HELP)
        from hostel.host.user import caller

        return [caller().shell if self._host_root else "/bin/sh"]

    @property
    def _host_root(self) -> bool:
        return self._spec.root.kind == "host"

    def _environment(self) -> dict[str, str]:
        """Nothing of the host's but what is asked for, and the caller's own account. For any other user
        the agent adds HOME, USER, LOGNAME and SHELL: it knows the guest's accounts."""
        from hostel.host.user import caller

        own = self._host_root and not self._options.user
        env = {"PATH": PATH, **(caller().environment() if own else {})}
        if self._tty:
            env["TERM"] = os.environ.get("TERM", "linux")
        return env | opt.environment(self._options.env, self._options.env_file, os.environ)

    def _directory(self) -> str | None:
        if self._options.workdir:
            if not self._options.workdir.startswith("/"):
                raise UserError(f"--workdir must be absolute, not {self._options.workdir!r}")
            return self._options.workdir
        if not self._host_root:
            return None
        try:
            return os.getcwd()
        except OSError as error:
            raise UserError(
                f"your directory is gone: {error.strerror}", cure="give --workdir"
            ) from None


def _steps(timings: Mapping[str, float]) -> dict[str, float]:
    """How long each step of the start took; a machine counts from its beginning."""
    names = {"prepare": "prepare", "start": "start", "boot": "boot", "ready": "setup"}
    ends = [0.0, *(timings[name] for name in names)]
    return {
        name: round(end - begun, 6)
        for name, begun, end in zip(names.values(), ends, ends[1:], strict=False)
    }


def _rows(plan: Plan) -> dict[str, Any]:
    """A plan for people and programs."""
    vsock = {"vsock": plan.vsock.plane} if plan.vsock else {}
    return {
        "engine": plan.engine,
        "reason": plan.reason,
        "kernel": str(plan.kernel),
        "release": plan.release,
        "cpus": plan.spec.cpus,
        "memory": plan.spec.memory,
        **({"balloon": "on"} if plan.balloon else {}),
        "cmdline": plan.cmdline,
        **({"disks": [drive.summary for drive in plan.disks]} if plan.disks else {}),
        "network": [nic.summary for nic in plan.nics] or [network.NONE],
        **vsock,
    }


def _to_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):
        terminal.write_all(terminal.STDERR, data)
