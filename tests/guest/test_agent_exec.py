"""Commands through the real agent: argv, environment, streams, terminals, signals, exit codes."""

from __future__ import annotations

import hashlib
import os
import pwd
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from hostel.errors import AgentError, HostError, MachineStopped, MachineTimeout, SpecError
from hostel.guest.client import AgentClient, ExitStatus, Ids, Tty
from hostel.guest.protocol import WINDOW

PATH = {"PATH": "/usr/bin:/bin"}
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="changes user, which only root may")


def run(
    client: AgentClient, *argv: str, stdin: bytes = b"", **options: object
) -> tuple[bytes, bytes, int]:
    options.setdefault("env", PATH)
    process = client.spawn(argv, **options)  # type: ignore[arg-type]
    out, err, status = process.communicate(stdin, timeout=30)
    return out, err, status.returncode


def test_hello_says_what_the_guest_is(client: AgentClient) -> None:
    hello = client.wait_hello(5)
    assert hello.release == os.uname().release
    assert hello.machine == os.uname().machine
    assert hello.cpus >= 1
    assert hello.memory > 1 << 20
    assert 0 < hello.started <= hello.ready


def test_ping(client: AgentClient) -> None:
    assert 0 < client.ping() < 5


def test_outputs_stay_apart(client: AgentClient) -> None:
    assert run(client, "sh", "-c", "echo out; echo err >&2") == (b"out\n", b"err\n", 0)


def test_arguments_pass_exactly(client: AgentClient) -> None:
    words = ["", "a b", "*", "\n", "ü", "\udcff", "x" * 100_000]
    out, _, _ = run(client, "printf", "%s\\0", *words)
    assert out == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_environment_is_exact(client: AgentClient) -> None:
    out, _, _ = run(client, "/usr/bin/env", env={"A": "1", "B": "x=y\n"})
    assert sorted(out.decode().splitlines()) == ["", "A=1", "B=x=y"]


def test_login_environment_comes_from_passwd(client: AgentClient) -> None:
    env = {"LOGNAME": "mine"}
    out, _, _ = run(
        client, "/usr/bin/env", env=env, login_env=True, user=Ids(os.geteuid(), os.getegid())
    )
    me = pwd.getpwuid(os.geteuid())
    assert set(out.decode().splitlines()) >= {
        f"HOME={me.pw_dir}",
        f"USER={me.pw_name}",
        "LOGNAME=mine",
    }


def test_working_directory(client: AgentClient, tmp_path: Path) -> None:
    assert run(client, "pwd", cwd=str(tmp_path))[0].decode().strip() == str(tmp_path)


def test_missing_working_directory_is_named(client: AgentClient) -> None:
    with pytest.raises(AgentError, match="directory: /nowhere: No such file or directory"):
        run(client, "pwd", cwd="/nowhere")


@pytest.mark.parametrize("code", [0, 7, 255])
def test_exit_codes(client: AgentClient, code: int) -> None:
    assert run(client, "sh", "-c", f"exit {code}")[2] == code


def test_death_by_signal(client: AgentClient) -> None:
    process = client.spawn(["sh", "-c", "kill -SEGV $$"], env=PATH)
    assert process.wait(10) == ExitStatus(signal=signal.SIGSEGV)
    assert process.wait(10).returncode == 128 + signal.SIGSEGV


def test_command_not_found(client: AgentClient) -> None:
    status = client.spawn(["no-such-command"], env=PATH).wait(10)
    assert status.code == 127
    assert status.error == "no-such-command: No such file or directory"


def test_not_executable(client: AgentClient, tmp_path: Path) -> None:
    file = tmp_path / "plain"
    file.write_text("text")
    assert client.spawn([str(file)]).wait(10).code == 126
    assert client.spawn(["plain"], env={"PATH": f"{tmp_path}:/bin"}).wait(10).code == 126
    assert client.spawn([str(tmp_path)]).wait(10).code == 126


def test_standard_input_and_its_end(client: AgentClient) -> None:
    assert run(client, "cat", stdin=b"abc") == (b"abc", b"", 0)
    assert run(client, "cat", stdin=b"") == (b"", b"", 0)


def test_no_standard_input(client: AgentClient) -> None:
    process = client.spawn(["readlink", "/proc/self/fd/0"], env=PATH, stdin=False)
    assert process.read() == ("stdout", b"/dev/null\n")
    with pytest.raises(AgentError, match="no longer reads"):
        process.write(b"x")
    assert process.wait(10).code == 0


def test_command_that_closes_its_input(client: AgentClient) -> None:
    process = client.spawn(["sh", "-c", "exec <&-; echo closed; sleep 60"], env=PATH)
    assert process.read() == ("stdout", b"closed\n")
    with pytest.raises(AgentError, match="no longer reads"):
        process.write(b"x" * WINDOW * 8)
    process.signal(signal.SIGKILL)
    assert process.wait(10).signal == signal.SIGKILL


def test_nothing_of_the_agent_is_inherited(client: AgentClient) -> None:
    assert run(client, "sh", "-c", "ls /proc/$$/fd")[0].split() == [b"0", b"1", b"2"]
    # Not of a shell: dash blocks all signals for a moment while it starts a command.
    out, _, _ = run(client, "grep", "-E", "Sig(Blk|Ign)", "/proc/self/status")
    assert out.split() == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


def test_own_session(client: AgentClient) -> None:
    out, _, _ = run(client, "sh", "-c", "echo $$; ps -o sid= -p $$")
    pid, session = out.split()
    assert pid == session


@AS_ROOT
def test_users_by_number(client: AgentClient) -> None:
    script = "id -u; id -g; id -G"
    out, _, _ = run(client, "sh", "-c", script, user=Ids(1234, 2345, (7, 8)))
    assert out.split() == [b"1234", b"2345", b"2345", b"7", b"8"]
    assert run(client, "sh", "-c", script, user="4321")[0].split() == [b"4321"] * 3
    assert run(client, "sh", "-c", script, user="1:6")[0].split() == [b"1", b"6", b"6"]


@AS_ROOT
def test_users_by_name(client: AgentClient) -> None:
    nobody = pwd.getpwnam("nobody")
    out, _, _ = run(client, "sh", "-c", "id -u; id -g", user="nobody")
    assert out.split() == [b"%d" % nobody.pw_uid, b"%d" % nobody.pw_gid]
    assert run(client, "id", "-gn", user="nobody:daemon")[0] == b"daemon\n"


@pytest.mark.parametrize("user", ["no-such-user", "root:no-such-group", ":0"])
def test_unknown_users_are_named(client: AgentClient, user: str) -> None:
    with pytest.raises(AgentError, match="user: the guest has no"):
        run(client, "id", user=user)


@AS_ROOT
def test_forbidden_directory(client: AgentClient, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(AgentError, match="Permission denied"):
        run(client, "pwd", cwd=str(tmp_path), user="nobody")


def test_terminal(client: AgentClient) -> None:
    script = "tty; stty size; echo $TERM; test -t 0 && test -t 1 && test -t 2 && echo all"
    out, err, code = run(client, "sh", "-c", script, tty=Tty(33, 99))
    lines = out.decode().split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:] == ["33 99", "linux", "all", ""]
    assert (err, code) == (b"", 0)


def test_terminal_is_resized(client: AgentClient) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    process = client.spawn(["sh", "-c", script], env=PATH, tty=Tty())
    assert process.read() == ("stdout", b"ready\r\n")
    process.resize(40, 132)
    assert process.read() == ("stdout", b"40 132\r\n")
    assert process.wait(10).code == 0


def test_interrupt_by_terminal(client: AgentClient) -> None:
    process = client.spawn(["sh", "-c", "echo ready; exec sleep 60"], env=PATH, tty=Tty())
    assert process.read() == ("stdout", b"ready\r\n")
    process.write(b"\x03")
    assert process.wait(10).signal == signal.SIGINT


def test_end_of_file_on_a_terminal(client: AgentClient) -> None:
    process = client.spawn(
        ["sh", "-c", "stty -echo; echo ready; cat; echo done"], env=PATH, tty=Tty()
    )
    assert process.read() == ("stdout", b"ready\r\n")
    process.write(b"line\n")
    process.close_stdin()
    out = b""
    while (piece := process.read()) is not None:
        out += piece[1]
    assert out == b"line\r\ndone\r\n"


def test_terminal_stays_until_the_command_has_ended(client: AgentClient) -> None:
    """A command may close its terminal before it ends; that is no hang-up."""
    script = "exec <&- >&- 2>&-; sleep 0.3; echo back > /dev/tty; exit 3"
    assert run(client, "sh", "-c", script, tty=Tty()) == (b"back\r\n", b"", 3)


@pytest.mark.parametrize("text", [b"hi\n", b"hi", b""])
def test_end_of_input_on_a_terminal(client: AgentClient, text: bytes) -> None:
    """Also in the middle of a line, where one VEOF only ends the wait for the rest of it."""
    for _ in range(5):
        out, _, code = run(client, "sh", "-c", "stty -echo; cat", stdin=text, tty=Tty())
        assert (out.endswith(text.replace(b"\n", b"\r\n")), code) == (True, 0)


def test_signal_reaches_the_group(client: AgentClient) -> None:
    process = client.spawn(["sh", "-c", "sleep 60 & echo ready; wait"], env=PATH)
    assert process.read() == ("stdout", b"ready\n")
    process.signal(signal.SIGTERM)
    assert process.wait(10).signal == signal.SIGTERM


def test_signal_at_once(client: AgentClient) -> None:
    """Even before the child has a session of its own."""
    for _ in range(20):
        process = client.spawn(["sleep", "60"], env=PATH)
        process.signal(signal.SIGKILL)
        assert process.wait(10).signal == signal.SIGKILL


def test_background_process_does_not_hold_the_stream(client: AgentClient) -> None:
    start = time.monotonic()
    out, _, code = run(client, "sh", "-c", "sleep 3 & echo started")
    assert (out, code) == (b"started\n", 0)
    assert time.monotonic() - start < 2.5


def test_output_before_the_end_is_complete(client: AgentClient) -> None:
    """What was written just before exit arrives, though a background process still holds the pipe."""
    out, _, _ = run(client, "sh", "-c", "sleep 1 & head -c 200000 /dev/zero")
    assert len(out) == 200_000


def test_terminal_output_before_the_end_is_complete(client: AgentClient) -> None:
    out, _, _ = run(client, "sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x", tty=Tty())
    assert out == b"x" * 100_000


def test_hundred_megabytes_there_and_back(client: AgentClient) -> None:
    data = os.urandom(1 << 20) * 100
    out, _, status = client.spawn(["cat"], env=PATH).communicate(data, timeout=60)
    assert status.code == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_descriptors_instead_of_read_and_write(client: AgentClient, tmp_path: Path) -> None:
    source, target, errors = (tmp_path / name for name in ("in", "out", "err"))
    source.write_bytes(os.urandom(5 << 20))
    with source.open("rb") as stdin, target.open("wb") as out, errors.open("wb") as err:
        process = client.spawn(
            ["sh", "-c", "cat; echo note >&2"],
            env=PATH,
            stdin=stdin.fileno(),
            stdout=out.fileno(),
            stderr=err.fileno(),
        )
        assert process.wait(30).code == 0
    assert target.read_bytes() == source.read_bytes()
    assert errors.read_bytes() == b"note\n"


def test_reader_that_leaves_is_a_broken_pipe(client: AgentClient) -> None:
    ours, theirs = os.pipe()
    process = client.spawn(["cat", "/dev/zero"], env=PATH, stdout=theirs)
    assert os.read(ours, 1000)
    os.close(ours)
    assert process.wait(10).signal == signal.SIGPIPE
    os.close(theirs)


def test_output_that_cannot_be_written_is_said(client: AgentClient) -> None:
    with open("/dev/full", "wb") as full:
        process = client.spawn(["seq", "1", "5"], env=PATH, stdout=full.fileno())
        with pytest.raises(HostError, match=r"to standard output: No space left on device$"):
            process.wait(10)
        process = client.spawn(["ls", "/no"], env=PATH, stdout=full.fileno(), stderr=full.fileno())
        with pytest.raises(HostError, match=r"to standard error: No space left on device$"):
            process.wait(10)


def test_silent_input_does_not_outlive_the_command(client: AgentClient) -> None:
    ours, theirs = socket.socketpair()
    before = threading.active_count()
    process = client.spawn(["true"], env=PATH, stdin=ours.fileno())
    assert process.wait(10).code == 0
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    ours.close()
    theirs.close()


def test_slow_reader_bounds_what_is_held(client: AgentClient) -> None:
    """The command stops when the windows and its pipe are full; it does not fill the host's memory."""
    process = client.spawn(["sh", "-c", "head -c 50M /dev/zero; echo done >&2"], env=PATH)
    time.sleep(0.5)
    assert sum(output.size for output in process._outputs.values()) <= WINDOW
    total = 0
    while (piece := process.read()) is not None:
        total += len(piece[1])
    assert total == (50 << 20) + len("done\n")


def test_stopped_command_holds_up_nobody(client: AgentClient) -> None:
    stuck = client.spawn(["cat", "/dev/zero"], env=PATH)
    deaf = client.spawn(["sleep", "60"], env=PATH)

    def feed() -> None:
        with pytest.raises(AgentError):
            deaf.write(b"x" * (4 << 20))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert run(client, "echo", "alive")[0] == b"alive\n"
    for process in (stuck, deaf):
        process.signal(signal.SIGKILL)
        assert process.wait(10).signal == signal.SIGKILL
    feeder.join(10)
    assert not feeder.is_alive()


def test_output_can_be_read_after_the_end(client: AgentClient) -> None:
    process = client.spawn(["head", "-c", "600K", "/dev/zero"], env=PATH)
    assert process.wait(10).code == 0
    total = 0
    while (piece := process.read()) is not None:
        total += len(piece[1])
    assert total == 600 << 10


def test_many_at_once(client: AgentClient) -> None:
    processes = [
        client.spawn(["sh", "-c", f"sleep 0.2; cat; exit {n}"], env=PATH) for n in range(60)
    ]
    for number, process in enumerate(processes):
        process.write(b"%d" % number * 1000)
        process.close_stdin()
    for number, process in enumerate(processes):
        out, _, status = process.communicate(timeout=30)
        assert (out, status.code) == (b"%d" % number * 1000, number)


def test_a_string_is_no_argv(client: AgentClient) -> None:
    with pytest.raises(SpecError, match="argv must be a list of strings, not a string"):
        client.spawn("echo hi")


def test_time_out(client: AgentClient) -> None:
    process = client.spawn(["sleep", "60"], env=PATH)
    with pytest.raises(MachineTimeout):
        process.wait(0.1)
    process.signal(signal.SIGKILL)
    assert process.wait(10).signal == signal.SIGKILL


def test_commands_end_with_the_host(client: AgentClient) -> None:
    """A host that hangs up is a hang-up for its commands, and an error for its own waiters."""
    process = client.spawn(["sh", "-c", "echo $$; exec sleep 60"], env=PATH)
    answer = process.read()
    assert answer is not None
    client.close()
    with pytest.raises(MachineStopped):
        process.wait(5)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{int(answer[1])}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{int(answer[1])}").exists()
