"""The kernel's command line: what hostel adds for its own machines, and why.

What a caller appends comes last, and with Linux the last word on a parameter counts. Each default
makes a boot cheaper or its end clear; none takes anything from the guest that it could use here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from hostel.errors import SpecError

Purpose = Literal["run", "boot"]
Accelerator = Literal["kvm", "tcg"]


class Default(msgspec.Struct, frozen=True):
    text: str
    reason: str


ALWAYS = (
    Default("panic=-1", "a panic restarts the machine at once: for us, that is how it ends"),
    Default(
        "cryptomgr.notests",
        "the self-tests of the crypto algorithms are 60 % of a boot's instructions",
    ),
)

OWN_HARDWARE = (
    Default(
        "pci=noearly",
        "functions are found through ECAM; the early scan by ports 0xcf8/0xcfc is 76 exits for nothing",
    ),
    Default("pmtmr=0", "kvm-clock is the clock: checking the ACPI timer is 20 exits for nothing"),
    Default(
        "8250.nr_uarts=1", "there is one serial port: probing three more is 18 exits for nothing"
    ),
)
"""For our own monitor: what its hardware does not have, or makes superfluous."""

EMULATED = (
    Default("mitigations=off", "an emulated CPU does not speculate, but pays for each mitigation"),
    Default("no_timer_check", "the check of the timer's interrupt waits for ticks that come late"),
    Default(
        "tsc=reliable", "the TSC is emulated, the same for all; its watchdog is deceived by load"
    ),
)
"""For QEMU's TCG."""

UNSEEN = (
    Default(
        "quiet", "each line on a serial console is an exit a byte; errors and panics still show"
    ),
)
"""Where nobody looks at the console unless something fails."""


def defaults(purpose: Purpose, *, engine: str, accel: Accelerator = "kvm") -> tuple[Default, ...]:
    return (
        *ALWAYS,
        *(OWN_HARDWARE if engine != "qemu" else ()),
        *(EMULATED if accel == "tcg" else ()),
        *(UNSEEN if purpose == "run" else ()),
    )


def build(
    purpose: Purpose,
    *,
    engine: str,
    accel: Accelerator = "kvm",
    consoles: Sequence[str] = ("ttyS0",),
    arguments: Sequence[str] = (),
    append: str = "",
) -> str:
    """One line: consoles (the last becomes ``/dev/console``), defaults, arguments, what the caller says.

    Its length is checked where the kernel is known, by ``load_kernel``.
    """
    parts = [f"console={console}" for console in consoles]
    parts += [default.text for default in defaults(purpose, engine=engine, accel=accel)]
    parts += [*arguments, append.strip()]
    line = " ".join(part for part in parts if part)
    if not line.isprintable():
        raise SpecError(f"the kernel's command line must be one printable line, not {line!r}")
    return line
