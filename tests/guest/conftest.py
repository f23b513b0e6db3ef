"""The real agent, as an ordinary process on this host, over a socket pair."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from hostel.guest.build import agent_binary
from hostel.guest.client import AgentClient

PATH = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}


@dataclass
class Agent:
    """A running agent, and the host's end of its stream."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


AgentStarter = Callable[..., AbstractContextManager[Agent]]


@contextlib.contextmanager
def running_agent(wrapper: Sequence[str] = ()) -> Iterator[Agent]:
    ours, theirs = socket.socketpair()
    command = [*wrapper, str(agent_binary()), "--fd", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    theirs.close()
    try:
        yield Agent(process, ours)
    finally:
        ours.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as started:
        yield started


@pytest.fixture
def client(agent: Agent) -> Iterator[AgentClient]:
    client = AgentClient(agent.socket)
    client.wait_hello(10)
    yield client
    client.close()


@pytest.fixture
def start_agent() -> AgentStarter:
    return running_agent
