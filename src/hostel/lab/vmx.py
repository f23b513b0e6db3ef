"""VMX operation, instruction by instruction: a guest from VMXON to VMXOFF, and what wrong use gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from hostel.soft.hypervisor.host import Host
from hostel.soft.silicon import Reason
from hostel.soft.vmx import svm_names
from hostel.soft.vmx.events import Mode, TraceEvent
from hostel.soft.vmx.fields import Field, Kind
from hostel.soft.vmx.results import CpuFault, VmFail

from . import Drawing, Report, Step, Table, none_of
from .draw import Span, timeline
from .stage import Actor, Stage

QUESTION = (
    "What does a processor do to run a guest? A small kernel of ours says a word and halts; every VMX "
    "instruction of the hypervisor and every VM exit is written down. Then the same instructions are used "
    "wrongly, to see what the processor answers."
)
GUEST = "hello"
_KINDS = {
    Kind.CONTROL: "control",
    Kind.EXIT: "exit information",
    Kind.GUEST: "guest state",
    Kind.HOST: "host state",
}
_WORDS = {
    "VMXON": "VMX operation begins; the region at {0:#x} is the processor's own",
    "VMXOFF": "VMX operation ends",
    "VMCLEAR": "the VMCS at {0:#x} is written to memory, its launch state is clear: it is on no pCPU",
    "VMPTRLD": "the VMCS at {0:#x} is current on this pCPU: vCPU and pCPU are bound",
    "VMLAUNCH": "VM entry: the guest's state is loaded; launch state launched",
    "VMRESUME": "VM entry again",
    "RDMSR": "capability MSR {0:#x}: which bits of these controls must be 1",
    "INVEPT": "translations of an EPT are forgotten",
    "INVVPID": "translations of a VPID are forgotten",
}


def tell(events: Sequence[TraceEvent]) -> Iterator[Step]:
    """The trace in words; runs of VMREAD and VMWRITE are one line."""
    at = 0
    while at < len(events):
        event = events[at]
        if event.what in ("VMREAD", "VMWRITE"):
            run = _run(events, at)
            yield Step(f"pCPU {event.pcpu}", _fields(run), event.time)
            at += len(run)
            continue
        yield Step(f"pCPU {event.pcpu}", _words(event), event.time)
        at += 1


def _run(events: Sequence[TraceEvent], start: int) -> list[TraceEvent]:
    """From ``start`` on, as long as it is the same instruction on the same pCPU."""
    first, run = events[start], []
    for event in events[start:]:
        if (event.what, event.pcpu) != (first.what, first.pcpu):
            break
        run.append(event)
    return run


def _fields(run: Sequence[TraceEvent]) -> str:
    name, values = run[0].what, [(Field(event.operands[0]), event) for event in run]
    if len(run) <= 3:
        shown = (
            f"{field.name}{f' = {event.operands[1]:#x}' if len(event.operands) > 1 else ''}"
            for field, event in values
        )
        return f"{name}: {', '.join(shown)}"
    kinds = Counter(_KINDS[Kind(field >> 10 & 3)] for field, _ in values)
    parts = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    return f"{name} × {len(run)}: {parts}"


def _words(event: TraceEvent) -> str:
    if event.what != "VM exit":
        words = _WORDS.get(event.what, "").format(*event.operands)
        result = f" → {event.result}" if event.result.startswith("VMfail") else ""
        return f"{event.what}: {words}{result}" if words else f"{event.what}{result}"
    reason, qualification = event.operands
    return f"VM exit: {Reason(reason).name} (reason {reason}){_qualified(Reason(reason), qualification)}"


def _qualified(reason: Reason, value: int) -> str:
    """SDM vol. 3C §27.2.1, tables 27-3, 27-5, 27-7."""
    if reason is Reason.IO:
        direction = "IN from" if value & 8 else "OUT to"
        return f": {direction} port {value >> 16:#x}, {(value & 7) + 1} bytes"
    if reason is Reason.CR_ACCESS:
        kind = ("MOV to CR", "MOV from CR", "CLTS, CR", "LMSW, CR")[value >> 4 & 3]
        return f": {kind}{value & 15}"
    if reason is Reason.EPT_VIOLATION:
        kinds = [name for bit, name in enumerate(("read", "write", "fetch")) if value >> bit & 1]
        return f": a {' and '.join(kinds)} that the EPT does not map"
    return ""


def modes(events: Sequence[TraceEvent]) -> dict[str, list[Span]]:
    """Who has each pCPU when: the hypervisor (R, root mode) or a guest (g, non-root mode)."""
    lanes: dict[str, list[Span]] = {}
    since: dict[int, int] = {}
    for event in events:
        lane = lanes.setdefault(f"pCPU {event.pcpu}", [])
        entry = event.what in ("VMLAUNCH", "VMRESUME") and not event.result.startswith("VMfail")
        if entry or event.what == "VM exit":
            mark = "g" if event.what == "VM exit" else "R"
            lane.append(Span(since.get(event.pcpu, 0), event.time, mark))
            since[event.pcpu] = event.time
    return lanes


def _play() -> tuple[Actor, list[TraceEvent]]:
    with Stage(traced=True) as stage:
        actor = stage.actor(GUEST)
        actor.play()
        for vcpu in actor.vcpus:
            vcpu.unload()
        pcpu = stage.host.pcpus[0]
        region = pcpu.vmxon_pointer
        pcpu.vmxoff()
        events = list(stage.trace)
        pcpu.trace = None
        assert region is not None
        pcpu.vmxon(region)  # the host closes what is open
    return actor, events


def _wrong_use() -> Iterator[tuple[str, str, str]]:
    """Each mistake on a processor of its own: what was done, what it answered, the manual's section."""
    for what, section, mistake in _MISTAKES:
        with Host() as host:
            try:
                mistake(host)
            except (VmFail, CpuFault) as error:
                yield what, str(error).partition(": ")[2], section
            else:
                yield what, "nothing", section


def _without_vmcs(host: Host) -> None:
    host.pcpus[0].vmlaunch()


def _read_without_vmcs(host: Host) -> None:
    host.pcpus[0].vmread(Field.GUEST_RIP)


def _loaded(host: Host) -> None:
    pcpu, vmcs = host.pcpus[0], host.make_vmcs()
    pcpu.vmclear(vmcs)
    pcpu.vmptrld(vmcs)


def _resume_clear(host: Host) -> None:
    _loaded(host)
    host.pcpus[0].vmresume()


def _launch_empty(host: Host) -> None:
    _loaded(host)
    host.pcpus[0].vmlaunch()


def _unknown_field(host: Host) -> None:
    _loaded(host)
    host.pcpus[0].vmread(0x7FFE)


def _write_exit_reason(host: Host) -> None:
    _loaded(host)
    host.pcpus[0].vmwrite(Field.EXIT_REASON, 0)


def _load_vmxon_region(host: Host) -> None:
    pcpu = host.pcpus[0]
    assert pcpu.vmxon_pointer is not None
    pcpu.vmptrld(pcpu.vmxon_pointer)


def _wrong_revision(host: Host) -> None:
    host.pcpus[0].vmptrld(host.physical.allocate())


def _vmxon_again(host: Host) -> None:
    pcpu = host.pcpus[0]
    assert pcpu.vmxon_pointer is not None
    pcpu.vmxon(pcpu.vmxon_pointer)


_MISTAKES: tuple[tuple[str, str, Callable[[Host], None]], ...] = (
    ("VMLAUNCH with no current VMCS", "§30.3 VMLAUNCH", _without_vmcs),
    ("VMREAD with no current VMCS", "§30.3 VMREAD", _read_without_vmcs),
    ("VMRESUME of a VMCS that is clear", "§30.3 VMRESUME", _resume_clear),
    ("VMLAUNCH of a VMCS with nothing in it", "§26.2.1", _launch_empty),
    ("VMREAD of a field that is not there", "§30.3 VMREAD", _unknown_field),
    ("VMWRITE of the exit reason", "§30.3 VMWRITE", _write_exit_reason),
    ("VMPTRLD of the VMXON region", "§30.3 VMPTRLD", _load_vmxon_region),
    ("VMPTRLD of a frame with another revision", "§30.3 VMPTRLD", _wrong_revision),
    ("VMXON in VMX operation", "§30.3 VMXON", _vmxon_again),
)


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("vmx", arguments)
    actor, events = _play()
    exits = Counter(Reason(event.operands[0]).name for event in events if event.what == "VM exit")
    instructions = Counter(event.what for event in events if event.what != "VM exit")
    root = sum(1 for event in events if event.mode is Mode.ROOT)
    entries = instructions["VMLAUNCH"] + instructions["VMRESUME"]
    return Report(
        lab="vmx",
        question=QUESTION,
        steps=tuple(tell(events)),
        drawings=(
            Drawing("Time, R root mode, g guest", tuple(timeline(modes(events)))),
            Drawing("What the guest said", tuple(actor.words.splitlines())),
        ),
        tables=(
            Table(
                "VM exits",
                ("reason", "number", "count", "on AMD"),
                tuple(
                    (name, int(Reason[name]), count, svm_names.EXITS[Reason[name]].name)
                    for name, count in exits.most_common()
                ),
            ),
            Table("VMX instructions of the hypervisor", ("instruction", "count"),
                  tuple(instructions.most_common())),
            Table("The same under another name", ("VMX (Intel)", "SVM (AMD)", "but"),
                  svm_names.TERMS + svm_names.INSTRUCTIONS),
            Table("Wrong use", ("what", "the processor's answer", "SDM vol. 3C"), tuple(_wrong_use())),
        ),
        conclusions=(
            f"{entries} VM entries ({instructions['VMLAUNCH']} VMLAUNCH, {instructions['VMRESUME']} "
            f"VMRESUME) and {exits.total()} exits: between them the guest had the processor for itself.",
            f"{root} VMX instructions in root mode for them: a VM exit costs what is done about it.",
        ),
        page="docs/vmx.md",
    )  # fmt: skip
