"""Inside the testbed: makes the server usable, runs the command, reports how it ended.

Started by testbed_init.c as the only child-bearing process (PID 1), on the host's own Python, in a
root that is the host's. Four virtio-serial ports lead back to testbed.py:

    testbed.control   lines of JSON: hello →, ← request, ← resize/signal/eof, exit →
    testbed.stdin     bytes, until the host says {"eof": true}
    testbed.stdout, testbed.stderr    bytes; the exit line counts them, so the host knows the last one

Rule: standard library only, and no import that a slow emulated CPU would feel.
"""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import struct
import sys
import termios
import threading
import time

PORTS = "/sys/class/virtio-ports"
MODULES = (
    *(
        "kvm_amd",
        "vhost_net",
        "vhost_vsock",
        "tun",
        "tap",
        "macvtap",
        "bridge",
        "veth",
        "virtio_net",
    ),
    *("vfio_pci", "vfio_iommu_type1", "nvme", "loop", "ext4"),
    *("nf_tables", "nft_chain_nat", "nft_masq", "nft_ct", "nft_compat"),
)
BEAT = 5.0
"""Seconds between two signs of life."""
GRACE = 2.0
"""Seconds that output may still come after the command's end, from children it left behind."""


def mount(kind: str, target: str, options: str = "", source: str = "none", flags: int = 0) -> None:
    import ctypes

    os.makedirs(target, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    kind_, data = kind.encode() or None, options.encode() or None
    if libc.mount(source.encode(), target.encode(), kind_, flags, data) != 0:
        print(f"testbed: mount {kind or source} on {target}: {os.strerror(ctypes.get_errno())}")


MS_BIND, MS_REC = 4096, 16384


def mount_basics() -> None:
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("devtmpfs", "/dev", "mode=755")
    mount("devpts", "/dev/pts", "mode=620,ptmxmode=666,gid=5")
    mount("tmpfs", "/dev/shm", "mode=1777")
    mount("tmpfs", "/run", "mode=755")
    mount("cgroup2", "/sys/fs/cgroup")
    mount("debugfs", "/sys/kernel/debug")
    mount("tracefs", "/sys/kernel/tracing")
    mount("hugetlbfs", "/dev/hugepages")
    links = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))
    for name, target in links:
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")


def mount_tmp(visible: list[str]) -> None:
    """A fresh /tmp, with those of the shared directories in it that live there on the host."""
    inside = [path for path in visible if path.startswith("/tmp/") and os.path.isdir(path)]
    handles = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in inside}
    mount("tmpfs", "/tmp", "mode=1777")
    for path, handle in handles.items():
        mount("", path, source=f"/proc/self/fd/{handle}", flags=MS_BIND | MS_REC)
        os.close(handle)


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 1 | 64)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS


def load_modules(directory: str, npt: str) -> None:
    """All at once by modprobe; a module that this kernel does not have is no error."""
    release = os.uname().release
    mount("", f"/usr/lib/modules/{release}", source=directory, flags=MS_BIND)
    with open("/run/testbed-modprobe.conf", "w") as file:
        file.write(f"options kvm_amd npt={npt} nested=1\n")
    modprobe = next(p for p in ("/usr/sbin/modprobe", "/sbin/modprobe") if os.path.exists(p))
    command = [modprobe, "-C", "/run/testbed-modprobe.conf", "-a", "-q", *MODULES]
    pid = os.posix_spawn(modprobe, command, {})
    os.waitpid(pid, 0)


def open_ports() -> dict[str, int]:
    """The port's name stands in sysfs; udev, which would make a link of it, does not run here."""
    ports: dict[str, int] = {}
    deadline = time.monotonic() + 20
    while len(ports) < 4 and time.monotonic() < deadline:
        for entry in os.listdir(PORTS):
            with open(f"{PORTS}/{entry}/name") as file:
                name = file.read().strip()
            if name.startswith("testbed.") and name[8:] not in ports:
                ports[name[8:]] = os.open(f"/dev/{entry}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.01)
    return ports


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Pump(threading.Thread):
    """Copies the command's output to a port until its end, and counts."""

    def __init__(self, source: int, port: int) -> None:
        super().__init__(daemon=True)
        self.source, self.port, self.count = source, port, 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                data = os.read(self.source, 65536)
            except OSError:  # EIO: the terminal's last user has closed it
                return
            if not data:
                return
            write_all(self.port, data)
            self.count += len(data)


class Command:
    """The command, its three streams (or one terminal), and the control line."""

    def __init__(self, request: dict, ports: dict[str, int]) -> None:  # type: ignore[type-arg]
        self.ports = ports
        self.tty = request["tty"]
        self.pumps: list[Pump] = []
        inputs, self.outputs = self._streams()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(request, inputs)
        for fd in set(inputs):
            os.close(fd)
        self.pumps = [Pump(fd, ports[name]) for name, fd in self.outputs]
        threading.Thread(target=self._feed, daemon=True).start()

    def _streams(self) -> tuple[list[int], list[tuple[str, int]]]:
        if self.tty:
            self.stdin, terminal = os.openpty()
            self.resize(*self.tty)
            return [terminal] * 3, [("stdout", self.stdin)]
        stdin, self.stdin = os.pipe()
        out, stdout = os.pipe()
        err, stderr = os.pipe()
        return [stdin, stdout, stderr], [("stdout", out), ("stderr", err)]

    def _child(self, request: dict, inputs: list[int]) -> None:  # type: ignore[type-arg]
        try:
            os.setsid()
            for target, fd in enumerate(inputs):
                os.dup2(fd, target)
            if self.tty:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for number in range(1, 32):
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    signal.signal(number, signal.SIG_DFL)
            os.chdir(request["cwd"])
            os.execvpe(request["argv"][0], request["argv"], request["env"])
        except FileNotFoundError:
            os.write(2, f"testbed: {request['argv'][0]}: not found\n".encode())
            os._exit(127)
        except OSError as error:
            os.write(2, f"testbed: {request['argv'][0]}: {error.strerror}\n".encode())
            os._exit(126)

    def _feed(self) -> None:
        """Standard input; a port that nobody holds on the host side reads as end of file."""
        while True:
            try:
                data = os.read(self.ports["stdin"], 65536)
                if not data:
                    break
                write_all(self.stdin, data)
            except OSError:
                break
        if not self.tty:
            os.close(self.stdin)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: int) -> None:
        """To the whole group: what a terminal would do with Ctrl-C."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Reap everybody (this is PID 1) until the command itself has ended."""
        while True:
            pid, status = os.wait()
            if pid == self.pid:
                return status

    def finish(self) -> dict[str, int]:
        code = os.waitstatus_to_exitcode(self.wait())
        deadline = time.monotonic() + GRACE
        for pump in self.pumps:
            pump.join(max(0.0, deadline - time.monotonic()))
        counts = [pump.count for pump in self.pumps] + [0]
        return {"exit": code if code >= 0 else 128 - code, "stdout": counts[0], "stderr": counts[1]}


def follow(control: int, command: Command) -> None:
    with os.fdopen(os.dup(control), "rb", buffering=0) as lines:
        buffer = b""
        while True:
            chunk = lines.read(4096)
            if not chunk:
                return
            *whole, buffer = (buffer + chunk).split(b"\n")
            for line in whole:
                message = json.loads(line)
                if "signal" in message:
                    command.signal(message["signal"])
                if "resize" in message:
                    command.resize(*message["resize"])


def beat(control: int) -> None:
    """Signs of life for the host's watchdog, from each CPU in turn: one that runs no more stops them all.
    Each line is one write, so none is torn."""
    for cpu in itertools.cycle(os.sched_getaffinity(0)):
        time.sleep(BEAT)
        os.sched_setaffinity(0, {cpu})  # 0 is the calling thread
        write_all(control, b'{"alive": true}\n')


def read_line(control: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(control, 1)
        line += byte
        if not byte:  # the driver has not yet been told that the host has the port open
            time.sleep(0.01)
    return line


def main() -> None:
    os.umask(0o022)
    mount_basics()
    ports = open_ports()
    write_all(ports["control"], b'{"hello": true}\n')
    request = json.loads(read_line(ports["control"]))
    mount_tmp(request["visible"])
    load_modules(request["modules"], request["npt"])
    bring_up_loopback()
    socket.sethostname("testbed")
    write_all(ports["control"], b'{"ready": true}\n')
    command = Command(request, ports)
    threading.Thread(target=follow, args=(ports["control"], command), daemon=True).start()
    threading.Thread(target=beat, args=(ports["control"],), daemon=True).start()
    write_all(ports["control"], json.dumps(command.finish()).encode() + b"\n")
    while True:
        time.sleep(60)  # the host ends the machine; the end of PID 1 would be a panic


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print(f"testbed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
