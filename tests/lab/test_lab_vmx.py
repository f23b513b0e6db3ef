from __future__ import annotations

from hostel import lab

FLOW = ("VMXON", "VMCLEAR", "VMPTRLD", "VMWRITE", "VMLAUNCH", "VM exit", "VMRESUME", "VMXOFF")


def test_the_flow_from_vmxon_to_vmxoff() -> None:
    """As the manual has it (SDM vol. 3C §31.5): each step for the first time in this order."""
    report = lab.run("vmx")
    firsts = [
        next(at for at, step in enumerate(report.steps) if step.what.startswith(name))
        for name in FLOW
    ]
    assert firsts == sorted(firsts)
    assert report.steps[-1].what.startswith("VMXOFF")
    assert report.steps[-2].what.startswith("VMCLEAR")


def test_as_many_exits_as_entries() -> None:
    report = lab.run("vmx")
    tables = {table.title: table for table in report.tables}
    exits = sum(int(row[2] or 0) for row in tables["VM exits"].rows)
    instructions = {row[0]: row[1] for row in tables["VMX instructions of the hypervisor"].rows}
    assert instructions["VMLAUNCH"] == 1
    assert exits == 1 + int(instructions["VMRESUME"] or 0)
    assert f"{exits} exits" in report.conclusions[0]


def test_wrong_use_has_the_manuals_answers() -> None:
    (table,) = [table for table in lab.run("vmx").tables if table.title == "Wrong use"]
    answers = {row[0]: str(row[1]) for row in table.rows}
    assert answers["VMRESUME of a VMCS that is clear"].startswith("VMfailValid(5,")
    assert answers["VMWRITE of the exit reason"].startswith("VMfailValid(13,")
    assert answers["VMLAUNCH with no current VMCS"] == "VMfailInvalid"
    assert "nothing" not in answers.values()


def test_the_same_trace_every_time() -> None:
    assert lab.run("vmx") == lab.run("vmx")
