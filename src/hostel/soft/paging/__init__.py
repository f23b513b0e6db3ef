"""Memory virtualization: GVA → GPA → HPA, as the processor does it and as the hypervisor makes it.

::

    the silicon's part                              the hypervisor's part
    walk.py   one walker of guest tables            virtualizer.py  what exit handlers call
    nested.py the walker of EPT                     guest_map.py    GPA → HPA of one machine
    tlb.py    tagged by VPID and EPT root           ept.py          one EPT (or NPT) a machine
    mmu.py    TLB, then a 1-D or a 2-D walk         shadow.py       one shadow an address space

The two parts meet in bytes only: in the tables that lie in frames of ``PhysicalMemory``.
"""
