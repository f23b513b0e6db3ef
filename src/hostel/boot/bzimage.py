"""bzImage: its setup header, and the two ways into it (Linux Documentation/arch/x86/boot.rst).

::

    0          0x1f1                (setup_sects + 1) × 512            + syssize × 16
    ├──────────┬ setup header ──────┬ protected-mode code ─────────────┤ (a signature may follow)
    │ real-mode setup, not used     │ startup_64 at +0x200 │ payload   │
"""

from __future__ import annotations

import ctypes

import msgspec

from hostel.abi import boot as abi
from hostel.errors import ImageError

from .elf import Segment
from .source import Source

HEAD = abi.SETUP_HEADER_OFFSET + ctypes.sizeof(abi.SetupHeader)
ONLY_32_BIT = "{name} is a 32-bit kernel (i386); this machine enters Linux in 64-bit mode"

_JUMP_END = 0x202
"""The header's length is the byte at 0x201, counted from here ("the end of setup_header")."""
_MAX_INIT_SIZE = 1 << 30


class BzImage(msgspec.Struct, frozen=True):
    header: abi.SetupHeader
    code_offset: int
    code_size: int
    payload_offset: int
    """In the file. Nothing is known of a payload if its size is 0."""
    payload_size: int


def is_bzimage(head: bytes) -> bool:
    return (
        len(head) >= _JUMP_END + 6
        and head[0x1FE:0x200] == abi.BOOT_FLAG.to_bytes(2, "little")
        and head[0x202:0x206] == abi.HEADER_MAGIC.to_bytes(4, "little")
    )


def parse(source: Source) -> BzImage:
    """``ImageError`` if it is truncated or has no way in 64-bit mode."""
    header = read_header(source)
    version = header.version
    if version >= abi.VERSION_XLOADFLAGS and not header.xloadflags & abi.XLF_KERNEL_64:
        raise ImageError(ONLY_32_BIT.format(name=source.name), cure="take a kernel for x86-64")
    if version < abi.VERSION_PAYLOAD:
        raise ImageError(
            f"{source.name} speaks boot protocol {version >> 8}.{version & 255:02}, which is too old",
            cure="2.08 (Linux 2.6.26) is the least",
        )
    code_offset = ((header.setup_sects or abi.DEFAULT_SETUP_SECTS) + 1) * abi.SECTOR
    code_size = header.syssize * 16
    if code_offset + code_size > source.size + 15 or code_size == 0:
        raise ImageError(
            f"{source.name} is a truncated bzImage: {source.size} bytes of {code_offset + code_size}"
        )
    code_size = min(code_size, source.size - code_offset)
    if header.payload_offset + header.payload_length > code_size:
        raise ImageError(f"{source.name} is a truncated bzImage: its payload leads past its end")
    return BzImage(
        header, code_offset, code_size, code_offset + header.payload_offset, header.payload_length
    )


def read_header(source: Source) -> abi.SetupHeader:
    """Only as long as this kernel's protocol has it: what lies behind is code."""
    head = source.head(HEAD)
    end = _JUMP_END + head[0x201]
    if source.size < end:
        raise ImageError(f"{source.name} is a truncated bzImage: {source.size} bytes")
    return abi.SetupHeader.from_buffer_copy(
        head[abi.SETUP_HEADER_OFFSET : end].ljust(ctypes.sizeof(abi.SetupHeader), b"\0")
    )


def segment(source: Source, image: BzImage) -> Segment:
    """The protected-mode code, to be entered as it is: the guest unpacks it, in ``init_size`` bytes."""
    header = image.header
    if header.version < abi.VERSION_XLOADFLAGS:
        raise ImageError(
            f"{source.name}: nothing says that it has a 64-bit entry, and its payload is unknown"
        )
    if header.init_size > _MAX_INIT_SIZE:
        raise ImageError(f"{source.name}: its header asks for {header.init_size} bytes of memory")
    address = header.pref_address
    size = max(image.code_size, header.init_size)
    if address < 1 << 20 or address + size > 1 << 32:
        raise ImageError(f"{source.name}: its header asks for the absurd address {address:#x}")
    return Segment(address, size, image.code_offset, image.code_size, address)
