"""Guest memory: one memfd, mapped once, seen through bounds-checked views.

::

    GPA 0 ........ low_end | hole for PCI and MMIO | 4 GiB ........ 4 GiB + rest
        └── region 0 ──────┘                       └── region 1 ──────────────┘
    one memfd, offsets 0 .. size, mapped at one 2 MiB-aligned HVA

Being one memfd, the same memory can be handed whole to a vhost kernel worker (by HVA) or to a
vhost-user process (by file descriptor and offset): a ``Region`` carries all three names of its bytes.

Every access from Python goes through ``view``: an address from the guest that is not wholly inside
one region raises ``MemoryFault`` and touches nothing.
"""
