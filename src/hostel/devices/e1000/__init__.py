"""An Intel 82540EM, emulated: the NIC that every system has a driver for, at the classic price.

::

    card.py      the PCI function: registers, interrupts ─┬─ eeprom.py    64 words behind four wires
                                                          ├─ phy.py       the transceiver behind MDIO
                                                          ├─ transmit.py  the ring of what to send
                                                          ├─ receive.py   the ring of where to put
                                                          └─ counters.py  statistics
    offload.py   checksums and segments, on plain bytes

Each access to a register is a VM exit into this process: some ten for a packet, where virtio has none.
"""
