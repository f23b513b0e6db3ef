"""How the keeper speaks to the kernel: ``ip -batch``, ``nft -f``, and files of /proc/sys.

Programs get their input and give their output in memory files: nobody waits on a pipe for anybody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from typing import TextIO

from hostel.errors import HostError, MissingTool

PLACES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin")
PACKAGES = {"ip": "iproute2", "nft": "nftables"}
SYSCTL = "/proc/sys/net/"
SIOCGIFHWADDR, SIOCETHTOOL = 0x8927, 0x8946
GDRVINFO, ARPHRD_ETHER = 3, 1
SIOCGIFMTU = 0x8921
TAP_SYSCTLS = {"ipv6/conf/{}/disable_ipv6": "1", "ipv4/conf/{}/rp_filter": "1"}
"""``rp_filter``: no route leads back to a tap, so that no sender is the right one (ip-sysctl.rst)."""


def find(program: str) -> str:
    """The path of ``ip`` or ``nft``. Not by ``toolbox``: its import costs more than the program's run."""
    for place in (*PLACES, *os.environ.get("PATH", "").split(":")):
        path = f"{place}/{program}"
        if os.access(path, os.X_OK):
            return path
    raise MissingTool(
        f"{program} is not installed",
        cost="no network of hostel's own",
        cure=f"apt-get install {PACKAGES[program]} (as root), or use --net user",
    )


def ip(lines: list[str]) -> None:
    """One batch of ``ip`` commands, in order up to the first that fails."""
    run([find("ip"), "-batch", "-"], "\n".join(lines) + "\n")


def nft(text: str) -> None:
    """One transaction: all of it or nothing."""
    run([find("nft"), "-f", "-"], text)


def run(argv: list[str], text: str = "") -> str:
    """A program's standard output; ``HostError`` with its first words if it fails."""
    given, output, errors = (os.memfd_create(name) for name in ("stdin", "stdout", "stderr"))
    try:
        os.write(given, text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        files = [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate((given, output, errors))]
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=files)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = _content(output)
        if code:
            words = _content(errors).strip() or said.strip() or f"exit code {code}"
            raise HostError(
                f"{os.path.basename(argv[0])}: {' | '.join(words.splitlines()[:2])}",
                cost="the network cannot be made",
                cure="see `hostel doctor`, or use --net user or none",
            )
        return said
    finally:
        for fd in (given, output, errors):
            os.close(fd)


def _content(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


def sysctl(name: str) -> str | None:
    """The value of ``net.NAME`` (with slashes: interface names have dots); None if there is none."""
    try:
        with open(SYSCTL + name) as file:
            return file.read().strip()
    except OSError:
        return None


def set_sysctl(name: str, value: str) -> None:
    """Write ``net.NAME``."""
    try:
        with open(SYSCTL + name, "w") as file:
            file.write(value)
    except OSError as error:
        raise HostError(
            f"cannot set net.{name.replace('/', '.')} to {value}: {error.strerror}",
            cost="guests would not reach what they should",
            cure="run where /proc/sys may be written, or use --net user",
        ) from None


def forward_delay(bridge: str) -> float:
    """Seconds for which a bridge's new port only listens, and carries nothing."""
    words = run([find("ip"), "-d", "link", "show", bridge]).split()
    centiseconds = int(words[words.index("forward_delay") + 1])
    speaks_stp = words[words.index("stp_state") + 1] == "1"
    return centiseconds / 100 * (2 if speaks_stp else 1)  # it listens, and then it learns


def silence(tap: str) -> None:
    """A port of a bridge has no IP layer of its own. Yet a bridge gives it what comes for a link-local MAC
    (``rules``, ``early``): a guest could advertise itself as the host's IPv6 router there."""
    for path, value in TAP_SYSCTLS.items():
        if sysctl(path.format(tap)) is not None:
            set_sysctl(path.format(tap), value)


def interfaces() -> set[str]:
    """Names of this network namespace's interfaces. Not from /sys, which may show another's."""
    with open("/proc/thread-self/net/dev") as file:
        return {line.split(":")[0].strip() for line in file if ":" in line}


def driver(name: str) -> str:
    """What an interface is, in its driver's word: ``bridge``, ``tun``, ``veth``, ``e1000e`` …; else empty."""
    from ctypes import addressof, c_char

    information = bytearray(GDRVINFO.to_bytes(4, "little").ljust(196, b"\0"))
    address = addressof(c_char.from_buffer(information))
    request = struct.pack("16sQ", name.encode(), address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, SIOCETHTOOL, request)
        except OSError:
            return ""
    return information[4:36].split(b"\0")[0].decode("ascii", "replace")


def is_ethernet(name: str) -> bool:
    """Whether it carries Ethernet frames; the loopback, say, does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFHWADDR, struct.pack("16s16x", name.encode()))
    return int(struct.unpack_from("H", answer, 16)[0]) == ARPHRD_ETHER


def mtu(name: str) -> int:
    """An interface's; 0 if it has gone."""
    request = struct.pack("16s16x", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, SIOCGIFMTU, request)
        except OSError:
            return 0
    return int(struct.unpack_from("i", answer, 16)[0])


def index(name: str) -> int:
    """An interface's number."""
    return socket.if_nametoindex(name)


@contextlib.contextmanager
def locked(path: str) -> Iterator[TextIO]:
    """A file that all keepers of this host share, made if need be; its holder may remove it."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError(f"cannot use {path}: {error.strerror}") from None
        with open(fd, "r+") as file:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_still(path, fd):
                yield file
                return


def _is_still(path: str, fd: int) -> bool:
    """Whether the file that we waited for is the one that is there now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False
