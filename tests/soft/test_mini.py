"""Mini guests on the host's own KVM: each says what its table says; how images are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.errors import MissingTool, SpecError
from hostel.soft import mini
from hostel.soft.mini import build
from soft.mini_rig import IN_TESTBED, INTERPRETED, on_kvm, on_qemu, play

NOT_ON_PVM = {
    "software": "its emulator of ring 0 knows INT n in real mode only",
    "syscall": "SYSCALL leaves ring 3 by its rip only: a page fault at LSTAR, as of ring 3; INT n is #UD",
    "huge": "no pages of 1 GiB: the bit is reserved",
    "flat": "no exception is delivered in 32-bit mode: its emulator gives up",
    "paged": "paging outside long mode: MOV CR0 is #GP",
    "pae": "paging outside long mode: MOV CR0 is #GP",
    "segments": "no exception is delivered in 32-bit mode: its emulator gives up",
}
"""What a KVM that interprets ring 0 cannot run: there real KVM is asked for."""

EMULATED = "the testbed's processor is emulated by QEMU, which "
NOT_IN_TESTBED = {
    "faults": EMULATED + "has #GP for #SS at an address that is not canonical",
    "large": EMULATED + "leaves out P in the error code of a reserved bit",
    "huge": EMULATED + "leaves out P in the error code of a reserved bit",
    "guards": EMULATED + "leaves out P in the error code of a reserved bit",
    "pae": EMULATED + "leaves out P in the error code of a reserved bit",
    "segments": EMULATED + "checks no segment's limit or type",
}


def needed(name: str) -> list[pytest.MarkDecorator]:
    if name in NOT_IN_TESTBED:
        reason = NOT_IN_TESTBED[name] if IN_TESTBED else NOT_ON_PVM.get(name, "")
        unfit = IN_TESTBED or (bool(reason) and INTERPRETED)
        return [pytest.mark.kvm, pytest.mark.skipif(unfit, reason=reason)]
    return [pytest.mark.linux_kvm] if name in NOT_ON_PVM else [pytest.mark.kvm]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needed(name)) for name in mini.names()])
def test_it_says_on_kvm_what_the_table_says(name: str) -> None:
    outcome = play(on_kvm, name)
    assert outcome.console == mini.guest(name).console
    assert outcome.ends == mini.guest(name).ends


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("software", {}),
        ("syscall", {}),
        ("syscall", {"gate": 1}),
        ("ipi", {"x2apic": 0}),
        ("flat", {}),
        ("paged", {}),
    ],
)
def test_it_says_the_same_on_an_emulated_processor(name: str, parameters: dict[str, int]) -> None:
    """A third judge, for what this host's KVM may lack."""
    assert on_qemu(name, **parameters) == mini.guest(name).console


def test_every_source_is_in_the_table() -> None:
    assert sorted(path.stem for path in build.HERE.glob("*.s")) == sorted(mini.names())
    assert sorted(path.stem for path in build.HERE.glob("*.txt")) == sorted(mini.names())


def test_an_image_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = mini.image("hello")
    changed = first.stat().st_mtime_ns
    assert first.is_relative_to(tmp_path)
    assert mini.image("hello") == first
    assert first.stat().st_mtime_ns == changed
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_wrong_names_are_told() -> None:
    with pytest.raises(SpecError, match="no mini guest 'helo'; one of: hello"):
        mini.image("helo")
    with pytest.raises(SpecError, match="hello has no parameter 'pages'; one of: none"):
        mini.image("hello", pages=3)


def test_without_an_assembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    build._tools.cache_clear()
    with pytest.raises(MissingTool, match=r"no as found; .*; apt-get install binutils"):
        mini.image("hello")
