"""Which mini guest runs on which KVM."""

from __future__ import annotations

import os
import re
from pathlib import Path

IN_TESTBED = os.environ.get("HOSTEL_TESTBED") == "1"
INTERPRETED = re.search(r"^flags.* (vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M) is None
"""This host's KVM, if any, does without the processor's help."""

NOT_ON_PVM = {
    "double": "any fault while a fault is delivered is a double fault",
    "windows": "an interrupt that waits is not taken between two instructions that are interpreted",
    "software": "its emulator of ring 0 knows INT n in real mode only",
    "syscall": "SYSCALL leaves ring 3 by its rip only: a page fault at LSTAR, as of ring 3; INT n is #UD",
    "huge": "no pages of 1 GiB: the bit is reserved",
    "fpu": "CR0.TS does not stop ring 3",
    "flat": "no exception is delivered in 32-bit mode: its emulator gives up",
    "paged": "paging outside long mode: MOV CR0 is #GP",
    "pae": "paging outside long mode: MOV CR0 is #GP",
    "segments": "no exception is delivered in 32-bit mode: its emulator gives up",
    "tasks": "no exception is delivered in 32-bit mode: its emulator gives up",
}
"""What a KVM that interprets ring 0 cannot run: there real KVM is asked for."""

EMULATED = "the testbed's processor is emulated by QEMU, which "
NOT_IN_TESTBED = {
    "faults": EMULATED + "has #GP for #SS at an address that is not canonical",
    "double": EMULATED + "leaves EXT out of error codes, and counts the IDT's gates twice",
    "msrs": EMULATED + "takes any address for LSTAR",
    "large": EMULATED + "leaves out P in the error code of a reserved bit",
    "huge": EMULATED + "leaves out P in the error code of a reserved bit",
    "guards": EMULATED + "leaves out P in the error code of a reserved bit",
    "pae": EMULATED + "leaves out P in the error code of a reserved bit",
    "segments": EMULATED + "checks no segment's limit or type",
}


def kvm_lacks(name: str) -> str:
    """Why this host's KVM cannot run this guest; "" if it can."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "there is no KVM"
    if IN_TESTBED:
        return NOT_IN_TESTBED.get(name, "")
    return NOT_ON_PVM.get(name, "") if INTERPRETED else ""
