"""Taps (<linux/if_tun.h>): requests, flags and layouts. macvtap takes the same requests.

Numbers are those of the headers; the ABI test compares them.
"""

from __future__ import annotations

from .record import Record

TUNSETIFF = 0x4004_54CA
TUNSETOFFLOAD = 0x4004_54D0
TUNSETSNDBUF = 0x4004_54D4
TUNSETVNETHDRSZ = 0x4004_54D8
TUNSETQUEUE = 0x4004_54D9

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10

IFREQ = Record("ifreq", ifr_name="16s", ifr_flags="H", padding="22s")
"""The request's union is 24 bytes long; ``TUNSETIFF`` reads and writes the flags only."""
