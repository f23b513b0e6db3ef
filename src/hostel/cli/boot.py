"""``hostel boot``: any kernel on its raw serial console. No agent, no root of ours.

::

    terminal (raw) ──keys, until Ctrl-]──► console input ──► guest's serial port
    standard output ◄──bytes, as they are── console output ◄──┘

Without a terminal: standard input is passed on, and its end is not the guest's end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Literal, get_args

import msgspec

from hostel.errors import HostelError, UserError
from hostel.plan import Ending, Engine
from hostel.spec import DEFAULT_MEMORY, MachineSpec, Paging, Root, Soft, Trap, decode

from . import network, terminal
from . import options as opt
from .entry import OK, TIMED_OUT, EndedBySignal, hear_one_interrupt
from .line import Line, Verb, option
from .say import say

ESCAPE = b"\x1d"
"""Ctrl-], as in telnet and virsh: no shell and no editor of the guest needs it."""

_CHUNK = 4096
_SOFT = ("paging", "trap", "trace", "record")
_OF_A_REPLAY = ("replay", "trace", "engine", "timeout", "quiet", "verbose", "debug")


OPTIONS = (
    *network.options(),
    *opt.MACHINE,
    option(
        "Machine",
        "--paging",
        choices=get_args(Paging),
        help="Engine soft: how it virtualizes memory. [default: ept]",
    ),
    option(
        "Machine",
        "--trap",
        choices=get_args(Trap),
        help="Engine soft: how sensitive instructions come to it. [default: translate]",
    ),
    option(
        "Machine",
        "--trace",
        metavar="FILE",
        completes="path",
        help="Engine soft: write a line for each VM exit, with its instruction count.",
    ),
    option(
        "Machine",
        "--record",
        metavar="FILE",
        completes="path",
        help="Engine soft: write all that comes to the guest from outside, to be replayed.",
    ),
    option(
        "Machine",
        "--replay",
        metavar="FILE",
        completes="path",
        help="Run a recorded machine again, instruction by instruction, and check that it is the same.",
    ),
    option(
        "Machine",
        "--timeout",
        type=opt.duration,
        metavar="TIME",
        help="End the machine after so long; the exit code is then 124.",
    ),
    *opt.OUTPUT,
)


def boot(line: Line) -> int:
    """Boot any kernel on its raw serial console: bzImage, ELF (64-bit boot protocol or PVH),
    multiboot 1, a boot sector. Ctrl-] ends the machine.

    Exit code: 0 if the guest powers itself off, its own if it writes to the debug exit port, 125 if
    it panics or crashes.
    """
    given = dict(line.values)
    timeout, replay = given.pop("timeout"), given.pop("replay")
    if replay:
        return _replay(replay, line, timeout)
    given["memory"] = DEFAULT_MEMORY if given["memory"] is None else given["memory"]
    given["pin"] = given["pin"] or ()
    net, plane, allow = (given.pop(name) for name in ("net", "net_plane", "allow"))
    given["nics"] = network.nics(net, plane, allow, lambda: None)
    given["publish"] = network.ports(given["publish"])
    soft = {name: value for name in _SOFT if (value := given.pop(name))}
    given["soft"] = Soft(**soft) if soft else None
    spec = MachineSpec(**given, root=Root(kind="none"))
    if soft.get("record"):
        hear_one_interrupt()
    with _started(spec) as engine:
        return _Session(engine).run(timeout)


VERB = Verb("boot", boot, OPTIONS)


def _replay(path: str, line: Line, timeout: float | None) -> int:
    """The machine is the log's own; nothing but that can be asked of it."""
    from pathlib import Path

    from hostel.soft.record import log

    _check_alone(line)
    spec = decode(log.read(Path(path)).spec, format="json")
    how = msgspec.structs.replace(
        spec.soft or Soft(), replay=path, trace=line.values["trace"] or ""
    )
    with _started(spec.replace(soft=how)) as engine:
        session = _Session(engine)
        code = session.run(timeout)
    if session.saw_the_end:
        say.detail(f"the replay of {path} was the same, to the last register")
    return code


def _check_alone(line: Line) -> None:
    """That nothing is said of the machine."""
    for one in OPTIONS:
        fits = one.name in _OF_A_REPLAY and (
            one.name != "engine" or line.values["engine"] == "soft"
        )
        if one.name in line.named and not fits:
            raise UserError(
                "a replay is of the machine that its log describes",
                cure=f"give --replay without {one.names[-1]}",
            )


@contextlib.contextmanager
def _started(spec: MachineSpec) -> Iterator[Engine]:
    from hostel import disks
    from hostel.host import descriptors
    from hostel.host.attaching import attached
    from hostel.host.runtime import Runtime, sweep
    from hostel.machine import make_engine
    from hostel.prepare import prepare_raw

    descriptors.ensure(spec)
    with Runtime(spec.name) as runtime, attached(spec, runtime.path) as networks:
        plan = prepare_raw(spec, runtime.path, networks=networks)
        opt.announce(plan)
        with disks.overlays(plan), disks.daemons(plan) as daemons:
            engine = make_engine(plan)
            try:
                try:
                    engine.start()
                finally:
                    sweep()  # now that the guest runs there is time for what others left
                for daemon in daemons.values():
                    daemon.wait_up()
                yield engine
            finally:
                engine.stop()


class _Session:
    """The caller's streams on a guest's console."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left: Literal["", "escape", "pipe"] = ""
        self.saw_the_end = False
        """The guest's, not the caller's."""

    def run(self, timeout: float | None) -> int:
        interactive = terminal.interactive()
        if interactive:
            say.note("the guest's console; Ctrl-] ends the machine")
        try:
            with terminal.raw() if interactive else contextlib.nullcontext():
                ending = self._watch(timeout, interactive)
        except KeyboardInterrupt:
            self._say_where(128 + signal.SIGINT)
            raise
        except EndedBySignal as error:
            self._say_where(128 + error.number)
            raise
        return self._exit_code(ending)

    def _watch(self, timeout: float | None, interactive: bool) -> Ending:
        cancel = self._engine.console.subscribe(self._show, replay=True)
        threading.Thread(target=self._type, args=(interactive,), daemon=True).start()
        try:
            ending = self._engine.wait(timeout)
            self.saw_the_end = ending is not None
            return ending or self._stop(TIMED_OUT)
        finally:
            cancel()

    def _stop(self, code: int) -> Ending:
        self._engine.stop(code)
        return self._engine.wait(0) or Ending("stopped", code=code)

    def _say_where(self, code: int) -> None:
        if where := self._stop(code).detail:
            say.note(f"the machine was stopped: {where}")

    def _exit_code(self, ending: Ending) -> int:
        self.saw_the_end = self.saw_the_end and not self._left
        if self._left:
            return OK if self._left == "escape" else 128 + signal.SIGPIPE
        if ending.kind == "stopped" and ending.code == TIMED_OUT:
            where = f": {ending.detail}" if ending.detail else ""
            say.fail(f"the machine's time is over (--timeout){where}")
        if ending.kind in ("debug-exit", "stopped"):
            return ending.code & 0xFF
        if ending.kind in ("panic", "crash", "error"):
            from hostel.plan import explain_ending

            error = explain_ending(ending, self._engine.console)
            error.console = ""  # it was on the screen
            raise error
        return OK

    def _show(self, data: bytes) -> None:
        """The guest wrote. Called on the engine's thread."""
        try:
            terminal.write_all(terminal.STDOUT, data)
        except OSError:
            self._leave("pipe")

    def _type(self, interactive: bool) -> None:
        """Standard input, until its end or the escape key."""
        with contextlib.suppress(HostelError, OSError):
            while data := os.read(terminal.STDIN, _CHUNK):
                before, escape, _ = data.partition(ESCAPE) if interactive else (data, b"", b"")
                if before:
                    self._engine.console.write(before)
                if escape:
                    self._leave("escape")
                    return

    def _leave(self, how: Literal["escape", "pipe"]) -> None:
        """Stop the machine, from any thread: the engine may wait for the one that calls us."""
        if not self._left:
            self._left = how
            threading.Thread(target=self._engine.stop, daemon=True).start()
