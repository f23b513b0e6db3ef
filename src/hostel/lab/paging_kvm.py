"""What a KVM did with the workloads of the lab ``paging``: measured here, kept in a file, read from one.

One host shows one kind of paging at a time, and which is root's choice when the module is loaded. So a
measurement says where it comes from, and a file of it can stand beside another host's.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from hostel.errors import HostError, UserError

from . import hardware, reasons
from .workloads import WORKLOADS, Cost, Workload

LARGEST = 1 << 20
"""Bytes of a file that could be one of ours."""

Word = Annotated[str, msgspec.Meta(pattern=r"\A[ -~]{1,100}\Z")]
"""It comes from a file, and goes to a terminal."""


class Measured(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag_field="hostel",
    tag="lab paging: KVM",
):
    """By one KVM on one day; also the file's format."""

    paging: Literal["shadow", "nested"]
    host: Word
    processor: Word
    kernel: Word
    module: Word
    """And how it was told to use this kind of paging."""
    date: Word
    parameters: dict[Word, dict[Word, int]]
    """Of each workload, so that equals are compared."""
    costs: tuple[Cost, ...]


def measure(chosen: Sequence[Workload]) -> Measured:
    """On this host. ``HostError`` where there is no KVM."""
    if missing := hardware.missing():
        raise HostError(f"no KVM to measure: {missing}")
    return Measured(
        paging="nested" if hardware.paging() == "nested" else "shadow",
        host=_word(platform.node()),
        processor=_word(_processor()),
        kernel=_word(f"{platform.system()} {platform.release()}"),
        module=_module(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        parameters={one.guest: one.parameters for one in chosen},
        costs=tuple(map(_cost, chosen)),
    )


def _word(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)[:100] or "unknown"


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _module() -> str:
    name = hardware.module()
    if name not in reasons.MODULES:
        return name
    return f"{name} {reasons.MODULES[name]}={int(hardware.paging() == 'nested')}"


def _cost(workload: Workload) -> Cost:
    run = hardware.play(workload.guest, **workload.parameters)
    traced, vcpu, module = run.traced, run.vcpu, hardware.module()
    fills = vcpu.get("pf_fixed") if module in reasons.MODULES else None
    if traced is None:
        return Cost(
            workload.guest,
            reasons.of_statistics(vcpu, run.port_io, module, hardware.paging()),
            exact=False,
            fills=fills,
        )
    return Cost(
        workload.guest,
        traced.reasons,
        fills=fills,
        syncs=traced.syncs,
        tables=traced.frames * 4,
    )


# --- Files ---


def encode(measured: Measured) -> bytes:
    return msgspec.json.format(msgspec.json.encode(measured)) + b"\n"


def save(measured: Measured, path: Path) -> None:
    try:
        path.write_bytes(encode(measured))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load(path: Path) -> Measured:
    """``UserError`` for what is no such file, or was measured with other workloads than ours."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        measured = msgspec.json.decode(data, type=Measured)
        _check(measured)
    except ValueError as error:  # msgspec's are ValueErrors
        raise UserError(
            f"{path} is no measurement of this lab's: {error}",
            cure="make one with: hostel lab paging --save FILE",
        ) from error
    return measured


def _check(measured: Measured) -> None:
    ours = {one.guest: one.parameters for one in WORKLOADS}
    for cost in measured.costs:
        theirs = measured.parameters.get(cost.workload)
        if theirs is None or ours.get(cost.workload) != theirs:
            raise ValueError(f"its workload {cost.workload[:20]!r} is not the one of this version")
        if strange := set(cost.exits) - set(reasons.NAMES):
            raise ValueError(f"it has exits for {min(strange)[:20]!r}")
