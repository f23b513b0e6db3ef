"""The kernel's vhost: requests, structures, feature bits. Named like <linux/vhost.h> without ``VHOST_``.

The ABI test compares all of it with the header. A flexible array at a structure's end is left out, as
it is in the size that a request number carries (``SET_MEM_TABLE``).
"""

from __future__ import annotations

from .record import Record

MEMORY = Record("vhost_memory", nregions="I", padding="I")
MEMORY_REGION = Record(
    "vhost_memory_region",
    guest_phys_addr="Q",
    memory_size="Q",
    userspace_addr="Q",
    flags_padding="Q",
)
VRING_STATE = Record("vhost_vring_state", index="I", num="I")
VRING_FILE = Record("vhost_vring_file", index="I", fd="i")
VRING_ADDR = Record(
    "vhost_vring_addr",
    index="I",
    flags="I",
    desc_user_addr="Q",
    used_user_addr="Q",
    avail_user_addr="Q",
    log_guest_addr="Q",
)
U64 = Record("__u64", value="Q")
INT = Record("int", value="i")

FILE_UNBIND = -1
"""In place of a file descriptor: none from now on."""

F_LOG_ALL = 26
NET_F_VIRTIO_NET_HDR = 27
"""vhost is to add the frame's header itself, for a backend without one."""
BACKEND_F_IOTLB_MSG_V2 = 1


def _io(number: int) -> int:
    """<asm-generic/ioctl.h>; 0xAF is vhost's letter."""
    return 0xAF << 8 | number


def _iow(number: int, layout: Record) -> int:
    return 1 << 30 | layout.size << 16 | _io(number)


def _ior(number: int, layout: Record) -> int:
    return 2 << 30 | layout.size << 16 | _io(number)


# fmt: off
GET_FEATURES         = _ior(0x00, U64)
SET_FEATURES         = _iow(0x00, U64)
SET_OWNER            = _io(0x01)
SET_MEM_TABLE        = _iow(0x03, MEMORY)
SET_VRING_NUM        = _iow(0x10, VRING_STATE)
SET_VRING_ADDR       = _iow(0x11, VRING_ADDR)
SET_VRING_BASE       = _iow(0x12, VRING_STATE)
GET_VRING_BASE       = 3 << 30 | VRING_STATE.size << 16 | _io(0x12)
SET_VRING_KICK       = _iow(0x20, VRING_FILE)
SET_VRING_CALL       = _iow(0x21, VRING_FILE)
SET_VRING_ERR        = _iow(0x22, VRING_FILE)
SET_BACKEND_FEATURES = _iow(0x25, U64)
GET_BACKEND_FEATURES = _ior(0x26, U64)
NET_SET_BACKEND      = _iow(0x30, VRING_FILE)
VSOCK_SET_GUEST_CID  = _iow(0x60, U64)
VSOCK_SET_RUNNING    = _iow(0x61, INT)
