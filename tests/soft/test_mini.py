"""Mini guests on the host's own KVM: each says what its table says; how images are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.errors import MissingTool, SpecError
from hostel.monitor import Monitor
from hostel.plan import Ending, Plan
from hostel.soft import mini
from hostel.soft.mini import build
from hostel.soft.mini.__main__ import main
from hostel.spec import MachineSpec
from soft.mini_rig import PATIENCE, on_kvm, on_qemu, play
from soft.mini_subjects import NOT_IN_TESTBED, NOT_ON_PVM, kvm_lacks


def needed(name: str) -> list[pytest.MarkDecorator]:
    if name in NOT_IN_TESTBED:
        reason = kvm_lacks(name)
        return [pytest.mark.kvm, pytest.mark.skipif(bool(reason), reason=reason)]
    return [pytest.mark.linux_kvm] if name in NOT_ON_PVM else [pytest.mark.kvm]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needed(name)) for name in mini.names()])
def test_it_says_on_kvm_what_the_table_says(name: str) -> None:
    outcome = play(on_kvm, name)
    assert outcome.console == mini.guest(name).console
    assert outcome.ends == mini.guest(name).ends


@pytest.mark.kvm
def test_what_reaches_a_device() -> None:
    """The writes of ``mmio.s``, as its instructions say them; reads give ones."""
    low = [
        *((0, "88"), (2, "7788"), (4, "55667788"), (8, "1122334455667788")),
        *((16, "5a"), (18, "5a5a"), (20, "12345678"), (24, "fffffffffffffffe")),
        *((32, "00000004"), (36, "0000f0f0"), (40, "00000005")),
        *((64, "abcd0123"), (68, "abcd0123"), (72, "abcd0123")),
    ]
    expected = [(0x6000_0000 + at, bytes.fromhex(digits)[::-1]) for at, digits in low]
    expected += [(0x6000_0080, b"sixteen "), (0x6000_0088, b"bytes it")]
    assert list(play(on_kvm, "mmio").writes) == expected


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
    with pytest.raises(SpecError, match="pages of mini guest churn is 1 to 12000, not 0"):
        mini.image("churn", pages=0)
    with pytest.raises(SpecError, match="cpus of mini guest ipi is 2 to 4, not 1"):
        mini.image("ipi", cpus=1)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("switch", {"kernel_global": 1}, "total=1130"),
        ("timer", {"x2apic": 0}, "ticks=5"),
        ("ipi", {"x2apic": 0, "rounds": 3}, "pongs=3"),
        ("migrate", {"cpus": 3, "yields": 5}, "last ran on=12012"),
        ("memory", {"kib": 128}, "left="),
        ("fork", {"pages": 4, "copies": 1}, "pages copied=2"),
    ],
)
def test_parameters(name: str, parameters: dict[str, int], said: str) -> None:
    outcome = play(on_kvm, name, **parameters)
    assert outcome.ends == "exit"
    assert said in outcome.console


@pytest.mark.kvm
def test_results_are_what_was_said() -> None:
    results = play(on_kvm, "memory").results
    assert results.values == (0x5B183C9A2E8247A9, 0xEB8BB35604C6140)
    assert len(results.data) == 64 << 10
    assert play(on_kvm, "sector").results == mini.Results((), b"")


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["hello", "pit", "migrate", "modes"])
def test_on_the_monitor(name: str, tmp_path: Path) -> None:
    """The whole machine of engine kvm around it: its bus, its irqchip, its own debug ports."""
    guest = mini.guest(name)
    spec = MachineSpec(memory=guest.memory, cpus=guest.cpus, on_reboot="stop")
    monitor = Monitor(Plan(
        spec=spec, engine="kvm", reason="a test", kernel=mini.image(name), release="", initrd=None,
        cmdline="", disks=(), shares=(), runtime=tmp_path, agent=False,
    ))  # fmt: skip
    try:
        monitor.start()
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=1)
        assert monitor.console.history().decode() == guest.console
    finally:
        monitor.stop()


def test_the_list_and_an_image_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "churn      map, use, unmap  (pages=16 rounds=4)" in capsys.readouterr().out
    assert main(["churn", "pages=0x10"]) == 0
    assert Path(capsys.readouterr().out.strip()) == mini.image("churn")
    assert main(["churn", "pages=many"]) == 1
    assert "'pages=many' is no parameter; write NAME=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pages=１２"], "is no parameter"),
        (["pages=1_2"], "is no parameter"),
        (["pages= 4"], "is no parameter"),
        (["pages"], "is no parameter"),
        (["pages=4", "pages=5"], "parameter 'pages' is given twice"),
        (["pages=99999999999999999999"], "is no parameter"),
    ],
)
def test_wrong_parameters_by_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["churn", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["churn", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "python -m hostel.soft.mini [NAME" in capsys.readouterr().out


def test_without_an_assembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    build._tools.cache_clear()
    with pytest.raises(MissingTool, match=r"no as found; .*; apt-get install binutils"):
        mini.image("hello")
