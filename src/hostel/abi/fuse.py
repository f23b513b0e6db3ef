"""The FUSE kernel protocol 7.38: operations, flags, structures.

Named like linux/fuse.h without ``FUSE_``; the ABI test compares all of it with that header.
"""

from __future__ import annotations

from .record import Record

KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 38
ROOT_ID = 1

# --- Operations --------------------------------------------------------------------------------

LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
READLINK = 5
SYMLINK = 6
MKNOD = 8
MKDIR = 9
UNLINK = 10
RMDIR = 11
RENAME = 12
LINK = 13
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
SETXATTR = 21
GETXATTR = 22
LISTXATTR = 23
REMOVEXATTR = 24
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
FSYNCDIR = 30
ACCESS = 34
CREATE = 35
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
FALLOCATE = 43
READDIRPLUS = 44
RENAME2 = 45
LSEEK = 46
COPY_FILE_RANGE = 47

# --- Flags of INIT -----------------------------------------------------------------------------

ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
EXPORT_SUPPORT = 1 << 4
BIG_WRITES = 1 << 5
AUTO_INVAL_DATA = 1 << 12
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
HANDLE_KILLPRIV_V2 = 1 << 28
SETXATTR_EXT = 1 << 29

# --- Flags of other operations -----------------------------------------------------------------

FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_KILL_SUIDGID = 1 << 11
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
GETATTR_FH = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
FSYNC_FDATASYNC = 1 << 0

# --- Structures --------------------------------------------------------------------------------

IN_HEADER = Record(
    "fuse_in_header",
    len="I",
    opcode="I",
    unique="Q",
    nodeid="Q",
    uid="I",
    gid="I",
    pid="I",
    padding="I",
)
OUT_HEADER = Record("fuse_out_header", len="I", error="i", unique="Q")
INIT_IN = Record("fuse_init_in", major="I", minor="I", max_readahead="I", flags="I")
"""As far as every kernel sends it."""
INIT_OUT = Record(
    "fuse_init_out",
    major="I",
    minor="I",
    max_readahead="I",
    flags="I",
    max_background="H",
    congestion_threshold="H",
    max_write="I",
    time_gran="I",
    max_pages="H",
    map_alignment="H",
    flags2="I",
    unused="28s",
)
_ATTR = {
    **{name: "Q" for name in ("ino", "size", "blocks", "atime", "mtime", "ctime")},
    **{name: "I" for name in ("atimensec", "mtimensec", "ctimensec", "mode", "nlink")},
    **{name: "I" for name in ("uid", "gid", "rdev", "blksize", "flags")},
}
ATTR = Record("fuse_attr", **_ATTR)
ATTR_OUT = Record(
    "fuse_attr_out", attr_valid="Q", attr_valid_nsec="I", dummy="I", attr=f"{ATTR.size}s"
)
ENTRY_OUT = Record(
    "fuse_entry_out",
    nodeid="Q",
    generation="Q",
    entry_valid="Q",
    attr_valid="Q",
    entry_valid_nsec="I",
    attr_valid_nsec="I",
    attr=f"{ATTR.size}s",
)
FORGET_IN = Record("fuse_forget_in", nlookup="Q")
BATCH_FORGET_IN = Record("fuse_batch_forget_in", count="I", dummy="I")
FORGET_ONE = Record("fuse_forget_one", nodeid="Q", nlookup="Q")
GETATTR_IN = Record("fuse_getattr_in", getattr_flags="I", dummy="I", fh="Q")
SETATTR_IN = Record(
    "fuse_setattr_in",
    valid="I",
    padding="I",
    fh="Q",
    size="Q",
    lock_owner="Q",
    atime="Q",
    mtime="Q",
    ctime="Q",
    atimensec="I",
    mtimensec="I",
    ctimensec="I",
    mode="I",
    unused4="I",
    uid="I",
    gid="I",
    unused5="I",
)
MKNOD_IN = Record("fuse_mknod_in", mode="I", rdev="I", umask="I", padding="I")
MKDIR_IN = Record("fuse_mkdir_in", mode="I", umask="I")
RENAME_IN = Record("fuse_rename_in", newdir="Q")
RENAME2_IN = Record("fuse_rename2_in", newdir="Q", flags="I", padding="I")
LINK_IN = Record("fuse_link_in", oldnodeid="Q")
OPEN_IN = Record("fuse_open_in", flags="I", open_flags="I")
OPEN_OUT = Record("fuse_open_out", fh="Q", open_flags="I", padding="I")
CREATE_IN = Record("fuse_create_in", flags="I", mode="I", umask="I", open_flags="I")
READ_IN = Record(
    "fuse_read_in",
    fh="Q",
    offset="Q",
    size="I",
    read_flags="I",
    lock_owner="Q",
    flags="I",
    padding="I",
)
WRITE_IN = Record(
    "fuse_write_in",
    fh="Q",
    offset="Q",
    size="I",
    write_flags="I",
    lock_owner="Q",
    flags="I",
    padding="I",
)
WRITE_OUT = Record("fuse_write_out", size="I", padding="I")
STATFS_OUT = Record(
    "fuse_statfs_out",
    blocks="Q",
    bfree="Q",
    bavail="Q",
    files="Q",
    ffree="Q",
    bsize="I",
    namelen="I",
    frsize="I",
    padding="I",
    spare="24s",
)
RELEASE_IN = Record("fuse_release_in", fh="Q", flags="I", release_flags="I", lock_owner="Q")
FLUSH_IN = Record("fuse_flush_in", fh="Q", unused="I", padding="I", lock_owner="Q")
FSYNC_IN = Record("fuse_fsync_in", fh="Q", fsync_flags="I", padding="I")
ACCESS_IN = Record("fuse_access_in", mask="I", padding="I")
SETXATTR_IN = Record("fuse_setxattr_in", size="I", flags="I", setxattr_flags="I", padding="I")
GETXATTR_IN = Record("fuse_getxattr_in", size="I", padding="I")
GETXATTR_OUT = Record("fuse_getxattr_out", size="I", padding="I")
DIRENT = Record("fuse_dirent", ino="Q", off="Q", namelen="I", type="I")
FALLOCATE_IN = Record("fuse_fallocate_in", fh="Q", offset="Q", length="Q", mode="I", padding="I")
LSEEK_IN = Record("fuse_lseek_in", fh="Q", offset="Q", whence="I", padding="I")
LSEEK_OUT = Record("fuse_lseek_out", offset="Q")
COPY_FILE_RANGE_IN = Record(
    "fuse_copy_file_range_in",
    fh_in="Q",
    off_in="Q",
    nodeid_out="Q",
    fh_out="Q",
    off_out="Q",
    len="Q",
    flags="Q",
)
