"""`./dev testbed`: an emulated x86 server under QEMU TCG, with the host's own root, that runs a command.

The picture:

    testbed.py ──┬── virtiofsd    the host's root, read-only, from a private mount namespace
                 └── qemu (TCG)   AMD-V, nested paging, IOMMU, a spare NIC and an NVMe disk
                       │ kernel: Debian's, from hostel's cache; initramfs: testbed_init.c and modules
                       │ root: overlay of the host's root and a tmpfs; nothing written there stays
                       └ testbed_guest.py: loads kvm_amd, vhost …, runs the command
    four virtio-serial ports carry control lines, stdin, stdout, stderr

Rules: standard library only (it runs before the virtual environment exists); standard output carries
the command's bytes only; every child dies with us (parent-death signal), and nothing is left on disk.
The server emulated is slow (a few per cent of native) and stalled in 2 of 20 boots when measured: a boot
that makes no progress is ended and tried again, and so is a server that stands still before the command
has said or read anything. We say so. Files: this one starts and ends it, testbed_session.py talks to it,
testbed_monitor.py looks at one that stands still.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator

from testbed_clock import frequency_khz
from testbed_monitor import processors
from testbed_parts import (
    TOP,
    TestbedError,
    build_initramfs,
    build_noatime_shim,
    module_directory,
    newest_kernel,
    program,
)
from testbed_session import PORTS, Session, Stalled, window_size

ATTEMPTS = 3
OWN_FAILURE = 125
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def say(text: str) -> None:
    print(f"testbed: {text}", file=sys.stderr, flush=True)


# --- The processes -----------------------------------------------------------------------------------

READ_ONLY = """
mount --make-rprivate /
while read -r _ _ _ _ target options _; do
  case ,$options, in
    *,ro,*) ;;
    *) mount -o "remount,bind,ro,$(echo "$options" | tr , '\\n' | grep -E '^(nosuid|nodev|noexec)$' |
         tr '\\n' ,)" "$(printf '%b' "$target")" 2>/dev/null ;;
  esac
done </proc/self/mountinfo
exec "$@"
"""
"""Every mount of a private name space made read-only: the guest's root cannot write the host's."""


def dying_with_us(command: list[str]) -> list[str]:
    return [program("setpriv"), "--pdeathsig", "KILL", "--", *command]


class Server:
    """One boot: virtiofsd, QEMU, and our ends of the sockets."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports: dict[str, socket.socket] = {}
        self.console = b""
        self.options = options
        self.kernel = newest_kernel()
        self.modules = module_directory(self.kernel)
        self.initramfs = build_initramfs(self.modules)
        self.log = os.memfd_create("testbed-log")
        self._start_qemu(self._start_virtiofsd())

    def _start(self, command: list[str], fds: tuple[int, ...]) -> None:
        self.processes.append(
            subprocess.Popen(
                dying_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=fds,
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle
            )
        )

    def _start_virtiofsd(self) -> socket.socket:
        """Returns QEMU's end. The listener has an abstract address: no file to leave behind."""
        client = socket.socket(socket.AF_UNIX)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")
            listener.listen(1)
            client.connect(listener.getsockname())
            daemon = program("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "virtiofsd")
            arguments = ["-f", f"--fd={listener.fileno()}", "-o", "source=/", "-o", "cache=always"]
            arguments += ["-o", "sandbox=chroot", "-o", "log_level=err"]
            jail = [program("unshare"), "--mount", "--", "/bin/sh", "-c", READ_ONLY, "sh"]
            if os.geteuid() != 0:
                jail.insert(1, "--map-root-user")
                jail += ["env", f"LD_PRELOAD={build_noatime_shim()}"]
            self._start([*jail, daemon, *arguments], (listener.fileno(),))
        return client

    def _start_qemu(self, root: socket.socket) -> None:
        inherited = [root]
        arguments = self._machine()
        arguments += ["-chardev", f"socket,id=root,fd={root.fileno()}"]
        arguments += ["-device", "vhost-user-fs-pci,chardev=root,tag=root,queue-size=1024"]
        for name in ("monitor", "console", *PORTS):
            ours, theirs = socket.socketpair()
            self.ports[name] = ours
            inherited.append(theirs)
            arguments += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
            if name in PORTS:
                arguments += ["-device", f"virtserialport,chardev={name},name=testbed.{name}"]
        disk = os.memfd_create("nvme")
        os.truncate(disk, 1 << 30)
        arguments += ["-drive", f"file=/proc/self/fd/{disk},if=none,id=nvme,format=raw"]
        arguments += ["-device", "nvme,drive=nvme,serial=testbed"]
        fds = tuple(sock.fileno() for sock in inherited)
        self._start([program("qemu-system-x86_64"), *arguments], (*fds, disk))
        os.close(disk)
        for sock in inherited:
            sock.close()

    def _machine(self) -> list[str]:
        memory, python = self.options.memory, os.path.realpath(sys.executable)
        rate = frequency_khz()
        append = (f"tsc_early_khz={rate} " if rate else "") + (
            "console=ttyS0 panic=-1 tsc=reliable clocksource=tsc intel_iommu=on cryptomgr.notests "
            "mitigations=off no_timer_check random.trust_cpu=on "
            f'-- "{python}" -IS "{TOP / "tools" / "testbed_guest.py"}"'
        )
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"),
            *("-M", "q35,kernel-irqchip=split,memory-backend=ram"),
            *("-smp", str(self.options.smp), "-m", memory),
            *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
            *("-device", "intel-iommu,intremap=on,caching-mode=on"),
            *("-kernel", str(next((self.kernel / "boot").glob("vmlinuz-*")))),
            *("-initrd", str(self.initramfs), "-append", append),
            *("-device", "virtio-serial-pci", "-serial", "chardev:console"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-netdev", "hubport,id=spare,hubid=0", "-device", "e1000e,netdev=spare,romfile="),
        ]

    @property
    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for sock in self.ports.values():
            sock.close()
        os.close(self.log)

    def last_words(self) -> list[str]:
        """The end of the console, what the processes said, and where the processors stand."""
        log = os.pread(self.log, 65536, 0).decode(errors="replace").splitlines()
        console = self.console.decode(errors="replace").splitlines()
        panic = next((n for n, line in enumerate(console) if "Kernel panic" in line), len(console))
        standing = [] if self.ended else processors(self.ports["monitor"], self.options.smp)
        return [*console[: panic + 1][-10:], *log[-5:], *standing]


@contextlib.contextmanager
def terminal(session: Session, wanted: bool) -> Iterator[None]:
    """The caller's terminal made transparent, its size followed, and restored on every way out."""
    if not wanted:
        yield
        return
    before = termios.tcgetattr(0)
    signal.signal(signal.SIGWINCH, lambda *_: session.send({"resize": window_size()}))
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def pass_signals(session: Session) -> None:
    """The first signal goes to the command; a second one of the same kind ends the testbed."""
    seen: set[int] = set()

    def handle(number: int, _frame: object) -> None:
        if number in seen:
            raise SystemExit(128 + number)
        seen.add(number)
        session.send({"signal": number})

    for number in SIGNALS:
        signal.signal(number, handle)


def end_at_once(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def attempt(options: argparse.Namespace) -> int:
    for number in SIGNALS:
        signal.signal(number, end_at_once)
    server = Server(options)
    try:
        session = Session(server)
        started = time.monotonic()
        session.boot()
        if options.verbose:
            say(f"up after {time.monotonic() - started:.1f} s")
        pass_signals(session)
        with terminal(session, options.tty):
            return session.run()
    except TestbedError:
        for line in server.last_words():
            say(f"| {line}")
        raise
    finally:
        server.stop()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev testbed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--smp", type=int, default=2, help="CPUs (default: 2)")
    parser.add_argument(
        "--npt", type=int, choices=(0, 1), default=1, help="nested paging (default: 1)"
    )
    parser.add_argument("--memory", default="4G", help="memory (default: 4G)")
    parser.add_argument("--share", action="append", default=[], help="keep DIR, in /tmp, visible")
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        metavar="SECONDS",
        help="end it when CMD has written nothing on standard output for so long (default: never)",
    )
    parser.add_argument("--console", action="store_true", help="show the boot on standard error")
    parser.add_argument("--verbose", action="store_true", help="say how long the boot took")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="default: a shell on the terminal"
    )
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    options.tty = os.isatty(0) and os.isatty(1)
    if not options.command:
        if not options.tty:
            parser.error("no command, and no terminal for a shell")
        options.command = [os.environ.get("SHELL", "/bin/bash")]
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt(options)
        except Stalled as error:
            say(f"{error}; attempt {number} of {ATTEMPTS}")
        except TestbedError as error:
            say(str(error))
            return OWN_FAILURE
    say("gave up")
    return OWN_FAILURE


if __name__ == "__main__":
    sys.exit(main())
