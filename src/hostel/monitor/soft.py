"""What engine ``soft`` has beside its boards, over all power-ons: a recording or a replay, and a trace.

::

    console ──tell──► Inputs ──on_input──► the serial port takes what was typed
    time of day ────► Inputs ──► RTC          instructions ──► PM timer

A recorded machine has no virtio devices: their planes run beside the guest, at the host's times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hostel.errors import SpecError
from hostel.plan import Ending, Plan
from hostel.soft.record import digest, log
from hostel.soft.record.inputs import Inputs, Recorder, Replayer
from hostel.soft.trace import ExitTrace
from hostel.soft.vm import System, Vm
from hostel.spec import MachineSpec, Soft, decode, encode

if TYPE_CHECKING:
    from hostel.console import Console

    from .board import Board


class SoftSide:
    """``replayed`` is told when the log says that the machine was ended from outside here."""

    def __init__(self, plan: Plan, console: Console, replayed: Callable[[Ending], None]) -> None:
        self._how = plan.spec.soft or Soft()
        self._console = console
        self._replayed = replayed
        self._trace = ExitTrace(Path(self._how.trace)) if self._how.trace else None
        self.inputs = self._inputs(plan)
        self._vm: Vm | None = None
        self._places = ""

    def _inputs(self, plan: Plan) -> Inputs | None:
        if self._how.record:
            spec = encode(_told(plan.spec, plan))
            return Recorder(log.Writer(Path(self._how.record), spec), self._console.take)
        if self._how.replay:
            recorded = log.read(Path(self._how.replay))
            _check_same(plan, decode(recorded.spec, format="json"))
            return Replayer(recorded, self._over)
        return None

    def _over(self, end: log.End) -> None:
        self._replayed(_ending(end))

    def ending(self, ending: Ending) -> Ending:
        """What counts, if the machine ends like this. On the thread that ends it."""
        if self.inputs is None:
            return ending
        return _ending(self.inputs.ending(log.End(ending.kind, ending.code, ending.detail, "", ())))

    def system(self) -> System:
        return System(paging=self._how.paging, trap=self._how.trap, inputs=self.inputs)

    def wire(self, board: Board) -> None:
        """Before it has devices."""
        vm = self._vm = _soft(board.vm)
        board.timer = lambda: vm.now
        if self._trace is not None:
            self._trace.watch(vm.host)
        if (inputs := self.inputs) is not None:
            board.take_input = inputs.take
            board.clock = lambda: inputs.clock() / 1e9
            vm.on_input = board.poll_devices

    def tell(self) -> bool:
        """The console has input. Whether it is taken at the guest's time."""
        if self.inputs is None:
            return False
        if self._console.has_input and self._vm is not None:
            self.inputs.tell()
            self._vm.call()
        return True

    def power_on(self, board: Board) -> None:
        """With all in memory that its kernel finds there."""
        vm = _soft(board.vm)
        if self.inputs is not None:
            self.inputs.power_on(digest.of_memory(board.memory), lambda: vm.position)

    def power_off(self, board: Board, ending: Ending) -> None:
        """No vCPU runs any more."""
        vm = _soft(board.vm)
        self._places = "; ".join(f"vCPU {vcpu.id} {vcpu.place}" for vcpu in vm.vcpus)
        if self.inputs is not None:
            vcpus = tuple(digest.of_vcpu(vcpu) for vcpu in board.vcpus)
            memory = digest.of_memory(board.memory)
            self.inputs.power_off(log.End(ending.kind, ending.code, ending.detail, memory, vcpus))

    def told(self, ending: Ending) -> Ending:
        """With where the guest was, for who stopped it and tells of it."""
        if ending.kind != "stopped" or not ending.code:
            return ending
        return msgspec.structs.replace(ending, detail=self._places)

    def close(self) -> None:
        if self.inputs is not None:
            self.inputs.close()
        if self._trace is not None:
            self._trace.close()


def _ending(end: log.End) -> Ending:
    return msgspec.convert({"kind": end.kind, "detail": end.detail, "code": end.code}, Ending)


def _soft(vm: object) -> Vm:
    assert isinstance(vm, Vm), "it was made by ``system``"
    return vm


def _told(spec: MachineSpec, plan: Plan) -> MachineSpec:
    """The machine, wherever and by whatever name it is replayed."""
    how = msgspec.structs.replace(spec.soft or Soft(), record="", replay="", trace="")
    initrd = str(plan.initrd.absolute()) if plan.initrd else ""
    return spec.replace(name="", soft=how, kernel=str(plan.kernel.absolute()), initrd=initrd)


def _check_same(plan: Plan, recorded: MachineSpec) -> None:
    """But for what its memory at power-on tells, and what a guest cannot see."""
    told = _told(plan.spec, plan)
    for field in told.__struct_fields__:
        if field in ("kernel", "initrd", "pin", "hugepages"):
            continue
        if (was := getattr(recorded, field)) != (now := getattr(told, field)):
            raise SpecError(
                f"the log is of a machine with another {field}: {was!r}, not {now!r}",
                cure="hostel boot --replay FILE makes the machine that its log describes",
            )
