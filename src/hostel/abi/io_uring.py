"""io_uring: system calls, operations and the rings' layouts (<linux/io_uring.h>, x86-64 numbers)."""

from __future__ import annotations

from .record import Record

SYS_SETUP = 425
SYS_ENTER = 426
SYS_REGISTER = 427

OFF_SQ_RING = 0
OFF_SQES = 0x1000_0000
FEAT_SINGLE_MMAP = 1 << 0
FEAT_NODROP = 1 << 1
FEAT_SUBMIT_STABLE = 1 << 2
REGISTER_EVENTFD = 4
OP_READV = 1
OP_WRITEV = 2
OP_READ = 22
OP_WRITE = 23

PARAMS = Record(
    "io_uring_params",
    sq_entries="I",
    cq_entries="I",
    flags="I",
    sq_thread_cpu="I",
    sq_thread_idle="I",
    features="I",
    wq_fd="I",
    resv="12s",
    sq_off="40s",
    cq_off="40s",
)
SQ_OFFSETS = Record(
    "io_sqring_offsets",
    head="I",
    tail="I",
    ring_mask="I",
    ring_entries="I",
    flags="I",
    dropped="I",
    array="I",
    resv1="I",
    resv2="Q",
)
CQ_OFFSETS = Record(
    "io_cqring_offsets",
    head="I",
    tail="I",
    ring_mask="I",
    ring_entries="I",
    overflow="I",
    cqes="I",
    flags="I",
    resv1="I",
    resv2="Q",
)
SQE = Record(
    "io_uring_sqe",
    opcode="B",
    flags="B",
    ioprio="H",
    fd="i",
    off="Q",
    addr="Q",
    len="I",
    rw_flags="I",
    user_data="Q",
    buf_index="H",
    personality="H",
    splice_fd_in="i",
    addr3="Q",
    __pad2="8s",
)
CQE = Record("io_uring_cqe", user_data="Q", res="i", flags="I")
IOVEC = Record("iovec", iov_base="Q", iov_len="Q")
