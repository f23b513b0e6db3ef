"""The agent's protocol: frames over one byte stream, and the numbers both sides share.

Written once, here. The C side is compiled against ``c_header()``, so the two cannot differ. The page
for people is ``docs/agent.md``.

::

    u32 length | u32 stream | u8 type | u8 channel | u16 flags | payload (length bytes, ≤ 64 KiB)

Little endian. A payload is a row of fields in a fixed order: ``u32``, ``u64`` (also signed), and
``string``: u32 length, the bytes, one NUL (so that C uses it in place). A list is a u32 count and its
elements. A request that does not fit one frame goes on in the next frames, all but the last with
``Flag.MORE``; nothing else comes between.

The host greets with HELLO, and the agent's HELLO answers it; requests may follow at once.

The host numbers the streams. A request (EXEC, SETUP, PACK, UNPACK) opens one. EXIT says how it went, EOF
that an output channel is complete; with EXIT and both EOFs, in any order, the stream is over.

Each channel has a window of ``WINDOW`` bytes that its receiver refills with CREDIT: neither side ever
holds more than that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag

from hostel.errors import AgentError, SpecError

Buffer = bytes | bytearray | memoryview

VERSION = 1
PORT_NAME = "hostel.agent"
HEADER = struct.Struct("<IIBBH")
MAX_PAYLOAD = 64 << 10
MAX_MESSAGE = 4 << 20
WINDOW = 512 << 10

MODULE_DIRECTORY = "/hostel/modules"
MODULE_LIST = "/hostel/modules/list"
"""Where the initramfs carries the kernel modules, and their names in the order of loading."""


class Type(IntEnum):
    HELLO = 1  # host → agent: greets, with its version; agent → host: what the guest is
    EXEC = 2  # host → agent: run a command
    SETUP = 3  # host → agent: mounts and the like, in order
    PACK = 4  # host → agent: send a file or tree (channel STDOUT)
    UNPACK = 5  # host → agent: make files from what comes on channel STDIN
    DATA = 6  # both
    EOF = 7  # both: no more comes on a channel, or nobody reads it any longer
    CREDIT = 8  # both: u32, so many bytes of a channel have been consumed
    RESIZE = 9  # host → agent: rows, columns
    SIGNAL = 10  # host → agent: number, to the command's process group
    EXIT = 11  # agent → host: how the request ended
    SHUTDOWN = 12  # host → agent, stream 0
    PING = 13  # host → agent, stream 0
    PONG = 14  # agent → host: the same payload


class Channel(IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2


class Flag(IntFlag):
    MORE = 1


class ExecFlag(IntFlag):
    TTY = 1
    STDIN = 2  # otherwise /dev/null
    LOGIN_ENV = 4  # HOME, USER, LOGNAME and SHELL from the guest's passwd, where env lacks them


class StepOp(IntEnum):
    MOUNT = 1
    MKDIR = 2
    TOUCH = 3
    SYMLINK = 4
    DEVICE = 5
    WRITE = 6
    HOSTNAME = 7
    WAIT = 8
    ROOT = 9
    REMOVE = 10
    LINK = 11
    DHCP = 12


class ExitKind(IntEnum):
    CODE = 0
    SIGNAL = 1
    FAILED = 2  # value is an errno; with the step that failed and a text


class How(IntEnum):
    POWEROFF = 0
    REBOOT = 1


class EntryKind(IntEnum):
    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    OTHER = 3  # a device, fifo or socket: listed, never copied
    LEAVE = 4  # a directory once more, after what is in it: its final mode and time
    END = 5


class PackFlag(IntFlag):
    NO_DATA = 1  # a listing
    SHALLOW = 2  # a directory's own entries, not what lies below those


KEEP = 0xFFFF_FFFF
"""As a uid, gid or mode of an entry: leave it as it comes."""
KEEP_TIME = -(1 << 63)


def c_header() -> str:
    """The same numbers for C."""
    lines = [
        "/* Generated from protocol.py. */",
        f"#define VERSION {VERSION}",
        f'#define PORT_NAME "{PORT_NAME}"',
        f"#define HEADER_SIZE {HEADER.size}",
        f"#define MAX_PAYLOAD {MAX_PAYLOAD}",
        f"#define MAX_MESSAGE {MAX_MESSAGE}",
        f"#define WINDOW {WINDOW}",
        f"#define KEEP {KEEP}u",
        "#define KEEP_TIME INT64_MIN",
        f'#define MODULE_DIRECTORY "{MODULE_DIRECTORY}"',
        f'#define MODULE_LIST "{MODULE_LIST}"',
    ]
    prefixes: dict[str, type[IntEnum]] = {
        "TYPE": Type,
        "CHANNEL": Channel,
        "FLAG": Flag,  # type: ignore[dict-item]
        "EXEC": ExecFlag,  # type: ignore[dict-item]
        "STEP": StepOp,
        "EXIT": ExitKind,
        "HOW": How,
        "ENTRY": EntryKind,
        "PACK": PackFlag,  # type: ignore[dict-item]
    }
    for prefix, members in prefixes.items():
        lines += [f"#define {prefix}_{member.name} {member.value}" for member in members]
    return "\n".join(lines) + "\n"


class Writer:
    """Builds a payload, field by field."""

    def __init__(self) -> None:
        self.data = bytearray()

    def u32(self, *values: int) -> Writer:
        for value in values:
            self.data += struct.pack("<I", value)
        return self

    def u64(self, value: int) -> Writer:
        self.data += struct.pack("<Q", value)
        return self

    def i64(self, value: int) -> Writer:
        self.data += struct.pack("<q", value)
        return self

    def blob(self, data: bytes) -> Writer:
        self.data += struct.pack("<I", len(data)) + data + b"\0"
        return self

    def string(self, text: str) -> Writer:
        raw = text.encode(errors="surrogateescape")
        if b"\0" in raw:
            raise SpecError(f"a NUL byte cannot be passed to the guest: {text!r}")
        return self.blob(raw)

    def strings(self, texts: Sequence[str]) -> Writer:
        self.u32(len(texts))
        for text in texts:
            self.string(text)
        return self


class Reader:
    """Takes a payload apart; anything that does not fit is an ``AgentError``."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)

    def _take(self, size: int) -> memoryview:
        if size > len(self._data):
            raise AgentError("the agent sent a message that ends too early")
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def i64(self) -> int:
        return int.from_bytes(self._take(8), "little", signed=True)

    def string(self) -> str:
        size = self.u32()
        raw = bytes(self._take(size + 1))
        if raw[-1] or b"\0" in raw[:-1]:
            raise AgentError("the agent sent a malformed string")
        return raw[:-1].decode(errors="surrogateescape")

    def end(self) -> None:
        if self._data:
            raise AgentError("the agent sent a message that is too long")


def frames(
    type: Type, stream: int, payload: Buffer, channel: int = 0
) -> Iterator[tuple[bytes, memoryview]]:
    """One message as frames, each a header and its payload; only a request may need more than one."""
    view = memoryview(payload)
    if len(view) > MAX_MESSAGE:
        raise SpecError(
            f"a request of {len(view)} bytes is more than the agent takes ({MAX_MESSAGE})",
            cure="pass long arguments through standard input or a file",
        )
    for start in range(0, max(len(view), 1), MAX_PAYLOAD):
        part = view[start : start + MAX_PAYLOAD]
        flags = Flag.MORE if start + MAX_PAYLOAD < len(view) else 0
        yield HEADER.pack(len(part), stream, type, channel, flags), part
