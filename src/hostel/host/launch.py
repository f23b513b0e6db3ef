"""Runs a file system daemon where it can see one share and, if that is read-only, write nothing.

    python -IS launch.py PARENT PRELOAD SOURCE NAME STAGE ro|rw PROGRAM ARGUMENT…

A program of its own, not a module of ours: it imports next to nothing, for it runs before each share.

::

    parent-death signal
      → private mount namespace      (a user namespace around it if we may not make one otherwise)
      → SOURCE bound to STAGE, with all that is mounted below it
      → the host's live kernel interfaces below STAGE masked by empty directories
      → ro: every mount of the namespace read-only, STAGE among them
      → exec PROGRAM

Read-only is a property of the mounts, which the daemon has no right to change after it dropped
CAP_SYS_ADMIN: what a hostile guest makes of the daemon does not matter. The namespace is private, so
nothing that the host mounts later comes in, and it ends with its last process.

In a user namespace one's own uid and gid are mapped to themselves, nothing else is: the files of
others are shown as of ``nobody`` (65534), their permissions hold as before.
"""

import ctypes
import os
import resource
import sys

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY = 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
NR_MOUNT_SETATTR = 442  # the same on every architecture
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
CAPABILITY_VERSION = 0x20080522
# chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap: what virtiofsd keeps;
# setpcap, sys_chroot: what it takes to get rid of the rest
CAPABILITIES = (0, 1, 3, 4, 6, 7, 27, 31, 8, 18)
SECCOMP_MODE_FILTER = 2
IDENTITY_CALLS = (116, 117, 119)  # setgroups, setresuid, setresgid on x86-64
SIGKILL = 9

KERNEL_DIRECTORIES = ("/dev", "/proc", "/run", "/sys")
KERNEL_FILE_SYSTEMS = {
    "autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
    "devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore",
    "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs", "xenfs",
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """``struct sock_filter``, linux/filter.h."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    """``struct sock_fprog``, linux/filter.h."""

    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Filter))]


def fail(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.exit(1)


def check(result: int, what: str) -> None:
    if result < 0:
        fail(f"{what}: {os.strerror(ctypes.get_errno())}")


def die_with(parent: int) -> None:
    """End when the parent ends. Must be said again after credentials change (prctl(2))."""
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "parent-death signal")
    if os.getppid() != parent:
        sys.exit(1)


def enter_namespace() -> bool:
    """A mount namespace of our own. True if it took a user namespace to get one."""
    if libc.unshare(CLONE_NEWNS) == 0:
        return False
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0:
        fail(
            f"neither root nor a user namespace: {os.strerror(ctypes.get_errno())}; without one no "
            "file of the host can be shared safely; allow them: sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns"
        )
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode())
    check(result, f"mount on {target}")


def empty(target: str, flags: int) -> None:
    options = MS_NOSUID | MS_NODEV | MS_NOEXEC | flags
    mount("none", target, "tmpfs", options, "mode=0555,size=16k,nr_inodes=4")


def bind(source: str, name: str, stage: str) -> None:
    """``source`` at ``stage``; a file, as ``name`` in an otherwise empty directory there."""
    target = stage
    if name:
        empty(stage, 0)
        target = os.path.join(stage, name)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    result = libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND | MS_REC, None)
    check(result, f"cannot share {source}")


def unescape(field: str) -> str:
    """A path as /proc/self/mountinfo writes it (proc(5)): blanks and the like in octal."""
    return os.fsdecode(field.encode().decode("unicode_escape").encode("latin-1"))


def kernel_mounts(stage: str) -> list[str]:
    """Where kernel interfaces are mounted below ``stage``."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            point, kind = unescape(fields[4]), fields[fields.index("-") + 1]
            if kind in KERNEL_FILE_SYSTEMS and (point + "/").startswith(stage + "/"):
                found.append(point)
    return found


def mask(source: str, stage: str) -> None:
    """Empty directories over the host's kernel interfaces, and over where they usually are."""
    prefix = source.rstrip("/") + "/"
    usual = [
        stage + "/" + path[len(prefix) :] for path in KERNEL_DIRECTORIES if path.startswith(prefix)
    ]
    covered = ""
    for point in sorted({*kernel_mounts(stage), *filter(os.path.isdir, usual)}):
        if point == stage:
            fail(f"{source} is an interface to this host's kernel and cannot be shared")
        if covered and point.startswith(covered + "/"):
            continue
        covered = point
        if os.path.isdir(point):
            empty(point, MS_RDONLY)
        else:
            libc.mount(b"/dev/null", os.fsencode(point), None, MS_BIND, None)


def make_read_only() -> None:
    """Every mount of this namespace, by mount_setattr(2) (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    result = libc.syscall(
        NR_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    check(result, "cannot make the share read-only (needs Linux 5.12)")


def keep_capabilities() -> None:
    """Through exec, which for any uid but 0 keeps the ambient ones only (capabilities(7))."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data), "capget")
    data[2], data[5] = data[1], data[4]  # inheritable: all that is permitted
    check(libc.capset(header, data), "capset")
    for number in CAPABILITIES:
        check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0), "ambient")


def stay_the_caller() -> None:
    """Let the system calls that change who we are do nothing and succeed (seccomp(2)).

    In this user namespace there is nobody else to be, and groups cannot be dropped; but virtiofsd ends
    if it may not drop them, and refuses to make a file for a user of the guest that it cannot become.
    So what any user of the guest makes is the caller's. Their groups' files show as nobody's, and the guest's
    own check refuses them.
    """
    load_number, if_equal, give = 0x20, 0x15, 0x06
    allow, succeed = 0x7FFF0000, 0x00050000
    program = [(load_number, 0, 0, 0)]
    for left, number in enumerate(IDENTITY_CALLS):
        program.append((if_equal, len(IDENTITY_CALLS) - left, 0, number))
    program += [(give, 0, 0, allow), (give, 0, 0, succeed)]
    instructions = (Filter * len(program))(*(Filter(*entry) for entry in program))
    header = Program(len(program), instructions)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    result = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0)
    check(result, "seccomp")


def raise_file_limit() -> None:
    """virtiofsd keeps a descriptor for each file that the guest's kernel remembers: a walk over the
    host's root is some hundred thousand. Root may raise the limit; anyone else, up to their own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/proc/sys/fs/nr_open") as file:
        most = int(file.read())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parent, (preload, source, name, stage, mode, *command) = int(sys.argv[1]), sys.argv[2:]
    die_with(parent)
    try:
        in_user_namespace = enter_namespace()
        if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) < 0:
            fail(f"private mounts: {os.strerror(ctypes.get_errno())}")
        bind(source, name, stage)
        mask(source, stage)
        if mode == "ro":
            make_read_only()
        raise_file_limit()
        if in_user_namespace:
            keep_capabilities()
            stay_the_caller()
        die_with(parent)
        if preload:
            fd = os.open(preload, os.O_RDONLY)  # by number: a path may hold blanks and colons
            os.set_inheritable(fd, True)
            os.environ["LD_PRELOAD"] = f"/proc/self/fd/{fd}"
        os.execv(command[0], command)
    except OSError as error:
        fail(f"{error.filename or source}: {error.strerror}")


main()
