"""The network device (virtio 1.2 §5.1): feature bits, config space, frame header, control commands.

Named like <linux/virtio_net.h> without ``VIRTIO_NET_``; the ABI test compares all of it.
"""

from __future__ import annotations

from .record import Record

# --- Features (§5.1.3) -------------------------------------------------------------------------

F_CSUM = 0
F_GUEST_CSUM = 1
F_CTRL_GUEST_OFFLOADS = 2
F_MTU = 3
F_MAC = 5
F_GUEST_TSO4 = 7
F_GUEST_TSO6 = 8
F_GUEST_ECN = 9
F_GUEST_UFO = 10
F_HOST_TSO4 = 11
F_HOST_TSO6 = 12
F_HOST_ECN = 13
F_HOST_UFO = 14
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_GUEST_ANNOUNCE = 21
F_MQ = 22
F_CTRL_MAC_ADDR = 23

# --- Config space (§5.1.4) ---------------------------------------------------------------------

S_LINK_UP = 1
S_ANNOUNCE = 2

CONFIG = Record(
    "virtio_net_config",
    mac="6s",
    status="H",
    max_virtqueue_pairs="H",
    mtu="H",
    speed="I",
    duplex="B",
    rss_max_key_size="B",
    rss_max_indirection_table_length="H",
    supported_hash_types="I",
)

# --- The header before each frame (§5.1.6) -----------------------------------------------------

HDR_F_NEEDS_CSUM = 1
HDR_F_DATA_VALID = 2
HDR_GSO_NONE = 0
HDR_GSO_TCPV4 = 1
HDR_GSO_TCPV6 = 4

HDR = Record(
    "virtio_net_hdr_v1",
    flags="B",
    gso_type="B",
    hdr_len="H",
    gso_size="H",
    csum_start="H",
    csum_offset="H",
    num_buffers="H",
)

# --- Control queue (§5.1.6.5) ------------------------------------------------------------------

OK = 0
ERR = 1

CTRL_RX = 0
CTRL_RX_PROMISC = 0
CTRL_RX_ALLMULTI = 1
CTRL_RX_ALLUNI = 2
CTRL_RX_NOMULTI = 3
CTRL_RX_NOUNI = 4
CTRL_RX_NOBCAST = 5
CTRL_MAC = 1
CTRL_MAC_TABLE_SET = 0
CTRL_MAC_ADDR_SET = 1
CTRL_VLAN = 2
CTRL_VLAN_ADD = 0
CTRL_VLAN_DEL = 1
CTRL_ANNOUNCE = 3
CTRL_ANNOUNCE_ACK = 0
CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0
CTRL_GUEST_OFFLOADS = 5
CTRL_GUEST_OFFLOADS_SET = 0

CTRL_HDR = Record("virtio_net_ctrl_hdr", **{"class": "B", "cmd": "B"})
