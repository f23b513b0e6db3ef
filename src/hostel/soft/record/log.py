"""The log of a machine: a line of what it was, a line for each answer from outside, a seal.

::

    {"format":1,"spec":{…}}                       the machine, as ``spec.encode`` has it
    [0,0,"on","5e8…",0]                           a power-on: the digest of memory
    [17,20417,"input",null,2864…]                 question 17, after 20417 instructions: there is input
    [18,20417,"typed","ls\\n",2864…]               the serial port took these bytes (as Latin-1)
    [40,91230,"off",{"kind":"debug-exit",…},77…]  how the power-on ended, and what it left
    seal 9c0f…                                    BLAKE2b of all lines above

The last number of an entry is a checksum over the turns, and over what the guest wrote to devices until then.
"""

from __future__ import annotations

import contextlib
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import msgspec

from hostel.errors import UserError

FORMAT = 1
_SEAL = b"seal "

Kind = Literal["on", "input", "typed", "clock", "idle", "mark", "off"]
"""What an answer is: see ``inputs.py``."""


class End(msgspec.Struct, frozen=True):
    """How a power-on ended, and the digests of what it left."""

    kind: str
    code: int
    detail: str
    memory: str
    vcpus: tuple[str, ...]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    question: int
    instructions: int
    """That the machine had executed."""
    kind: Kind
    value: str | int | End | None
    turns: int
    """Checksum of all turns and writes so far."""


class Header(msgspec.Struct, frozen=True):
    format: int
    spec: msgspec.Raw


class Writer:
    """``close`` seals it; a log without a seal is that of a recording that was cut off."""

    def __init__(self, path: Path, spec: bytes) -> None:
        self._path = path
        self._sum = blake2b()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise _cannot("written", path, error) from None
        self._line(msgspec.json.encode(Header(FORMAT, msgspec.Raw(spec))))

    def put(self, entry: Entry) -> None:
        self._line(msgspec.json.encode(entry))

    def close(self) -> None:
        """Idempotent."""
        if not self._file.closed:
            try:
                self._file.write(_SEAL + self._sum.hexdigest().encode() + b"\n")
                self._file.close()
            except OSError as error:
                raise self._failed(error) from None

    def _line(self, line: bytes) -> None:
        line += b"\n"
        self._sum.update(line)
        try:
            self._file.write(line)
            self._file.flush()  # a process that is killed leaves what there was
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        with contextlib.suppress(OSError):  # what is in its buffer cannot be written either
            self._file.close()
        return _cannot("written", self._path, error)


class Log(msgspec.Struct, frozen=True):
    spec: bytes
    entries: list[Entry]


def read(path: Path) -> Log:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _cannot("read", path, error) from None
    try:
        lines = data.splitlines(keepends=True)
        header = msgspec.json.decode(lines[0], type=Header)
        if header.format != FORMAT:
            raise UserError(
                f"the log {path} is of format {header.format}, this hostel's is {FORMAT}",
                cure="replay it with the hostel that recorded it",
            )
        _check_seal(path, lines)
        decode = msgspec.json.Decoder(Entry).decode
        return Log(bytes(header.spec), [decode(line) for line in lines[1:-1]])
    except (IndexError, msgspec.MsgspecError, ValueError):
        raise UserError(
            f"{path} is no log of a machine", cure="give one that hostel boot --record has written"
        ) from None


def _check_seal(path: Path, lines: list[bytes]) -> None:
    if not lines[-1].startswith(_SEAL) or not lines[-1].endswith(b"\n"):
        raise UserError(
            f"the log {path} has no end: its recording was cut off", cure="record the machine anew"
        )
    if lines[-1][len(_SEAL) : -1] != blake2b(b"".join(lines[:-1])).hexdigest().encode():
        raise UserError(
            f"the log {path} was changed after it was recorded: its seal does not fit",
            cost="a replay would be of another machine",
            cure="record the machine anew",
        )


def _cannot(do: str, path: Path, error: OSError) -> UserError:
    return UserError(f"the log {path} cannot be {do}: {error.strerror}")
