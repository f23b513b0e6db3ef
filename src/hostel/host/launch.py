"""Runs a file server where it can see one share and, if that is read-only, write nothing.

    python -IS launch.py PARENT PRELOAD SOURCE NAME STAGE ro|rw PROGRAM ARGUMENT…

A program of its own, not a module of ours: it imports next to nothing, for it runs before each share.

::

    parent-death signal
      → private mount namespace
      → SOURCE bound to STAGE, with all that is mounted below it
      → the host's live kernel interfaces below STAGE masked by empty directories
      → ro: every mount of the namespace read-only, STAGE among them
      → exec PROGRAM; or, where that is "python", our own server here (fileserver.py)

Read-only is a property of the mounts, which the server has no right to change after it dropped
CAP_SYS_ADMIN: what a hostile guest makes of the server does not matter. The namespace is private, so
nothing that the host mounts later comes in, and it ends with its last process.

An ordinary user may make a mount namespace inside a user namespace only, and there the files of others
are shown as of ``nobody`` (65534). So a child goes in, makes the mounts, and hands out the root of its
namespace as a descriptor; the server stays outside and works below that. Mounts, masks and read-only
hold for whoever comes through the descriptor; owners are shown as they are outside. The server itself,
which still has all that the caller may do, is confined by ``jail.py``. ::

    launch.py ── fork ──► child: user and mount namespace, mounts, STAGE its root
              ◄─ "/" and the namespace, as descriptors ──┘ ends
      → jail → exec PROGRAM, its root that descriptor (openat.c)
"""

import ctypes
import os
import resource
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from hostel.host import jail

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY = 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
NR_MOUNT_SETATTR = 442  # the same on every architecture
PR_SET_PDEATHSIG = 1
NR_PIVOT_ROOT = 155  # this and the next line: x86-64
IDENTITY_CALLS = (116, 117, 119)  # setgroups, setresuid, setresgid
MNT_DETACH = 2
SIGKILL = 9

SYSTEM_DIRECTORIES = ("/etc", "/lib", "/lib64", "/proc", "/usr")
KERNEL_DIRECTORIES = ("/dev", "/proc", "/run", "/sys")
KERNEL_FILE_SYSTEMS = {
    "autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
    "devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore",
    "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs", "xenfs",
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


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


def enter_namespace() -> None:
    """A user namespace with the caller in it and nobody else, and a mount namespace of its own."""
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


def make_mounts(source: str, name: str, stage: str, *, read_only: bool) -> None:
    if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) < 0:
        fail(f"private mounts: {os.strerror(ctypes.get_errno())}")
    bind(source, name, stage)
    mask(source, stage)
    if read_only:
        make_read_only()


def make_root(stage: str) -> None:
    """``stage`` is all there is in this namespace (pivot_root(2), "pivot_root(".", ".")")."""
    os.chdir(stage)
    check(libc.syscall(NR_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "leave the old root")
    os.chdir("/")


def mounts_of_a_child(source: str, name: str, stage: str, *, read_only: bool) -> int:
    """The share's root, from a mount namespace that lasts as long as this process and what it execs."""
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        die_with(os.getppid())
        enter_namespace()
        make_mounts(source, name, stage, read_only=read_only)
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        make_root(stage)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        socket.send_fds(theirs, [b"."], [root, namespace])
        os._exit(0)
    theirs.close()
    _, found, _, _ = socket.recv_fds(ours, 1, 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code or len(found) != 2:
        os._exit(code or 1)  # the child has said why
    ours.close()
    for fd in found:
        os.set_inheritable(fd, True)
    return found[0]


def stay_outside(root: int, preload: int, *, read_only: bool) -> None:
    """virtiofsd as the caller, with what it would do to itself as root made to do nothing.

    It ends if it may not drop its groups, and refuses to make a file for a user of the guest that it cannot
    become. So what any user of the guest makes is the caller's.
    """
    jail.confine(root, read_only=read_only, readable=(*SYSTEM_DIRECTORIES, preload))
    jail.pretend(IDENTITY_CALLS)


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


def serve(root: int, options: str, places: str) -> None:
    """Our own server: this interpreter, now with the libraries of who started us."""
    sys.path[:] = places.split(os.pathsep)
    from hostel.host import fileserver

    fileserver.serve(root, options)


def main() -> None:
    parent, (preload, source, name, stage, mode, *command) = int(sys.argv[1]), sys.argv[2:]
    read_only, ours = mode == "ro", command[0] == "python"
    die_with(parent)
    try:
        raise_file_limit()
        library = os.open(preload, os.O_RDONLY) if preload else -1
        root = -1
        if libc.unshare(CLONE_NEWNS) == 0:
            make_mounts(source, name, stage, read_only=read_only)
            root = os.open(stage, os.O_PATH | os.O_DIRECTORY) if ours else -1
        else:
            root = mounts_of_a_child(source, name, stage, read_only=read_only)
        die_with(parent)
        if ours:
            serve(root, *command[1:])
            return
        if root >= 0:
            stay_outside(root, library, read_only=read_only)
            os.environ["HOSTEL_SHARE"] = str(root)
        if preload:  # by number: a path may hold blanks and colons
            os.set_inheritable(library, True)
            os.environ["LD_PRELOAD"] = f"/proc/self/fd/{library}"
        os.execv(command[0], command)
    except OSError as error:
        fail(f"{error.filename or source}: {error.strerror}")


main()
