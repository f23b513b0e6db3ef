"""The vhost-user protocol: requests, feature bits, messages.

QEMU docs/interop/vhost-user.rst. There is no kernel header to compare with: the tests hold it against
a real virtiofsd.
"""

from __future__ import annotations

from .record import Record

HEADER = Record("VhostUserHeader", request="I", flags="I", size="I")
VERSION = 1
VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SEND_RARP = 19
NET_SET_MTU = 20
GET_CONFIG = 24
SET_CONFIG = 25
SET_STATUS = 39

F_PROTOCOL_FEATURES = 30
"""A bit among the virtio features that only this protocol uses; never shown to the guest."""
PROTOCOL_F_MQ = 0
PROTOCOL_F_RARP = 2
PROTOCOL_F_REPLY_ACK = 3
PROTOCOL_F_NET_MTU = 4
PROTOCOL_F_CONFIG = 9
PROTOCOL_F_STATUS = 16

MEMORY_HEADER = Record("VhostUserMemory", nregions="I", padding="I")
MEMORY_REGION = Record(
    "VhostUserMemoryRegion",
    guest_phys_addr="Q",
    memory_size="Q",
    userspace_addr="Q",
    mmap_offset="Q",
)
MAX_REGIONS = 8
VRING_STATE = Record("vhost_vring_state", index="I", num="I")
VRING_ADDR = Record(
    "vhost_vring_addr", index="I", flags="I", desc="Q", used="Q", avail="Q", log="Q"
)
CONFIG_HEADER = Record("VhostUserConfig", offset="I", size="I", flags="I")
MAX_CONFIG_SIZE = 256
U64 = Record("u64", u64="Q")
VRING_INDEX = 0xFF
"""In the word that comes with an eventfd: which ring."""
VRING_NO_FD = 1 << 8
"""In the same word: there is none."""
