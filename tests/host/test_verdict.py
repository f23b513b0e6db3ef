"""The trial of KVM is made once, and again when what it was about has changed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from hostel.host import verdict as verdicts
from hostel.host.verdict import verdict
from hostel.kvm.probe import KvmReport


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[KvmReport]:
    """Counts trials; their outcome is the last report appended before."""
    made: list[KvmReport] = []
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def probe() -> KvmReport:
        made.append(KvmReport(present=True, openable=True, loops_per_second=len(made)))
        return made[-1]

    monkeypatch.setattr("hostel.kvm.probe.probe", probe)
    monkeypatch.setattr(verdicts, "_key", lambda: "boot 1")
    return made


def test_once(trials: list[KvmReport]) -> None:
    first = verdict()
    assert verdict() == first
    assert len(trials) == 1


def test_again_after_a_reboot(trials: list[KvmReport], monkeypatch: pytest.MonkeyPatch) -> None:
    verdict()
    monkeypatch.setattr(verdicts, "_key", lambda: "boot 2")
    verdict()
    assert len(trials) == 2


def test_a_failed_trial_is_not_remembered(
    trials: list[KvmReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hostel.kvm.probe.probe", lambda: KvmReport(True, False, "no permission on /dev/kvm")
    )
    assert not verdict().usable
    monkeypatch.undo()
    assert "no permission" not in verdict().reason


def test_a_torn_file_is_no_harm(trials: list[KvmReport], tmp_path: Path) -> None:
    verdict()
    known = tmp_path / "hostel" / ".kvm"
    known.write_text(known.read_text()[:-1])
    assert verdict().reason
    assert len(trials) == 2


def test_a_full_disk_costs_a_trial_and_leaves_nothing(
    trials: list[KvmReport], tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # EFBIG: Python ignores SIGXFSZ
    try:
        verdict()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert verdict().reason
    assert len(trials) == 2
    assert [path.name for path in (tmp_path / "hostel").iterdir()] == [".kvm"]


@pytest.mark.kvm
def test_the_real_one() -> None:
    assert verdict().reason
    assert verdict().max_vcpus > 0
