"""A vCPU on a pCPU: what it finds there, and what its registers are to a handler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.hypervisor import PioExit
from hostel.memory import PAGE, GuestMemory
from hostel.soft.hypervisor import control_registers, exits, io
from hostel.soft.hypervisor.host import Host
from hostel.soft.hypervisor.machine import SoftMachine
from hostel.soft.silicon import Reason, VmExit
from hostel.soft.state import CR0_ET, CR0_PE, CR0_PG, CR0_TS, RAX, RIGHTS_CODE32
from hostel.spec import Trap


@pytest.fixture(params=["translate", "intercept"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    trap: Trap = request.param
    with Host(trap=trap) as host:
        yield host


def test_a_new_vcpu_finds_nothing_in_the_fpu_of_the_last_one(host: Host) -> None:
    pcpu = host.pcpus[0]
    first, second = SoftMachine(host), SoftMachine(host)
    one, other = first.add_vcpu(0), second.add_vcpu(0)
    one.load(pcpu)
    fresh = pcpu.core.save_fpu()
    secret = bytes(len(fresh) - 16) + b"the first one's "
    pcpu.core.load_fpu(secret)
    other.load(pcpu)
    assert pcpu.core.save_fpu() == fresh
    one.load(pcpu)
    assert pcpu.core.save_fpu() == secret
    first.close()
    second.close()


def test_32_bit_code_gives_a_control_register_32_bits(host: Host) -> None:
    machine = SoftMachine(host)
    vcpu = machine.add_vcpu(0)
    vcpu.load(host.pcpus[0])
    state = vcpu.export_state()
    state.cr0, state.cs.rights = CR0_PE | CR0_ET, RIGHTS_CODE32
    state.gpr[RAX] = 0xDEAD << 32 | CR0_PE | CR0_ET | CR0_TS
    vcpu.import_state(state)
    control_registers.handle(vcpu, VmExit(Reason.CR_ACCESS, RAX << 8, 3))
    assert vcpu.event is None
    assert vcpu.export_state().cr0 == CR0_PE | CR0_ET | CR0_TS
    machine.close()


def test_ins_whose_page_is_taken_away_while_the_monitor_answers(host: Host) -> None:
    """By another vCPU. The answer goes where the page was when the instruction began."""
    machine = SoftMachine(host)
    with GuestMemory(16 * PAGE) as memory:
        machine.map(0, memory.regions[0])
        memory.write_u32(0x1000, 0x3003)  # tables: CR3, and the first page of them
        memory.write_u32(0x3000, 0x4003)
        vcpu = machine.add_vcpu(0)
        vcpu.load(host.pcpus[0])
        state = vcpu.export_state()
        state.cr0, state.cr3, state.cs.rights = CR0_PE | CR0_ET | CR0_PG, 0x1000, RIGHTS_CODE32
        vcpu.import_state(state)
        in_byte = VmExit(Reason.IO, 0x60 << 16 | 1 << 4 | 1 << 3, 1, 0, instruction_info=1 << 7)
        exit = io.handle(vcpu, in_byte)
        assert isinstance(exit, PioExit)
        memory.write_u32(0x3000, 0)
        exit.data[:] = b"!"
        machine.attention = True
        assert vcpu.run(host.pcpus[0], 1000) is None
        assert memory.read(0x4000, 1) == b"!"
        assert vcpu.event is None
        machine.close()


def test_invlpg_of_an_address_that_is_not_canonical_does_nothing(host: Host) -> None:
    machine = SoftMachine(host, paging="shadow")
    with GuestMemory(16 * PAGE) as memory:
        machine.map(0, memory.regions[0])
        memory.write(0, b"\xf4")  # hlt
        vcpu = machine.add_vcpu(0)
        vcpu.load(host.pcpus[0])
        state = vcpu.export_state()
        state.rip, state.cs.base = 0, 0
        vcpu.import_state(state)
        for address in (1 << 63, 1 << 47, 0xFFFF_7FFF_FFFF_F000):
            assert exits.dispatch(vcpu, VmExit(Reason.INVLPG, address)) is None
        assert vcpu.run(host.pcpus[0], 1000) is None
        assert vcpu.exits, "it was entered: nothing had to be flushed that cannot be"
        machine.close()
