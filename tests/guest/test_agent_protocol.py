"""The protocol's fields and numbers, and peers that break it: a hostile guest, a hostile host."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostel.guest.protocol as p
from hostel.errors import AgentError, HostelError, MachineStopped, MachineTimeout, SpecError
from hostel.guest.client import AgentClient, ExitStatus
from hostel.guest.process import GuestProcess
from hostel.guest.protocol import HEADER, WINDOW, Channel, ExitKind, Reader, Type, Writer

TEXT = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(TEXT, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1))
def test_fields_come_back(text: str, small: int, large: int, signed: int) -> None:
    fields = Reader(Writer().string(text).u32(small).u64(large).i64(signed).data)
    assert (fields.string(), fields.u32(), fields.u64(), fields.i64()) == (
        text,
        small,
        large,
        signed,
    )
    fields.end()


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    fields = Reader(data)
    try:
        fields.u32()
        text = fields.string()
        fields.end()
    except AgentError:
        return
    assert Writer().string(text).data == data[4:]


def test_no_nul_in_strings() -> None:
    with pytest.raises(SpecError, match="NUL"):
        Writer().string("a\0b")


def test_messages_have_a_bound() -> None:
    with pytest.raises(SpecError, match="more than the agent takes"):
        list(p.frames(Type.EXEC, 1, bytes(p.MAX_MESSAGE + 1)))


@given(st.integers(0, 3 * p.MAX_PAYLOAD))
def test_long_messages_take_several_frames(size: int) -> None:
    parts = list(p.frames(Type.EXEC, 7, bytes(size)))
    headers = [HEADER.unpack(header) for header, _ in parts]
    assert sum(len(part) for _, part in parts) == size
    assert [length for length, *_ in headers] == [len(part) for _, part in parts]
    assert [flags for *_, flags in headers] == [1] * (len(parts) - 1) + [0]


def test_c_header_has_every_number(tmp_path: Path) -> None:
    """Compiled, not compared as text: what C makes of it is what counts."""
    names = re.findall(r"#define (\w+) (?!\")", p.c_header())
    lines = "".join(f'printf("{name} %lld\\n", (long long){name});' for name in names)
    source, program = tmp_path / "x.c", tmp_path / "x"
    source.write_text(
        f"#include <stdint.h>\n#include <stdio.h>\n{p.c_header()}\nint main(void) {{ {lines} }}"
    )
    subprocess.run(["cc", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    values = {name: int(value) for name, value in map(str.split, output.splitlines())}
    assert values["TYPE_EXIT"] == Type.EXIT
    assert values["STEP_ROOT"] == p.StepOp.ROOT
    assert values["KEEP"] == p.KEEP
    assert values["KEEP_TIME"] == p.KEEP_TIME
    assert values["HEADER_SIZE"] == HEADER.size == 12
    assert len(values) == len(names) >= 50


# A hostile guest


@pytest.fixture
def pair() -> Iterator[tuple[AgentClient, socket.socket]]:
    ours, theirs = socket.socketpair()
    client = AgentClient(ours)
    yield client, theirs
    theirs.close()
    client.close()


Pair = tuple[AgentClient, socket.socket]


def frame(type: int, stream: int, payload: bytes = b"", channel: int = 0, flags: int = 0) -> bytes:
    return HEADER.pack(len(payload), stream, type, channel, flags) + payload


def exit_frame(stream: int, kind: int, value: int, step: str = "", text: str = "") -> bytes:
    return frame(Type.EXIT, stream, bytes(Writer().u32(kind, value).string(step).string(text).data))


BROKEN = {
    "a length beyond the limit": struct.pack("<IIBBH", 1 << 31, 1, Type.DATA, 1, 0),
    "an unknown type": frame(99, 1),
    "a type that only hosts send": frame(Type.EXEC, 1),
    "flags": frame(Type.DATA, 1, b"x", 1, flags=1),
    "text from a console": b"[    0.000000] Linux version 6.1.0\r\n" * 10,
    "a hello without its fields": frame(Type.HELLO, 0, b"\1\0\0\0"),
    "a hello of another version": frame(Type.HELLO, 0, struct.pack("<I", 999) + bytes(64)),
    "output on the control stream": frame(Type.DATA, 0, b"x", 1),
    "output on channel 0": frame(Type.DATA, 1, b"x", 0),
    "output on channel 7": frame(Type.DATA, 1, b"x", 7),
    "the end of channel 7": frame(Type.EOF, 1, b"", 7),
    "output after its end": frame(Type.EOF, 1, b"", 1) + frame(Type.DATA, 1, b"x", 1),
    "more output than the window": frame(Type.DATA, 1, bytes(65536), 1) * (WINDOW // 65536 + 1),
    "credit that nobody used": frame(Type.CREDIT, 1, struct.pack("<I", 1)),
    "credit without its number": frame(Type.CREDIT, 1, b"\1"),
    "hello on a stream": frame(Type.HELLO, 1),
    "a pong that nobody asked for, again and again": frame(Type.PONG, 0, b"x") * 100
    + b"".join(frame(Type.PONG, 0, b"%d" % n) for n in range(100)),
}


@pytest.mark.parametrize("garbage", BROKEN.values(), ids=BROKEN.keys())
def test_garbage_is_an_agent_error(pair: Pair, garbage: bytes) -> None:
    """For everyone who waits, and for all who come later."""
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(garbage)
    with pytest.raises(AgentError):
        process.wait(10)
    with pytest.raises(AgentError):
        client.wait_hello(10)
    with pytest.raises(AgentError):
        client.spawn(["true"])


def test_frames_of_unknown_streams_are_ignored(pair: Pair) -> None:
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(frame(Type.DATA, 4711, b"x", 1) + exit_frame(4711, 0, 0) + exit_frame(1, 0, 3))
    assert process.wait(10) == ExitStatus(code=3)


@pytest.mark.parametrize(
    "payload", [b"", b"\0" * 7, bytes(Writer().u32(9, 9).string("").string("").data)]
)
def test_malformed_exit(pair: Pair, payload: bytes) -> None:
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(frame(Type.EXIT, 1, payload))
    with pytest.raises(AgentError):
        process.wait(10)


def test_codes_stay_in_their_range(pair: Pair) -> None:
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(exit_frame(1, ExitKind.CODE, 0xFFFF_FF07))
    assert process.wait(10).returncode == 7


def test_the_end_of_the_machine(pair: Pair) -> None:
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(frame(Type.DATA, 1, b"last words", 1) + frame(Type.DATA, 1, b"x", 1)[:5])
    assert process.read() == ("stdout", b"last words")
    guest.close()
    for action in (process.read, process.wait, client.wait_hello, client.ping):
        with pytest.raises(MachineStopped):
            action()


def test_silence_is_a_time_out(pair: Pair) -> None:
    client, _ = pair
    with pytest.raises(MachineTimeout, match=r"0\.05 s"):
        client.wait_hello(0.05)
    with pytest.raises(MachineTimeout):
        client.setup([], timeout=0.05)


def test_a_guest_that_does_not_read_blocks_no_signal(pair: Pair) -> None:
    """Writers wait for the guest; whoever sends a signal or a size does not."""
    client, _ = pair
    stuck = [client.spawn(["cat"]) for _ in range(8)]
    feeders = [threading.Thread(target=feed, args=(process,)) for process in stuck]
    for feeder in feeders:
        feeder.start()
    time.sleep(0.2)
    start = time.monotonic()
    stuck[0].signal(2)
    stuck[0].resize(10, 10)
    assert time.monotonic() - start < 1
    client.close()
    for feeder in feeders:
        feeder.join(10)
        assert not feeder.is_alive()


def feed(process: GuestProcess) -> None:
    with pytest.raises(MachineStopped):
        process.write(bytes(16 << 20))


def test_bytes_one_by_one_cost_no_object_each(pair: Pair) -> None:
    client, guest = pair
    process = client.spawn(["true"])
    guest.sendall(frame(Type.DATA, 1, b"x", 1) * 100_000 + frame(Type.EOF, 1, b"", 1))
    guest.sendall(frame(Type.EOF, 1, b"", 2) + exit_frame(1, 0, 0))
    assert process.wait(10).code == 0
    assert len(process._outputs[Channel.STDOUT].pieces) < 100
    assert sum(len(piece[1]) for piece in iter(process.read, None)) == 100_000


QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ANY_FRAME = st.builds(
    frame,
    st.integers(0, 15),
    st.integers(0, 2),
    st.binary(max_size=80),
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 1]),
)


@QUIET
@given(st.lists(st.one_of(ANY_FRAME, st.binary(max_size=30)), max_size=20))
def test_any_guest_gives_an_answer_or_an_error(messages: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    client = AgentClient(ours)
    try:
        process = client.spawn(["true"])
        theirs.sendall(b"".join(messages))
        theirs.close()
        for action in (process.read, lambda: process.wait(10), lambda: client.wait_hello(10)):
            outcome: Any
            try:
                outcome = action()
            except HostelError as error:
                outcome = error
            assert not isinstance(outcome, MachineTimeout)
    finally:
        client.close()


# A hostile host

Starter = Callable[..., AbstractContextManager[Any]]


@QUIET
@given(messages=st.lists(ANY_FRAME, max_size=30))
def test_any_host_leaves_the_agent_alive(start_agent: Starter, messages: list[bytes]) -> None:
    """Well-framed nonsense is refused or ignored: the agent still answers. (A shutdown would end it.)"""
    sent = [message for message in messages if message[8] != Type.SHUTDOWN]
    with start_agent() as agent:
        agent.socket.settimeout(10)
        agent.socket.sendall(b"".join(sent) + frame(Type.PING, 0, b"the last"))
        for type, payload in received(agent.socket):
            if (type, payload) == (Type.PONG, b"the last"):
                return
    pytest.fail("the agent ended")


def received(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    while header := sock.recv(HEADER.size, socket.MSG_WAITALL):
        length, _, type, _, _ = HEADER.unpack(header)
        yield type, sock.recv(length, socket.MSG_WAITALL) if length else b""


@pytest.mark.parametrize("garbage", [b"\xff" * 12, os.urandom(1 << 20)])
def test_a_host_out_of_step_ends_the_agent(start_agent: Starter, garbage: bytes) -> None:
    with start_agent() as agent:
        with contextlib.suppress(OSError):  # it may end before it has read all
            agent.socket.sendall(garbage)
        agent.socket.shutdown(socket.SHUT_WR)
        assert agent.process.wait(10) in (0, 1)


def test_half_a_frame_waits_for_the_rest(start_agent: Starter) -> None:
    with start_agent() as agent:
        for byte in frame(Type.PING, 0, b"token"):
            agent.socket.sendall(bytes([byte]))
        answer = frame(Type.PONG, 0, b"token")
        assert agent.socket.recv(len(answer), socket.MSG_WAITALL) == answer


def test_a_new_host_inherits_no_streams(start_agent: Starter) -> None:
    """It numbers its own from 1 again; the commands of the one before got a hang-up."""
    with start_agent() as agent:
        words = bytes(Writer().u32(0, 0, 0).string("").u32(0, 0, 0).string("/").data)
        words += bytes(Writer().strings(["/bin/sleep", "60"]).strings([]).data)
        agent.socket.sendall(frame(Type.EXEC, 1, words))
        client = AgentClient(agent.socket)
        assert client.wait_hello(10).cpus > 0
        assert client.spawn(["/bin/true"]).wait(10).code == 0
        client.close()


def test_a_long_request_comes_in_parts(client: AgentClient) -> None:
    words = ["x" * 50_000] * 20
    process = client.spawn(["sh", "-c", "echo $#", "sh", *words], env={"PATH": "/bin"})
    assert process.read() == ("stdout", b"20\n")


def test_killed_agent(start_agent: Starter) -> None:
    with start_agent() as agent:
        client = AgentClient(agent.socket)
        process = client.spawn(["sleep", "1"], env={"PATH": "/bin"})
        client.wait_hello(10)
        agent.process.kill()
        with pytest.raises(MachineStopped):
            process.wait(10)
        client.close()
