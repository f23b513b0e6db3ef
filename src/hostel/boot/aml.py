"""AML: the bytecode of ACPI tables, as far as a machine's description needs it (ACPI 6.4 §20, §19.6).

Every function returns bytes, and terms nest by being passed on::

    scope("\\_SB_", device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(irq(4)))))
"""

from __future__ import annotations

import re
import struct

_ZERO_OP, _ONE_OP = b"\x00", b"\x01"
_NAME_OP, _SCOPE_OP, _BUFFER_OP, _PACKAGE_OP = b"\x08", b"\x10", b"\x11", b"\x12"
_DEVICE_OP = b"\x5b\x82"
_INTEGERS = (
    (0x100, b"\x0a", 1),
    (0x1_0000, b"\x0b", 2),
    (1 << 32, b"\x0c", 4),
    (1 << 64, b"\x0e", 8),
)
_NAME_SEG = r"[A-Z_][A-Z0-9_]{3}"


def name_seg(text: str) -> bytes:
    """One name of four characters (§20.2.2)."""
    if not re.fullmatch(_NAME_SEG, text):
        raise ValueError(f"not an AML name: {text!r}")
    return text.encode()


def integer(value: int) -> bytes:
    """In its shortest form (§20.2.3)."""
    if value < 2:
        return _ONE_OP if value else _ZERO_OP
    for limit, prefix, size in _INTEGERS:
        if value < limit:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"not a 64-bit integer: {value:#x}")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """``PNP0501`` as the number that EISAID makes of it (§19.3.4): three letters of 5 bits, 4 hex digits."""
    letters = sum(
        (ord(letter) - 0x40) << shift for letter, shift in zip(text, (10, 5, 0), strict=False)
    )
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def package(*elements: bytes) -> bytes:
    return _PACKAGE_OP + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return _BUFFER_OP + _with_length(integer(len(data)) + data)


def name(seg: str, value: bytes) -> bytes:
    return _NAME_OP + name_seg(seg) + value


def scope(seg: str, *terms: bytes) -> bytes:
    """A scope of the root, such as ``_SB_``."""
    return _SCOPE_OP + _with_length(b"\\" + name_seg(seg) + b"".join(terms))


def device(seg: str, *terms: bytes) -> bytes:
    return _DEVICE_OP + _with_length(name_seg(seg) + b"".join(terms))


def _with_length(body: bytes) -> bytes:
    """PkgLength counts itself (§20.2.4): one byte up to 63, else 4 bits and one to three bytes more."""
    if len(body) < 0x3F:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << (4 + 8 * more):
            return (
                bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little") + body
            )
    raise ValueError(f"{len(body)} bytes are too long for an AML package")


# --- resource descriptors (§6.4) ----------------------------------------------------------------------

_END_TAG = b"\x79\0"
"""A checksum of 0 means: do not check."""
_MEMORY_RANGE, _IO_RANGE, _BUS_RANGE = 0, 1, 2
_MIN_MAX_FIXED = 0x0C
_READ_WRITE = 1
_ENTIRE_RANGE = 3
"""Every port, not only those that ISA cards decode (§6.4.3.5.5)."""
_TYPE_SPECIFIC = {_MEMORY_RANGE: _READ_WRITE, _IO_RANGE: _ENTIRE_RANGE, _BUS_RANGE: 0}


def resources(*descriptors: bytes) -> bytes:
    """A ResourceTemplate."""
    return buffer(b"".join(descriptors) + _END_TAG)


def io(port: int, size: int) -> bytes:
    """§6.4.2.5, 16-bit decode, fixed."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq(number: int) -> bytes:
    """§6.4.2.1, without flags: edge, active high, exclusive, as on ISA."""
    return struct.pack("<BH", 0x22, 1 << number)


def edge_interrupt(gsi: int) -> bytes:
    """§6.4.3.6: a consumer, edge, active high, exclusive; any GSI."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


def memory32(address: int, size: int) -> bytes:
    """§6.4.3.4, fixed, read and write."""
    return struct.pack("<BHBII", 0x86, 9, _READ_WRITE, address, size)


def bus_window(first: int, last: int) -> bytes:
    """§6.4.3.5.3: the buses behind a bridge."""
    return _window("H", _BUS_RANGE, first, last)


def io_window(first: int, last: int) -> bytes:
    """§6.4.3.5.3: the ports that a bridge passes on."""
    return _window("H", _IO_RANGE, first, last)


def memory_window32(first: int, last: int) -> bytes:
    """§6.4.3.5.2: what a bridge passes on; not cacheable."""
    return _window("I", _MEMORY_RANGE, first, last)


def memory_window64(first: int, last: int) -> bytes:
    """§6.4.3.5.1."""
    return _window("Q", _MEMORY_RANGE, first, last)


_WINDOW_TAGS = {"H": (0x88, 13), "I": (0x87, 23), "Q": (0x8A, 43)}
"""By the size of the numbers: tag and length of a word, dword or qword address space descriptor."""


def _window(number: str, kind: int, first: int, last: int) -> bytes:
    tag, length = _WINDOW_TAGS[number]
    head = struct.pack("<BHBBB", tag, length, kind, _MIN_MAX_FIXED, _TYPE_SPECIFIC[kind])
    return head + struct.pack(f"<5{number}", 0, first, last, 0, last - first + 1)
