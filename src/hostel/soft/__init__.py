"""The software hypervisor: the heart of virtualization in the open.

::

    hypervisor/     root mode: VMXON … VMLAUNCH, one handler an exit     schedule/    vCPUs on pCPUs
         │ VMX instructions                                 ▲ VM exit
    pcpu.py         a physical processor ── vmx/            the VMCS, its instructions, entry, exit
         │ enter(state, controls, event)                    │ VmExit
    silicon.py      the contract of a core: non-root mode ──┘
         │
    core/           two of them: by translation, by intercept; both run guest code on unicorn
         │ HPA
    physical.py     host-physical memory: the RAM of machines, and the frames that tables live in

``paging/`` walks every table there is; ``irqchip/`` is PIC, IOAPIC, LAPIC and PIT in software; ``vm.py``
makes it all a hypervisor of the monitor's contract, beside ``kvm/``.

Rules: what hardware does is below ``silicon.py`` and ``vmx/``; what a hypervisor decides is above.
Time is counted in guest instructions, so that the same guest gives the same trace.
"""
