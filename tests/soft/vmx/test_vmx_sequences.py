"""Random VMX instructions on several pCPUs and VMCSs: ours and a model of the manual's pseudo-code agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostel.soft.exceptions import UD
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.silicon import Controls, Event, Reason, VmExit
from hostel.soft.state import BLOCKED_BY_MOV_SS, CR0_PE, CR4_VMXE, RFLAGS_VM, CpuState
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.results import CpuFault, VmFail, VmxMisuse
from soft.vmx.vmx_model import NONE, WRONG, Model, Outcome, Region
from soft.vmx.vmx_world import GOOD, World, world

CPUS = 2
FRAMES = tuple(4096 * number for number in range(1, 7))
"""What the first allocations give: two VMXON regions, three VMCSs, one whose revision is wrong."""
BAD_FRAME = FRAMES[5]
ADDRESSES = st.sampled_from([*FRAMES, *FRAMES[2:5] * 2, 0x123, 1 << 40, 1 << 39, NONE])
NUMBERS = st.sampled_from([0, 1, 2, 0xFFFF, 0x1_0000, 1 << 31, (1 << 48) - 1, NONE])
SAFE = [Field.TSC_OFFSET, Field.TSC_OFFSET + 1, Field.GUEST_RSP, Field.EXCEPTION_BITMAP]
READ_ONLY = [Field.EXIT_REASON, Field.INSTRUCTION_ERROR, Field.EXIT_QUALIFICATION]
NO_FIELD = [0x0002, 0x0810, 0x2012, 0x4410, 0x6810 + 1, 0x7000]
MISTAKES = [(field, value) for field, value, _ in WRONG]
REPAIRS = [(field, GOOD.get(field, 0)) for field, _, _ in WRONG]
MODES = ("pe", "vm", "l_bit", "cpl", "vmxe", "allowed", "mov_ss")
GOOD_MODES = ("pe", "l_bit", "vmxe", "allowed")


def weighted(*pairs: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return st.one_of([strategy for weight, strategy in pairs for _ in range(weight)])


def step(name: str, *operands: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(name), st.tuples(*operands))


WRITES = st.one_of(
    st.tuples(st.sampled_from([*SAFE, *READ_ONLY, *NO_FIELD]), NUMBERS),
    st.sampled_from(MISTAKES),
    st.sampled_from(REPAIRS),
    st.sampled_from(REPAIRS),
)
STEPS = weighted(
    (2, step("vmxon", ADDRESSES)),
    (1, step("vmxoff")),
    (3, step("vmclear", ADDRESSES)),
    (6, step("vmptrld", ADDRESSES)),
    (1, step("vmptrst")),
    (3, step("vmread", st.sampled_from([*SAFE, *READ_ONLY, *NO_FIELD, Field.GUEST_RIP]))),
    (5, WRITES.map(lambda pair: ("vmwrite", pair))),
    (1, step("vmcall")),
    (
        1,
        step("invept", st.integers(0, 3), st.sampled_from([0, 0x1E, 0x301E, 0x1F, 1 << 45 | 0x1E])),
    ),
    (1, step("invvpid", st.integers(0, 4), NUMBERS, NUMBERS)),
    (6, step("vmlaunch")),
    (6, step("vmresume")),
    (1, step("set", st.sampled_from(MODES), st.booleans())),
)
CPU = st.integers(0, CPUS - 1)
VMCS = st.sampled_from(FRAMES[2:5])


def together(*names: str) -> st.SearchStrategy[Any]:
    """Some instructions in a row on one pCPU and one VMCS: what chance alone would seldom bring about."""

    def fill(cpu: int, vmcs: int) -> list[Any]:
        operands = {"vmptrld": (vmcs,), "vmclear": (vmcs,), "vmxon": (FRAMES[cpu],)}
        return [(cpu, (name, operands.get(name, ()))) for name in names]

    return st.builds(fill, CPU, VMCS)


CHUNKS = weighted(
    (6, st.tuples(CPU, STEPS).map(lambda one: [one])),
    (2, together("vmptrld", "vmlaunch")),
    (1, together("vmptrld", "vmresume")),
    (1, together("vmclear", "vmptrld")),
    (1, together("vmxoff", "vmxon")),
    (1, CPU.map(lambda cpu: [(cpu, ("set", (mode, mode in GOOD_MODES))) for mode in MODES])),
)
SEQUENCES: st.SearchStrategy[list[Any]] = st.lists(CHUNKS, min_size=20, max_size=60).map(
    lambda chunks: list(chain.from_iterable(chunks))
)


def next_instruction(state: CpuState, controls: Controls, event: Event | None) -> VmExit:
    state.rip += 1
    return VmExit(Reason.HLT, length=1)


def prepare(made: World) -> Model:
    """Fill the VMCSs, on both sides, and put each processor into VMX operation with none current."""
    for _ in FRAMES[:5]:
        made.region()
    made.region(revision=0x1234)
    writer = made.cpus[0]
    writer.vmxon(FRAMES[0])
    for vmcs in FRAMES[2:5]:
        writer.vmclear(vmcs)
        writer.vmptrld(vmcs)
        for field, value in GOOD.items():
            writer.vmwrite(field, value)
        writer.vmclear(vmcs)
    writer.vmxoff()
    writer.vmxon(FRAMES[0])
    made.cpus[1].vmxon(FRAMES[1])
    for core in made.cores:
        core.guest = next_instruction
    regions = {frame: Region(fields=dict(GOOD)) for frame in FRAMES}
    regions[BAD_FRAME].revision = 0x1234
    model = Model(CPUS, regions)
    for cpu, frame in zip(model.cpus, FRAMES, strict=False):
        model.vmxon(cpu, frame)
    return model


def set_mode(cpu: PhysicalCpu, what: str, on: bool) -> None:
    state = cpu.state
    if what == "allowed":
        cpu.feature_control = 5 if on else 1
    elif what == "mov_ss":
        state.interruptibility = BLOCKED_BY_MOV_SS if on else 0
    elif what == "cpl":
        state.ss.rights = state.ss.rights & ~0x60 | (3 << 5 if on else 0)
    elif what == "l_bit":
        state.cs.rights = state.cs.rights & ~(1 << 13) | on << 13
    elif what == "pe":
        state.cr0 = state.cr0 & ~CR0_PE | on
    elif what == "vmxe":
        state.cr4 = state.cr4 & ~CR4_VMXE | (CR4_VMXE if on else 0)
    else:
        state.rflags = state.rflags & ~RFLAGS_VM | (RFLAGS_VM if on else 0)


def ours(cpu: PhysicalCpu, name: str, operands: tuple[int, ...]) -> Outcome:
    try:
        value = getattr(cpu, name)(*operands)
    except VmFail as fail:
        return ("fail", None if fail.error is None else int(fail.error))
    except CpuFault as fault:
        return ("#UD",) if fault.vector == UD else ("#GP",)
    except VmxMisuse:
        return ("misuse",)
    if isinstance(value, VmExit):
        return ("exit", int(value.reason), value.qualification)
    return ("ok",) if value is None else ("ok", value)


@contextmanager
def both() -> Iterator[tuple[World, Model]]:
    with world(CPUS) as made:
        yield made, prepare(made)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(SEQUENCES)
def test_random_sequences_end_as_the_manual_has_it(steps: list[Any]) -> None:
    with both() as (made, model):
        for number, (name, operands) in steps:
            cpu, theirs = made.cpus[number], model.cpus[number]
            if name == "set":
                what, on = operands
                set_mode(cpu, what, on)
                setattr(theirs, what, 3 * on if what == "cpl" else on)
                continue
            expected = getattr(model, name)(theirs, *operands)
            assert ours(cpu, name, operands) == expected, (number, name, operands)
            if expected[0] in ("ok", "fail", "exit"):
                assert (cpu.state.rflags & 1, cpu.state.rflags >> 6 & 1) == theirs.flags


def test_the_sequences_reach_what_matters() -> None:
    """A fixed walk through every outcome, so that the random ones are not all of one kind."""
    seen = []
    a, b = FRAMES[2], FRAMES[3]
    walk: list[tuple[int, str, tuple[int, ...]]] = [
        (0, "vmread", (Field.GUEST_RIP,)),
        (0, "vmptrld", (a,)),
        (0, "vmresume", ()),
        (0, "vmlaunch", ()),
        (0, "vmlaunch", ()),
        (0, "vmresume", ()),
        (1, "vmptrld", (a,)),
        (0, "vmwrite", (Field.HOST_CR0, 0)),
        (0, "vmresume", ()),
        (0, "vmwrite", (Field.HOST_CR0, GOOD[Field.HOST_CR0])),
        (0, "vmwrite", (Field.VMCS_LINK_POINTER, 0x123)),
        (0, "vmresume", ()),
        (0, "vmclear", (a,)),
        (1, "vmptrld", (b,)),
        (1, "vmptrld", (BAD_FRAME,)),
        (1, "vmlaunch", ()),
        (1, "vmxoff", ()),
        (1, "vmptrst", ()),
        (1, "vmxon", (FRAMES[1],)),
        (1, "vmptrld", (b,)),
        (1, "vmresume", ()),
    ]
    with both() as (made, model):
        for number, name, operands in walk:
            expected = getattr(model, name)(model.cpus[number], *operands)
            assert ours(made.cpus[number], name, operands) == expected, (number, name, operands)
            seen.append(expected)
    assert seen == [
        ("fail", None),
        ("ok",),
        ("fail", 5),
        ("exit", 12, 0),
        ("fail", 4),
        ("exit", 12, 0),
        ("misuse",),
        ("ok",),
        ("fail", 8),
        ("ok",),
        ("ok",),
        ("exit", 33, 4),
        ("ok",),
        ("ok",),
        ("fail", 11),
        ("exit", 12, 0),
        ("ok",),
        ("#UD",),
        ("ok",),
        ("ok",),
        ("fail", 6),
    ]
