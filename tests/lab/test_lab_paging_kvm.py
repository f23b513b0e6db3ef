"""KVM's columns of the lab ``paging``: by what its exits are told apart, and files of them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hostel import lab
from hostel.cli.entry import command_line
from hostel.errors import UserError
from hostel.lab import hardware, paging_kvm, reasons
from hostel.lab.paging_kvm import Measured
from hostel.lab.workloads import Cost, choose


def measured(paging: str, exits: dict[str, int], *, exact: bool = True) -> Measured:
    """As if by a KVM elsewhere."""
    return msgspec.convert(
        {
            "hostel": "lab paging: KVM",
            "paging": paging,
            "host": f"far-{paging}",
            "processor": "one",
            "kernel": "Linux 7",
            "module": f"kvm_intel ept={int(paging == 'nested')}",
            "date": "2026-01-02",
            "parameters": {"churn": {"pages": 32, "rounds": 6}},
            "costs": [{"workload": "churn", "exits": exits, "exact": exact}],
        },
        Measured,
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of both kinds of paging."""
    made = [
        measured("nested", {"EPT/NPT": 4, "I/O": 87, "#UD": 5}),
        measured("shadow", {"#PF": 400, "INVLPG": 192, "I/O": 87}),
    ]
    paths = [tmp_path / f"{one.paging}.json" for one in made]
    for one, path in zip(made, paths, strict=True):
        paging_kvm.save(one, path)
    return paths


# --- Files ---


def test_four_ways_in_one_table_and_where_each_was_measured(files: list[Path]) -> None:
    report = lab.run("paging", ["churn", "compute"], beside=files)
    for_memory, places = report.tables[0], report.tables[-1]
    kinds = [re.sub(r" \(.\)", "", str(name)) for name in for_memory.columns[1:]]
    assert kinds == sorted(kinds, key=lambda name: ("nested" in name, "KVM" in name))
    assert set(kinds) == {"soft, shadow", "KVM, shadow", "soft, nested", "KVM, nested"}
    far = {str(row[1]): row for row in places.rows if str(row[1]).startswith("far-")}
    assert far["far-shadow"][2:] == ("Linux 7", "kvm_intel ept=0", "2026-01-02", "by tracepoint")
    assert sum("(here)" in str(row[1]) for row in places.rows) == (not hardware.missing())
    churn, compute = for_memory.rows[1], for_memory.rows[0]
    if churn[0] != "churn":
        churn, compute = compute, churn
    at = for_memory.columns.index(f"KVM, shadow {far['far-shadow'][0]}")
    assert (churn[at], compute[at]) == (592, None), "of compute this file says nothing"
    told = " ".join(report.conclusions)
    assert re.search(r"On KVM the same \(. against .\): churn\.", told)
    assert "#UD (churn 5)" in told
    assert places.note == "", "nothing is missing"


def test_what_a_file_cannot_tell_apart_is_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "bound.json"
    paging_kvm.save(measured("nested", {"I/O": 87, "other": 900}, exact=False), path)
    report = lab.run("paging", ["churn"], beside=[path])
    assert "≤ 900" in report.tables[0].rows[0]
    assert "≤:" in report.tables[0].note
    assert not any("On KVM the same" in line for line in report.conclusions)
    row = next(row for row in report.tables[1].rows if row[2] == 987)
    assert row[report.tables[1].columns.index("#PF")] is None, "it is not known to be none"


def good() -> bytes:
    return paging_kvm.encode(measured("shadow", {"#PF": 1}))


WRONG = {
    "empty": (b"", "Input data was truncated"),
    "no JSON": (b"exits 12", "JSON is malformed"),
    "another JSON": (b'{"lab": "paging"}', "unknown field `lab`"),
    "a list": (b"[1]", "Expected `object`"),
    "another lab's": (good().replace(b"lab paging: KVM", b"lab x"), "Invalid value 'lab x'"),
    "a key too many": (good().replace(b'"host"', b'"ghost": "x", "host"'), "unknown field `ghost`"),
    "no kind": (good().replace(b'"paging": "shadow"', b'"paging": "none"'), "Invalid enum value"),
    "a count below 0": (good().replace(b'"#PF": 1', b'"#PF": -1'), "`int` >= 0"),
    "a terminal's command": (good().replace(b'"one"', b'"\\u001b[2J"'), "matching regex"),
    "a reason of its own": (good().replace(b'"#PF"', b'"magic"'), "exits for 'magic'"),
    "other sizes": (good().replace(b'"pages": 32', b'"pages": 33'), "'churn' is not the one of"),
    "another guest": (good().replace(b'"workload": "churn"', b'"workload": "x"'), "'x' is not the"),
    "no sizes": (good().replace(b'"churn": {', b'"other": {'), "'churn' is not the one of"),
    "large": (b" " * (1 << 20) + good(), "more than 1 MiB"),
    "deep": (b'{"costs":' * 5000, "costs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_none_is_one_clear_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, why = WRONG[name]
    assert data != good()
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    assert command_line(["lab", "paging", "--with", str(path)]) != 0
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert f"{path} is no measurement of this lab's: " in line
    assert why in line
    assert line.endswith("make one with: hostel lab paging --save FILE")


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.json: No such file"):
        paging_kvm.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        paging_kvm.load(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        paging_kvm.save(measured("shadow", {}), tmp_path)


def test_too_many_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 8 files .* not 9"):
        lab.run("paging", ["compute"], beside=[tmp_path] * 9)


@pytest.mark.parametrize("other", ["--json", "--with=x"])
def test_saving_shows_nothing(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["lab", "paging", "--save", "-", other]) == 125
    assert "--save shows nothing" in capsys.readouterr().err


@pytest.mark.kvm
def test_what_was_saved_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    assert command_line(["lab", "paging", "compute", "--save", str(path)]) == 0
    assert f"--with {path} shows it" in capsys.readouterr().err
    here = paging_kvm.load(path)
    assert (here.paging, here.kernel) == (hardware.paging(), f"Linux {os.uname().release}")
    assert [cost.workload for cost in here.costs] == ["compute"]
    assert command_line(["lab", "paging", "compute", "--save", "-"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["hostel"] == "lab paging: KVM"


# --- By reason ---


def test_statistics_alone_divide_as_far_as_they_go() -> None:
    counted = {"exits": 100, "pf_taken": 10, "invlpg": 20, "irq_exits": 3}
    of_amd = reasons.of_statistics(counted, 40, "kvm_amd", "shadow")
    assert of_amd == {"I/O": 40, "host's": 3, "#PF": 10, "INVLPG": 20, "other": 27}
    of_intel = reasons.of_statistics(counted | {"invlpg": 0}, 40, "kvm_intel", "nested")
    assert of_intel == {"I/O": 40, "host's": 3, "EPT/NPT": 10, "other": 47}
    assert reasons.of_statistics(counted, 40, "kvm_pvm", "shadow") == {"I/O": 40, "other": 60}


def test_a_bound_and_a_count() -> None:
    exits = {"#PF": 3, "INVLPG": 2, "I/O": 9, "other": 4}
    exact, bound = Cost("churn", exits), Cost("churn", exits, exact=False)
    assert (exact.total, exact.least, exact.most) == (18, 5, 5)
    assert (bound.total, bound.least, bound.most) == (18, 5, 9)


IN_TESTBED = os.environ.get("HOSTEL_TESTBED") == "1"


@contextmanager
def nested_paging(on: bool) -> Iterator[None]:
    """KVM told so. On an emulated server only: nobody's modules are exchanged but the testbed's."""
    before = hardware.paging() == "nested"
    reload(on)
    try:
        yield
    finally:
        reload(before)


def reload(nested: bool) -> None:
    if (hardware.paging() == "nested") != nested:
        modprobe = ["modprobe", "-C", "/dev/null"]
        subprocess.run([*modprobe, "-r", "kvm_amd"], check=True)
        subprocess.run([*modprobe, "kvm_amd", f"npt={int(nested)}", "nested=1"], check=True)


WORKLOADS = ("compute", "churn", "switch")


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, Cost]]:
    """What KVM did, by kind of paging: the two in the testbed, elsewhere the one that is there."""
    kinds = ("shadow", "nested") if IN_TESTBED else (hardware.paging(),)
    found: dict[str, dict[str, Cost]] = {}
    for kind in kinds:
        with nested_paging(kind == "nested"):
            one = paging_kvm.measure(choose(WORKLOADS))
        assert one.paging == kind
        found[kind] = {cost.workload: cost for cost in one.costs}
    return found


@pytest.mark.linux_kvm
def test_on_kvm_shadow_pays_for_changes_and_switches(real: dict[str, dict[str, Cost]]) -> None:
    """One exit for each INVLPG and for each load of CR3, and a page fault for each page anew; nested
    paging has none of them."""
    if (shadow := real.get("shadow")) is not None:
        assert shadow["churn"].least > 2 * 32 * 6
        assert shadow["churn"].exits["INVLPG"] == 32 * 6
        assert shadow["compute"].least < 30
        if shadow["switch"].exact:
            assert shadow["switch"].exits["MOV CR"] >= 4 * 50
    for cost in real.get("nested", {}).values():
        assert cost.least < 10
        if cost.exact:
            assert cost.total - cost.least - cost.exits.get("host's", 0) > 10, "its I/O"


@pytest.mark.linux_kvm
def test_by_its_tracepoint_every_exit_of_kvms_has_a_reason(
    real: dict[str, dict[str, Cost]],
) -> None:
    for costs in real.values():
        if not costs["switch"].exact:
            assert not IN_TESTBED, "root, and a kernel that has KVM's tracepoints"
            pytest.skip("KVM's tracepoints may not be counted here")
        assert costs["switch"].exits["#UD"] == 4 * 50, "a program's end each"
        for cost in costs.values():
            assert cost.exits.get("other", 0) == 0
            assert (cost.exits["I/O"], cost.exits["MSR"]) == (
                {"compute": 63, "churn": 87, "switch": 38}[cost.workload],
                2,
            )
            assert cost.tables
