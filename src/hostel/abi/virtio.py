"""Virtio 1.2: identifiers, feature bits, registers and structures.

Named like the C headers' without ``VIRTIO_``; the ABI test compares all of it with <linux/virtio_*.h>.
"""

from __future__ import annotations

from .record import Record

# --- Devices (§5) and status (§2.1) ------------------------------------------------------------

ID_NET = 1
ID_BLOCK = 2
ID_CONSOLE = 3
ID_RNG = 4
ID_BALLOON = 5
ID_VSOCK = 19
ID_FS = 26

CONFIG_S_ACKNOWLEDGE = 1
CONFIG_S_DRIVER = 2
CONFIG_S_DRIVER_OK = 4
CONFIG_S_FEATURES_OK = 8
CONFIG_S_NEEDS_RESET = 0x40
CONFIG_S_FAILED = 0x80

# --- Feature bits that belong to no device (§6) ------------------------------------------------

RING_F_INDIRECT_DESC = 28
RING_F_EVENT_IDX = 29
F_VERSION_1 = 32

# --- Split virtqueue (§2.7) --------------------------------------------------------------------

DESC = Record("vring_desc", addr="Q", len="I", flags="H", next="H")
USED_ELEM = Record("vring_used_elem", id="I", len="I")
RING_HEADER_SIZE = 4
"""``flags`` and ``idx`` in front of the available and the used ring."""

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4
QUEUE_SIZE_MAX = 32768

# --- PCI transport (§4.1) ----------------------------------------------------------------------

PCI_VENDOR = 0x1AF4
PCI_DEVICE_BASE = 0x1040
PCI_CAP_COMMON_CFG = 1
PCI_CAP_NOTIFY_CFG = 2
PCI_CAP_ISR_CFG = 3
PCI_CAP_DEVICE_CFG = 4
PCI_CAP_PCI_CFG = 5
PCI_ISR_CONFIG = 2
MSI_NO_VECTOR = 0xFFFF

# The header of a capability, capability ID and next pointer included.
PCI_CAP = Record(
    "virtio_pci_cap",
    cap_vndr="B",
    cap_next="B",
    cap_len="B",
    cfg_type="B",
    bar="B",
    id="B",
    padding="2s",
    offset="I",
    length="I",
)
PCI_COMMON_CFG = Record(
    "virtio_pci_common_cfg",
    device_feature_select="I",
    device_feature="I",
    guest_feature_select="I",
    guest_feature="I",
    msix_config="H",
    num_queues="H",
    device_status="B",
    config_generation="B",
    queue_select="H",
    queue_size="H",
    queue_msix_vector="H",
    queue_enable="H",
    queue_notify_off="H",
    queue_desc_lo="I",
    queue_desc_hi="I",
    queue_avail_lo="I",
    queue_avail_hi="I",
    queue_used_lo="I",
    queue_used_hi="I",
)

# --- MMIO transport (§4.2) ---------------------------------------------------------------------

MMIO_MAGIC = 0x7472_6976  # "virt"
MMIO_MAGIC_VALUE = 0x000
MMIO_VERSION = 0x004
MMIO_DEVICE_ID = 0x008
MMIO_VENDOR_ID = 0x00C
MMIO_DEVICE_FEATURES = 0x010
MMIO_DEVICE_FEATURES_SEL = 0x014
MMIO_DRIVER_FEATURES = 0x020
MMIO_DRIVER_FEATURES_SEL = 0x024
MMIO_QUEUE_SEL = 0x030
MMIO_QUEUE_NUM_MAX = 0x034
MMIO_QUEUE_NUM = 0x038
MMIO_QUEUE_READY = 0x044
MMIO_QUEUE_NOTIFY = 0x050
MMIO_INTERRUPT_STATUS = 0x060
MMIO_INTERRUPT_ACK = 0x064
MMIO_STATUS = 0x070
MMIO_QUEUE_DESC_LOW = 0x080
MMIO_QUEUE_DESC_HIGH = 0x084
MMIO_QUEUE_AVAIL_LOW = 0x090
MMIO_QUEUE_AVAIL_HIGH = 0x094
MMIO_QUEUE_USED_LOW = 0x0A0
MMIO_QUEUE_USED_HIGH = 0x0A4
MMIO_SHM_LEN_LOW = 0x0B0
MMIO_SHM_LEN_HIGH = 0x0B4
MMIO_CONFIG_GENERATION = 0x0FC
MMIO_CONFIG = 0x100
MMIO_INT_VRING = 1
MMIO_INT_CONFIG = 2

# --- Block (§5.2) ------------------------------------------------------------------------------

BLK_F_SIZE_MAX = 1
BLK_F_SEG_MAX = 2
BLK_F_RO = 5
BLK_F_BLK_SIZE = 6
BLK_F_FLUSH = 9
BLK_F_TOPOLOGY = 10
BLK_F_CONFIG_WCE = 11
BLK_F_MQ = 12
BLK_F_DISCARD = 13
BLK_F_WRITE_ZEROES = 14

BLK_T_IN = 0
BLK_T_OUT = 1
BLK_T_FLUSH = 4
BLK_T_GET_ID = 8
BLK_T_DISCARD = 11
BLK_T_WRITE_ZEROES = 13
BLK_S_OK = 0
BLK_S_IOERR = 1
BLK_S_UNSUPP = 2
BLK_ID_BYTES = 20
BLK_WRITE_ZEROES_FLAG_UNMAP = 1
BLK_SECTOR = 512

BLK_OUTHDR = Record("virtio_blk_outhdr", type="I", ioprio="I", sector="Q")
BLK_RANGE = Record("virtio_blk_discard_write_zeroes", sector="Q", num_sectors="I", flags="I")
BLK_CONFIG = Record(
    "virtio_blk_config",
    capacity="Q",
    size_max="I",
    seg_max="I",
    geometry="4s",
    blk_size="I",
    physical_block_exp="B",
    alignment_offset="B",
    min_io_size="H",
    opt_io_size="I",
    wce="B",
    unused="B",
    num_queues="H",
    max_discard_sectors="I",
    max_discard_seg="I",
    discard_sector_alignment="I",
    max_write_zeroes_sectors="I",
    max_write_zeroes_seg="I",
    write_zeroes_may_unmap="B",
    unused1="3s",
    max_secure_erase_sectors="I",
    max_secure_erase_seg="I",
    secure_erase_sector_alignment="I",
)

# --- Console (§5.3) ----------------------------------------------------------------------------

CONSOLE_F_SIZE = 0
CONSOLE_F_MULTIPORT = 1
CONSOLE_DEVICE_READY = 0
CONSOLE_PORT_ADD = 1
CONSOLE_PORT_READY = 3
CONSOLE_CONSOLE_PORT = 4
CONSOLE_RESIZE = 5
CONSOLE_PORT_OPEN = 6
CONSOLE_PORT_NAME = 7

CONSOLE_CONFIG = Record("virtio_console_config", cols="H", rows="H", max_nr_ports="I", emerg_wr="I")
CONSOLE_CONTROL = Record("virtio_console_control", id="I", event="H", value="H")

# --- File system (§5.11) -----------------------------------------------------------------------

FS_CONFIG = Record("virtio_fs_config", tag="36s", num_request_queues="I")

# --- Traditional memory balloon (§5.5) -----------------------------------------------------------

BALLOON_F_MUST_TELL_HOST = 0
BALLOON_F_STATS_VQ = 1
BALLOON_F_DEFLATE_ON_OOM = 2
BALLOON_F_REPORTING = 5
BALLOON_PFN_SHIFT = 12
BALLOON_S_SWAP_IN = 0
BALLOON_S_SWAP_OUT = 1
BALLOON_S_MAJFLT = 2
BALLOON_S_MINFLT = 3
BALLOON_S_MEMFREE = 4
BALLOON_S_MEMTOT = 5
BALLOON_S_AVAIL = 6
BALLOON_S_CACHES = 7
BALLOON_S_HTLB_PGALLOC = 8
BALLOON_S_HTLB_PGFAIL = 9

BALLOON_CONFIG = Record(
    "virtio_balloon_config", num_pages="I", actual="I", free_page_hint_cmd_id="I", poison_val="I"
)
BALLOON_STAT = Record("virtio_balloon_stat", tag="H", val="Q")

# --- Socket (§5.10) ----------------------------------------------------------------------------

VSOCK_CID_HOST = 2
"""§5.10.4: addresses 0, 1, 2 and 0xFFFFFFFF are reserved; 2 is the host."""
VSOCK_F_STREAM = 0
VSOCK_F_SEQPACKET = 1

VSOCK_TYPE_STREAM = 1
VSOCK_OP_REQUEST = 1
VSOCK_OP_RESPONSE = 2
VSOCK_OP_RST = 3
VSOCK_OP_SHUTDOWN = 4
VSOCK_OP_RW = 5
VSOCK_OP_CREDIT_UPDATE = 6
VSOCK_OP_CREDIT_REQUEST = 7
VSOCK_SHUTDOWN_RCV = 1
VSOCK_SHUTDOWN_SEND = 2
VSOCK_EVENT_TRANSPORT_RESET = 0

VSOCK_CONFIG = Record("virtio_vsock_config", guest_cid="Q")
VSOCK_EVENT = Record("virtio_vsock_event", id="I")
VSOCK_HDR = Record(
    "virtio_vsock_hdr",
    src_cid="Q",
    dst_cid="Q",
    src_port="I",
    dst_port="I",
    len="I",
    type="H",
    op="H",
    flags="I",
    buf_alloc="I",
    fwd_cnt="I",
)
