"""The command line: what is on it, in which order, and what may not be."""

from __future__ import annotations

import pytest

from hostel.boot import cmdline
from hostel.errors import SpecError

EVERY = (*cmdline.ALWAYS, *cmdline.OWN_HARDWARE, *cmdline.EMULATED, *cmdline.UNSEEN)


def test_every_default_has_a_reason_and_stands_once() -> None:
    assert all(len(default.reason) > 20 for default in EVERY)
    assert len({default.text for default in EVERY}) == len(EVERY)


def test_the_caller_has_the_last_word() -> None:
    line = cmdline.build(
        "run",
        engine="kvm",
        consoles=("ttyS0", "hvc0"),
        arguments=("rdinit=/init",),
        append=" panic=0 ",
    )
    words = line.split(" ")
    assert words[:2] == ["console=ttyS0", "console=hvc0"]
    assert words[-2:] == ["rdinit=/init", "panic=0"]
    assert words.index("panic=-1") < words.index("panic=0")
    assert "" not in words


@pytest.mark.parametrize(
    ("purpose", "engine", "accel", "has", "has_not"),
    [
        ("run", "kvm", "kvm", {"quiet", "8250.nr_uarts=1"}, {"mitigations=off", "tsc=reliable"}),
        ("boot", "kvm", "kvm", {"panic=-1"}, {"quiet"}),
        ("run", "qemu", "tcg", {"mitigations=off", "quiet"}, {"8250.nr_uarts=1", "pmtmr=0"}),
        ("run", "qemu", "kvm", {"quiet"}, {"mitigations=off", "pci=noearly"}),
    ],
)
def test_purpose_and_hardware(
    purpose: cmdline.Purpose,
    engine: str,
    accel: cmdline.Accelerator,
    has: set[str],
    has_not: set[str],
) -> None:
    words = set(cmdline.build(purpose, engine=engine, accel=accel).split())
    assert has <= words
    assert not has_not & words


@pytest.mark.parametrize("append", ["a\nb", "a\0b", "\x1b[2J"])
def test_one_printable_line(append: str) -> None:
    with pytest.raises(SpecError, match="one printable line"):
        cmdline.build("run", engine="kvm", append=append)
