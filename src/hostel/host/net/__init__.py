"""Networks of machines on the host, and who keeps them.

::

    hostel ──one socket a NIC──► keeper (one process a network) ──► ip, nft: bridge, taps, rules
      │                            ▲                           └──► DNS at the bridge's address
      └──first machine starts it───┘

A NIC's socket is its lease: the kernel closes it when the machine's hostel ends, however it ends, and
the keeper takes the NIC's tap and rules away; with the last one, the network and itself. If the keeper
itself was killed, its directory's lock is free: the next start undoes what its record names (``state``).

The keeper imports the standard library only, and little of that: it is on the way of a first start.
For the same reason ``ip -batch`` and ``nft -f`` are run (4 ms each) where pyroute2 would be imported
(400 ms).

====================  ==========================================================================
``attach`` (above)    what NICs of a machine become: the door to all this (``host/network.py``)
``client``            finds a network's keeper, or starts it; one lease
``keeper``            the process: leases, life and end of a network
``fabric``            what a network is made of: bridge, taps, sysctls; made and undone
``rules``             the nftables rules of a network, as text; a pure function
``watch``             puts rules back that somebody else took away
``rates``             a NIC's rates, where the kernel is to keep them
``allow``             allow-lists: what a machine may reach
``dns``, ``resolver`` names: messages, and the server
``passt``             networks without privileges
``kernel``            how programs are run and sysctls written
====================  ==========================================================================
"""
