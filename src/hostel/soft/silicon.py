"""The contract of a core: what the silicon does in non-root mode, from a VM entry to the next VM exit.

A core is given a state and what to intercept, in VMX's own terms, and runs until one of those things
happens. All that hardware does without leaving the guest is its business: exceptions and interrupts
through the guest's IDT, CR0 and CR4 masks and shadows, the interrupt window, the shadow of STI,
instruction-counted time. What a VMCS is, it does not know (``vmx/``); which page is whose, neither
(``paging/``).

Two cores keep this contract: ``core/translate.py`` asks an ``Mmu`` for every translation; ``core/svm.py``
walks tables by itself, the guest's and ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import msgspec

from .state import CpuState


class Access(IntEnum):
    READ = 0
    WRITE = 1
    FETCH = 2


class Translation(NamedTuple):
    """A page as a core may keep it, until told to flush: for this privilege, with these rights."""

    frame: int
    """HPA of its 4 KiB frame."""
    writable: bool
    """False also while the dirty bit has still to be set: the first write asks again."""
    executable: bool
    readable: bool = True
    """False for what a supervisor may fetch and SMAP forbids it to read."""


class PageFault(Exception):
    """The guest's own: #PF with CR2 and this error code (SDM vol. 3A §4.7)."""

    def __init__(self, address: int, code: int) -> None:
        super().__init__(f"#PF at {address:#x}, code {code:#x}")
        self.address = address
        self.code = code


class EptFault(Exception):
    """Not the guest's: an EPT violation or misconfiguration, that is, a VM exit with this reason."""

    def __init__(self, reason: int, qualification: int, linear: int, physical: int) -> None:
        super().__init__(f"EPT fault at GPA {physical:#x}, qualification {qualification:#x}")
        self.reason = reason
        self.qualification = qualification
        self.linear = linear
        self.physical = physical


class Mmu(Protocol):
    """A pCPU's: its TLB, and the walkers behind it."""

    def translate(
        self, state: CpuState, controls: Controls, address: int, access: Access, user: bool
    ) -> Translation:
        """The page of a linear address; ``PageFault`` or ``EptFault``. Sets accessed and dirty bits.

        ``user``: an access of CPL 3, as opposed to a supervisor's (also an implicit one from CPL 3).
        What it returns depends on RFLAGS.AC where CR4.SMAP is set: a core that keeps it asks again
        when AC has changed.
        """

    def pointers(self, controls: Controls, cr3: int) -> Sequence[int]:
        """PAE's four PDPTEs, as a load of CR3 reads them (SDM vol. 3A §4.4.1); ``EptFault``."""

    def invalidate(self, controls: Controls, address: int) -> None:
        """INVLPG, executed by the guest without an exit."""

    def flush(self, controls: Controls, *, keep_global: bool) -> None:
        """A MOV to CR3 (``keep_global``), or a change of CR0, CR4 or EFER that the manual says flushes
        (SDM vol. 3A §4.10.4.1), executed by the guest without an exit."""


class Pin(IntEnum):
    """Pin-based VM-execution controls (SDM vol. 3C §24.6.1).

    Not an IntFlag, nor are the others: its ``&`` costs ten times an int's, and exits are full of them.
    """

    EXTERNAL_INTERRUPT = 1 << 0
    NMI = 1 << 3
    VIRTUAL_NMI = 1 << 5
    PREEMPTION_TIMER = 1 << 6


class Primary(IntEnum):
    """Primary processor-based VM-execution controls (SDM vol. 3C §24.6.2, table 24-6)."""

    INTERRUPT_WINDOW = 1 << 2
    TSC_OFFSETTING = 1 << 3
    HLT = 1 << 7
    INVLPG = 1 << 9
    MWAIT = 1 << 10
    RDPMC = 1 << 11
    RDTSC = 1 << 12
    CR3_LOAD = 1 << 15
    CR3_STORE = 1 << 16
    CR8_LOAD = 1 << 19
    CR8_STORE = 1 << 20
    NMI_WINDOW = 1 << 22
    MOV_DR = 1 << 23
    UNCONDITIONAL_IO = 1 << 24
    IO_BITMAPS = 1 << 25
    MSR_BITMAPS = 1 << 28
    MONITOR = 1 << 29
    PAUSE = 1 << 30
    SECONDARY = 1 << 31


class Secondary(IntEnum):
    """Secondary processor-based VM-execution controls (SDM vol. 3C §24.6.2, table 24-7)."""

    EPT = 1 << 1
    DESCRIPTOR_TABLE = 1 << 2
    RDTSCP = 1 << 3
    VPID = 1 << 5
    WBINVD = 1 << 6
    UNRESTRICTED_GUEST = 1 << 7
    PAGED_REAL_MODE = 1 << 31
    """Ours, not Intel's; AMD's processors always have it (APM vol. 2 §15.19): a guest may have CR0.PE = 0
    with CR0.PG = 1, so that shadow tables translate for a guest in real mode too."""


class Reason(IntEnum):
    """Basic exit reasons (SDM vol. 3D appendix C)."""

    EXCEPTION_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT = 3
    SIPI = 4
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    MOV_DR = 29
    IO = 30
    RDMSR = 31
    WRMSR = 32
    ENTRY_GUEST_STATE = 33
    ENTRY_MSR_LOADING = 34
    MWAIT = 36
    MONITOR = 39
    PAUSE = 40
    TPR_BELOW_THRESHOLD = 43
    GDTR_IDTR = 46
    LDTR_TR = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55


class EventType(IntEnum):
    """Interruption types (SDM vol. 3C §24.8.3)."""

    EXTERNAL = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6


class Event(msgspec.Struct, frozen=True):
    """What VM entry injects, what an exit reports (SDM vol. 3C §24.8.3, §24.9.2)."""

    vector: int
    type: EventType
    error: int | None = None
    length: int = 0
    """Of the instruction, for software interrupts and exceptions."""

    @property
    def info(self) -> int:
        """The interruption-information field."""
        return self.vector | self.type << 8 | (self.error is not None) << 11 | 1 << 31


class Controls(msgspec.Struct):
    """What to intercept, decoded from a VMCS at entry. Bits as the manual has them."""

    pin: int = 0
    primary: int = 0
    secondary: int = 0
    exception_bitmap: int = 0
    pf_mask: int = 0
    pf_match: int = 0
    io_bitmap_a: int = 0
    """HPA of the page for ports 0–0x7fff; the other for 0x8000–0xffff (SDM vol. 3C §24.6.4)."""
    io_bitmap_b: int = 0
    msr_bitmap: int = 0
    """HPA (SDM vol. 3C §24.6.9)."""
    cr0_mask: int = 0
    cr0_shadow: int = 0
    cr4_mask: int = 0
    cr4_shadow: int = 0
    cr3_targets: tuple[int, ...] = ()
    tsc_offset: int = 0
    """Between RDTSC and the instructions that the core has counted, under ``Primary.TSC_OFFSETTING``."""
    ept_pointer: int = 0
    """Used when ``Secondary.EPT`` is set: HPA of the top table and its attributes (§24.6.11)."""
    vpid: int = 0
    timer: int = 0
    """VMX-preemption timer: guest instructions until the exit; counts only under ``Pin.PREEMPTION_TIMER``."""


class VmExit(msgspec.Struct):
    """The exit-information fields (SDM vol. 3C §24.9)."""

    reason: Reason
    qualification: int = 0
    length: int = 0
    """Of the instruction, where the exit is due to one."""
    linear: int = 0
    physical: int = 0
    interruption: Event | None = None
    vectoring: Event | None = None
    """The event whose delivery was under way (IDT-vectoring information)."""
    instruction_info: int = 0


class CoreStatistics(msgspec.Struct):
    """Counted since the core was made."""

    instructions: int = 0
    blocks_scanned: int = 0
    instructions_replaced: int = 0
    events_delivered: int = 0
    fills: int = 0
    """Times the core had to ask for a translation (0 for a core that walks by itself)."""
    flushes: int = 0


class Core(Protocol):
    """One hardware thread. Not thread-safe, but for ``interrupt``."""

    statistics: CoreStatistics

    def enter(self, state: CpuState, controls: Controls, event: Event | None = None) -> VmExit:
        """Run non-root mode from ``state`` (changed in place) until an exit. ``event`` is injected first.

        Instruction exits leave RIP at the instruction; traps after it, as the manual has it.
        A guest cannot make this raise, nor run on beyond the preemption timer.
        """

    def interrupt(self) -> None:
        """An external interrupt of the host: ``Reason.EXTERNAL_INTERRUPT`` soon, or at the next entry.

        From any thread.
        """

    def flush(self, address: int | None = None) -> None:
        """Forget translations: of one linear address, or all. A core has no tags: whoever switches address
        spaces flushes, and the tagged TLB behind the ``Mmu`` answers again."""

    def wrote(self, hpa: int, size: int) -> None:
        """Memory was written by somebody else: a hypervisor, a device. Code that was there is not run on."""

    def save_fpu(self) -> bytes: ...
    def load_fpu(self, data: bytes) -> None:
        """x87, SSE and AVX state, in the core's own format: VMX leaves it to the hypervisor."""

    def close(self) -> None: ...
