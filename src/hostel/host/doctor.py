"""What this host offers to machines, as a frozen report. Views draw it; nothing here prints.

Each row is tried, not guessed: a device is opened, a program is run, a namespace is made. A row says
what was found and, unless all is well, what that costs and the one command that mends it.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hostel import cache
from hostel.errors import HostelError, MissingTool

from . import kernels, shares, toolbox

State = Literal["ok", "limited", "missing"]

KVM = "/dev/kvm"
QEMU = "qemu-system-x86_64"
MIB = 1 << 20
GIB = 1 << 30

ENOUGH_SPACE = 200 * MIB
"""A fetched kernel (25 MiB), unpacked (103 MiB), and its decompressed image (40 MiB)."""


class Finding(msgspec.Struct, frozen=True):
    """One row."""

    name: str
    state: State
    found: str
    cost: str = ""
    cure: str = ""


class Host(msgspec.Struct, frozen=True):
    """Which host it is."""

    kernel: str
    cpu: str
    cpus: int
    memory: int
    system: str


class Report(msgspec.Struct, frozen=True):
    """All rows, and whether `hostel run` can work."""

    host: Host
    findings: tuple[Finding, ...]
    engine: Literal["kvm", "qemu", ""]
    """What `auto` takes; empty if nothing can run."""
    obstacles: tuple[str, ...]
    """The rows without which `hostel run` cannot work."""

    @property
    def works(self) -> bool:
        return not self.obstacles


def examine() -> Report:
    """Look at everything."""
    findings = tuple(check() for check in CHECKS)
    state = {finding.name: finding.state for finding in findings}
    engine: Literal["kvm", "qemu", ""] = ""
    if state["KVM"] == "ok":
        engine = "kvm"
    elif state["QEMU"] == "ok":
        engine = "qemu"
    needed = ("guest kernel", "C compiler")
    obstacles = tuple(name for name in needed if state[name] == "missing")
    if not engine:
        obstacles = ("KVM", "QEMU", *obstacles)
    return Report(_host(), findings, engine, obstacles)


# -- what runs a machine ----------------------------------------------------------------------


def _kvm() -> Finding:
    from hostel.kvm.probe import probe

    report = probe()
    if report.usable:
        return Finding("KVM", "ok", report.reason)
    cost = "machines run in QEMU's emulation: about ten times slower"
    if not report.present:
        return Finding("KVM", "missing", report.reason, cost, _kvm_module(report.hardware))
    if not report.openable and not os.access(KVM, os.R_OK | os.W_OK):
        return Finding("KVM", "limited", f"{KVM} is not yours to open", cost, _permission(KVM))
    cure = "use a host with VT-x or AMD-V: bare metal, or nested virtualization switched on"
    return Finding("KVM", "limited", report.reason, cost, cure)


def _kvm_module(hardware: str) -> str:
    if hardware:
        return _root(f"modprobe {'kvm_intel' if hardware == 'vmx' else 'kvm_amd'}")
    return "switch on VT-x or AMD-V in the firmware; in a virtual machine: nested virtualization"


def _qemu() -> Finding:
    cost = "no engine qemu: nothing runs where KVM cannot"
    cure = _install("qemu-system-x86")
    path = _which(QEMU)
    if path is None:
        return Finding("QEMU", "missing", f"no {QEMU}", cost, cure)
    code, text = _run(path, "--version")
    if code:
        return Finding("QEMU", "missing", f"{path} fails: {text}", cost, cure)
    return Finding("QEMU", "ok", f"{path}, {text.split(' (')[0].removeprefix('QEMU emulator ')}")


def _soft() -> Finding:
    from hostel.soft.extra import unicorn_version

    try:
        return Finding("engine soft", "ok", f"unicorn {unicorn_version()}")
    except MissingTool as error:
        return Finding("engine soft", "missing", error.message, error.cost, error.cure)


def _kernels() -> Finding:
    name = "guest kernel"
    cost = "a machine needs one, unless --kernel gives it"
    try:
        best = kernels.find()
    except HostelError as error:
        return Finding(name, "missing", error.message, cost, "hostel kernel fetch")
    usable = sum(not kernel.problem for kernel in kernels.survey())
    more = f", {usable - 1} more" if usable > 1 else ""
    if best.modules is None:
        cost = "it works only with virtio, fuse and overlay built in"
        return Finding(name, "limited", f"{best.release}, no modules", cost, "hostel kernel fetch")
    return Finding(name, "ok", f"{best.release} ({best.source}){more}")


def _compiler() -> Finding:
    path = _which("cc")
    if path is None:
        cost = "the agent that runs inside the guest cannot be built"
        return Finding("C compiler", "missing", "no cc", cost, _install("gcc libc6-dev"))
    return Finding("C compiler", "ok", path)


# -- helpers ----------------------------------------------------------------------------------


def _virtiofsd() -> Finding:
    places = ("virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
    found = _which(*places)
    if found is None:
        cost = "hostel serves the host's files itself, which takes longer"
        return Finding("virtiofsd", "limited", "not found", cost, _install("virtiofsd"))
    if (most := shares.most_open_files()) < shares.ENOUGH_FILES:
        cost = "hostel serves the files of larger machines itself, which takes longer"
        found += f", but {most} open files at most"
        return Finding("virtiofsd", "limited", found, cost, shares.more_files(shares.ENOUGH_FILES))
    return Finding("virtiofsd", "ok", found)


def _program(name: str, program: str, package: str, cost: str) -> Finding:
    path = _which(program)
    if path is None:
        return Finding(name, "missing", f"no {program}", cost, _install(package))
    return Finding(name, "ok", path)


def _storage_daemon() -> Finding:
    cost = "engine kvm takes raw disk images only, and makes no overlays"
    return _program("storage daemon", "qemu-storage-daemon", "qemu-system-common", cost)


def _passt() -> Finding:
    return _program("passt", "passt", "passt", "no network for guests without root")


def _apt() -> Finding:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if _which(tool) is None]
    if missing:
        cost = "`hostel kernel fetch` cannot work; give kernels with --kernel"
        return Finding("apt", "missing", f"no {' and no '.join(missing)}", cost)
    return Finding("apt", "ok", "fetches guest kernels, without root")


# -- the kernel's data planes and devices -----------------------------------------------------


def _device(name: str, path: str, cost: str, module: str) -> Finding:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return _closed_device(name, path, cost, module, error)
    return Finding(name, "ok", f"{path} opens")


def _closed_device(name: str, path: str, cost: str, module: str, error: OSError) -> Finding:
    if error.errno in (errno.EACCES, errno.EPERM):
        return Finding(name, "limited", f"{path} is not yours to open", cost, _permission(path))
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        known = _known_module(module)
        found = f"no {path}" if known else f"no {path}: this kernel has no {module}"
        cure = _root(f"modprobe {module}") if known else "boot a kernel that has it"
        return Finding(name, "missing", found, cost, cure)
    return Finding(name, "limited", f"{path}: {error.strerror}", cost)


def _known_module(module: str) -> bool:
    """Whether this kernel can load it; yes, if nobody can tell."""
    modinfo = _which("modinfo")
    return modinfo is None or _run(modinfo, "-n", module)[0] == 0


def _permission(path: str) -> str:
    """Join the group that may open it; if there is none but root, let it be kvm's (as udev does)."""
    gid = os.stat(path).st_gid
    if gid == 0:
        return _root(f"setfacl -m u:{os.getuid()}:rw {path}")
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        group = str(gid)
    return _root(f"usermod -aG {group} $USER") + ", then log in again"


def _vhost_net() -> Finding:
    cost = "packets pass through user space: slower networks"
    return _device("vhost-net", "/dev/vhost-net", cost, "vhost_net")


def _vhost_vsock() -> Finding:
    cost = "sockets between host and guest pass through user space: slower"
    return _device("vhost-vsock", "/dev/vhost-vsock", cost, "vhost_vsock")


def _tun() -> Finding:
    return _device("tun", "/dev/net/tun", "no tap devices: networks through passt only", "tun")


def _bridge() -> Finding:
    cost = "no networks of hostel's own (nat, isolated): networks through passt only"
    argv = ("ip", "link", "add", "try0", "type", "bridge")
    return _tried("bridge", argv, "iproute2", cost, "modprobe bridge")


def _nft() -> Finding:
    cost = "no networks of hostel's own, no published ports, no allow-lists: passt only"
    argv = ("nft", "add table inet try; add chain inet try c { type nat hook output priority 0; }")
    return _tried("nftables", argv, "nftables", cost, "modprobe nf_tables nft_chain_nat")


def _tried(name: str, argv: tuple[str, ...], package: str, cost: str, module: str) -> Finding:
    """A program that changes a network, run in a network namespace of its own."""
    path = _which(argv[0])
    if path is None:
        return Finding(name, "missing", f"no {argv[0]}", cost, _install(package))
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    code, text = _run("unshare", "--net", *user, path, *argv[1:])
    if code and user:
        return Finding(name, "limited", f"{path}, untried: {text}", cost, "run this as root")
    if code:
        return Finding(name, "limited", text, cost, _root(module))
    return Finding(name, "ok", path)


def _vfio() -> Finding:
    return _device("VFIO", "/dev/vfio/vfio", "no passthrough of host devices", "vfio-pci")


def _iommu() -> Finding:
    groups = _entries("/sys/kernel/iommu_groups")
    if groups:
        return Finding("IOMMU", "ok", f"{groups} groups")
    cure = "switch it on in the firmware and boot with intel_iommu=on (AMD: on by itself)"
    return Finding("IOMMU", "missing", "no groups", "no safe passthrough of host devices", cure)


def _hugepages() -> Finding:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free = _number(pool / "free_hugepages")
    if free:
        return Finding("hugepages", "ok", f"{free} free of 2 MiB")
    transparent = _word("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    found = f"none reserved; transparent ones for shared memory: {transparent or 'no'}"
    cost = "--hugepages fails; more page faults"
    return Finding("hugepages", "limited", found, cost, _root("sysctl vm.nr_hugepages=512"))


def _namespaces() -> Finding:
    code, text = _run("unshare", "--user", "--map-root-user", "true")
    if code == 0:
        return Finding("user namespaces", "ok", "can be made")
    cost = "helpers run without a sandbox of their own"
    for switch in (
        "kernel.apparmor_restrict_unprivileged_userns",
        "kernel.unprivileged_userns_clone",
    ):
        path = Path("/proc/sys", *switch.split("."))
        if path.exists():
            value = 0 if "apparmor" in switch else 1
            return Finding(
                "user namespaces", "limited", text, cost, _root(f"sysctl {switch}={value}")
            )
    return Finding(
        "user namespaces", "limited", text, cost, _root("sysctl user.max_user_namespaces=1000")
    )


# -- room -------------------------------------------------------------------------------------


def _space(name: str, folder: Path, need: int, cost: str, cure: str) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {_size(free)} free"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, "limited", f"{folder} is not yours to write", cost, cure)
    if free < need:
        return Finding(name, "limited", found, cost, cure)
    return Finding(name, "ok", found)


def _cache() -> Finding:
    cost = "a kernel cannot be fetched or unpacked"
    cure = "make room there, or set XDG_CACHE_HOME to another disk"
    return _space("cache", cache.home(), ENOUGH_SPACE, cost, cure)


# -- small things -----------------------------------------------------------------------------


def _host() -> Host:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    system = release.get("PRETTY_NAME", "Linux")
    return Host(platform.release(), _cpu_name(), len(os.sched_getaffinity(0)), memory, system)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _which(*programs: str) -> str | None:
    """The first of them that is there, found as an engine finds it."""
    for program in programs:
        with contextlib.suppress(MissingTool):
            return toolbox.find(program, package="", cost="")
    return None


def _run(*argv: str) -> tuple[int, str]:
    """A program's exit code and its first line."""
    try:
        result = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=10,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return result.returncode, result.stdout.strip().split("\n")[0]


def _root(command: str) -> str:
    return command if os.getuid() == 0 else f"sudo {command}"


def _install(package: str) -> str:
    if _which("apt-get") is None:
        return f"install what your distribution calls {package}"
    return _root(f"apt install {package}")


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count // MIB} MiB"


def _entries(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _word(path: str) -> str:
    """The chosen word of a switch such as ``always [never]``."""
    try:
        text = Path(path).read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


CHECKS: tuple[Callable[[], Finding], ...] = (
    _kvm,
    _qemu,
    _soft,
    _kernels,
    _virtiofsd,
    _compiler,
    _storage_daemon,
    _passt,
    _apt,
    _vhost_net,
    _vhost_vsock,
    _tun,
    _bridge,
    _nft,
    _vfio,
    _iommu,
    _hugepages,
    _namespaces,
    _cache,
)
