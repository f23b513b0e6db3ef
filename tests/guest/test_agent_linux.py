"""The agent as PID 1: Debian's kernel in QEMU, our initramfs, a virtio port, a root over virtiofs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.boot import initramfs
from hostel.errors import AgentError
from hostel.guest.build import agent_binary
from hostel.guest.client import AgentClient, Tty
from hostel.guest.protocol import How
from hostel.guest.steps import EnterRoot, Hostname, MakeDirectory, Mount, Overlay, Step
from hostel.host import kernels

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

WANTED = ("virtio_pci", "virtio_console", "virtiofs", "overlay")
CMDLINE = (
    "console=ttyS0 quiet cryptomgr.notests mitigations=off tsc=reliable no_timer_check panic=-1"
)
PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
ROOT: list[Step] = [
    *(MakeDirectory(path) for path in ("/lower", "/rw", "/root")),
    Mount("virtiofs", "host", "/lower", flags=1),
    Mount("tmpfs", "tmpfs", "/rw"),
    *(MakeDirectory(path) for path in ("/rw/upper", "/rw/work")),
    Overlay("/lower", "/rw/upper", "/rw/work", "/root"),
    EnterRoot("/root"),
    Hostname("guest"),
]


@pytest.fixture(scope="module")
def kernel() -> kernels.Kernel:
    found = [k for k in kernels.survey() if k.modules and not k.problem]
    if not found:
        pytest.skip("no guest kernel with modules here: hostel kernel fetch")
    return found[0]


@pytest.fixture
def runtime() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hostel-test-") as name:
        yield Path(name)


def image(kernel: kernels.Kernel) -> Path:
    return initramfs.build(kernel.modules, kernel.release, WANTED, agent_binary())


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def share(runtime: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The host's root, by QEMU's own virtiofsd or the one written in Rust."""
    path = runtime / "fs"
    old = next(filter(os.path.exists, ("/usr/lib/qemu/virtiofsd",)), None)
    if old:
        return running([old, f"--socket-path={path}", "-o", "source=/,sandbox=chroot"])
    new = shutil.which("virtiofsd") or "/usr/libexec/virtiofsd"
    return running([new, f"--socket-path={path}", "--shared-dir=/", "--sandbox=chroot"])


def qemu(runtime: Path, kernel: kernels.Kernel, initrd: Path, *more: str) -> list[str]:
    return [
        *("qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512"),
        *("-nodefaults", "-no-reboot", "-display", "none"),
        *("-serial", f"file:{runtime}/console"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", CMDLINE),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={runtime}/agent,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=hostel.agent"),
        *more,
    ]


def with_root(runtime: Path) -> list[str]:
    return [
        *("-object", "memory-backend-memfd,id=memory,size=512M,share=on"),
        *("-numa", "node,memdev=memory", "-chardev", f"socket,id=fs,path={runtime}/fs"),
        *("-device", "vhost-user-fs-pci,chardev=fs,tag=host"),
    ]


def connect(runtime: Path) -> AgentClient:
    path = runtime / "agent"
    wait_for(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return AgentClient(sock)


def run(client: AgentClient, script: str, **options: object) -> str:
    process = client.spawn(["sh", "-c", script], env=PATH, **options)  # type: ignore[arg-type]
    out, err, status = process.communicate(timeout=60)
    assert status.code == 0, err
    return out.decode()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("poweroff") is None, reason="poweroff is not installed")
def test_a_machine(kernel: kernels.Kernel, runtime: Path, tmp_path: Path) -> None:
    """One boot, everything in it: a boot costs seconds."""
    (tmp_path / "host").write_text("of the host")
    with (
        share(runtime),
        running(qemu(runtime, kernel, image(kernel), *with_root(runtime))) as machine,
        contextlib.closing(connect(runtime)) as client,
    ):
        hello = client.wait_hello(90)
        assert (hello.release, hello.cpus) == (kernel.release, 2)
        assert 400 << 20 < hello.memory < 512 << 20
        assert hello.ready - hello.started < 10
        assert run_in_initramfs(client) == 127
        client.setup(ROOT)
        assert run(client, "uname -nr") == f"guest {kernel.release}\n"
        check_root(client, tmp_path)
        check_streams(client)
        check_orphans(client)
        with pytest.raises(AgentError, match="mount ext4 /dev/nothing on /mnt: No such file"):
            client.setup([Mount("ext4", "/dev/nothing", "/mnt")])
        client.spawn(["poweroff"], env=PATH)
        assert machine.wait(30) == 0
    assert "reboot: Power down" in (runtime / "console").read_text(errors="replace")


def run_in_initramfs(client: AgentClient) -> int:
    """There is no shell yet, and the error says so."""
    return client.spawn(["/bin/sh"]).wait(30).returncode


def check_root(client: AgentClient, tmp_path: Path) -> None:
    assert client.get(f"{tmp_path}/host") == b"of the host"
    client.put(f"{tmp_path}/guest", b"of the guest")
    assert run(client, f"cat {tmp_path}/guest") == "of the guest"
    assert not (tmp_path / "guest").exists()
    assert run(client, "ls -d /proc/self/fd /sys/kernel /dev/pts /dev/shm /run") != ""
    assert run(client, "cat /sys/class/net/lo/operstate /proc/1/comm") == "unknown\ninit\n"
    assert run(client, "id -un", user="nobody") == "nobody\n"
    assert run(client, "tty; stty size", tty=Tty(30, 90)) == "/dev/pts/0\r\n30 90\r\n"
    assert run(client, "ulimit -Sn; ulimit -Hn") == "1024\n524288\n"
    assert run(client, "ls /hostel 2>&1 || true").startswith("ls: cannot access")


def check_streams(client: AgentClient) -> None:
    data = os.urandom(1 << 20) * 8
    out, _, status = client.spawn(["cat"], env=PATH).communicate(data, timeout=60)
    assert status.code == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()
    processes = [client.spawn(["sh", "-c", f"exit {n}"], env=PATH) for n in range(20)]
    assert [process.wait(30).code for process in processes] == list(range(20))


def check_orphans(client: AgentClient) -> None:
    """They become the agent's children, and it reaps them."""
    run(client, "for i in 1 2 3; do (sleep 0.1 &) ; done")
    deadline = time.monotonic() + 20
    while "Z" in run(client, "ps -eo stat=") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "Z" not in run(client, "ps -eo stat=")


def test_a_host_that_comes_back(kernel: kernels.Kernel, runtime: Path) -> None:
    """The first hangs up; the second may come before the guest has noticed, and is greeted."""
    with running(qemu(runtime, kernel, image(kernel))) as machine:
        for _ in range(3):
            with contextlib.closing(connect(runtime)) as client:
                assert client.wait_hello(90).release == kernel.release
        time.sleep(0.5)
        with contextlib.closing(connect(runtime)) as client:
            assert client.ping(30) > 0
            client.shutdown(How.REBOOT)
            assert machine.wait(30) == 0


def test_a_failure_before_the_port_is_on_the_console(kernel: kernels.Kernel, runtime: Path) -> None:
    broken = initramfs.archive(agent_binary().read_bytes(), {"broken.ko": b"no module"})
    (runtime / "initrd").write_bytes(broken)
    with running(qemu(runtime, kernel, runtime / "initrd")) as machine:
        assert machine.wait(90) == 0
    console = (runtime / "console").read_text(errors="replace")
    assert "hostel-agent: load module broken.ko: Exec format error" in console
