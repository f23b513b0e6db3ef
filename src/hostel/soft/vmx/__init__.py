"""VMX: virtual-machine control structures, and what VM entry and VM exit do with them (SDM vol. 3C).

::

    hypervisor ── VMREAD, VMWRITE ──> vmcs.py: a region in a frame, its fields (fields.py)
        │ VMLAUNCH, VMRESUME            │
        ▼                               ▼
    ../pcpu.py ── checks, in order: check_controls, check_host (VMfail 7, 8), check_guest (exit 33)
        │   ▲                           │
        │   └── leave.py: guest state saved, the exit recorded, host state loaded
        ▼                               │
    a core runs the guest <── enter.py: guest state, event and controls loaded

The instructions themselves are methods of ``PhysicalCpu`` (``../pcpu.py``); how they fail: ``results.py``;
what this processor supports: ``capabilities.py``.
"""
