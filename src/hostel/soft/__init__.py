"""The software hypervisor: the heart of virtualization in the open.

::

    vm.py           a hypervisor of the monitor's contract,      schedule/    vCPUs on pCPUs
         │          beside kvm/: one turn, one inbox                  │
    hypervisor/     root mode: VMXON … VMLAUNCH, one handler an exit ─┘
         │ VMX instructions                                 ▲ VM exit
    pcpu.py         a physical processor ── vmx/            the VMCS, its instructions, entry, exit
         │ enter(state, controls, event)                    │ VmExit
    silicon.py      the contract of a core: non-root mode ──┘
         │
    core/           two of them: by translation, by intercept; both run guest code on unicorn
         │ HPA
    physical.py     host-physical memory: the RAM of machines, and the frames that tables live in

Beside them: ``paging/`` walks every table there is; ``irqchip/`` is PIC, IOAPIC, LAPIC and PIT in software;
``iommu.py`` and ``dma.py`` are a device that moves memory and what holds it; ``mini/`` are guests of our own.
What all share: ``state.py`` (a processor's registers), ``exceptions.py``, ``cpuid.py``.

Rules: what hardware does is below ``silicon.py`` and ``vmx/``; what a hypervisor decides is above.
Time is counted in guest instructions and vCPUs take turns in a fixed order, so the same guest gives the same
trace: however many vCPUs, and whether or not each has a thread of the monitor's.
"""
