"""Kernels made at test time: tiny ones that say what they were handed, and files that claim to be some.

Each tiny kernel (``kernel_*.c``) prints on port 0xe9, one fact a line, and ends by a write to port 0xf4.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from pathlib import Path

from hostel.abi import boot as abi

HERE = Path(__file__).parent
_FLAGS = (
    *(
        "-O1",
        "-ffreestanding",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-fno-pic",
        "-mgeneral-regs-only",
    ),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    "-Wl,-n,--build-id=none,-z,noexecstack,--no-warn-rwx-segments",
)


@functools.cache
def compile_kernel(name: str, *, bits: int, flat: bool = False) -> bytes:
    """``kernel_<name>.c`` as an ELF file, or as the bytes that are loaded and nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        elf = Path(directory) / "kernel"
        define = ("-DFLAT",) if flat else ()
        script = ("-T", HERE / "kernel.ld", "-o", elf)
        _do("gcc", f"-m{bits}", *_FLAGS, *define, *script, HERE / f"kernel_{name}.c")
        if flat:
            _do("objcopy", "-O", "binary", elf, elf)
        return elf.read_bytes()


def _do(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr}")


def bzimage(
    payload: bytes,
    *,
    xloadflags: int = abi.XLF_KERNEL_64,
    version: int = 0x020F,
    setup_sects: int = 2,
    init_size: int = 1 << 20,
) -> bytes:
    """A bzImage whose protected-mode code is a pad of 1 KiB and ``payload``."""
    code = bytes(1024) + payload
    code += bytes(-len(code) % 16)
    header = abi.SetupHeader(
        setup_sects=setup_sects,
        syssize=len(code) // 16,
        boot_flag=abi.BOOT_FLAG,
        jump=0xEB | 0x6A << 8,
        header=abi.HEADER_MAGIC,
        version=version,
        loadflags=abi.LOADED_HIGH,
        initrd_addr_max=0x7FFF_FFFF,
        kernel_alignment=2 << 20,
        relocatable_kernel=1,
        xloadflags=xloadflags,
        cmdline_size=2047,
        payload_offset=1024,
        payload_length=len(payload),
        pref_address=16 << 20,
        init_size=init_size,
    )
    setup = bytes(abi.SETUP_HEADER_OFFSET) + bytes(header)
    return setup.ljust((setup_sects + 1) * 512, b"\0") + code


def with_size(packed: bytes, plain: bytes) -> bytes:
    """As the kernel's build does: the uncompressed size behind the compressed bytes."""
    return packed + len(plain).to_bytes(4, "little")


def elf(
    *,
    machine: int = 62,
    bits: int = 64,
    entry: int = 0x10_0000,
    segments: tuple[tuple[int, int, bytes], ...] = ((0x10_0000, 0x1000, b"\xf4"),),
    kind: int = 2,
    order: str = "<",
    note: bytes = b"",
) -> bytes:
    """An ELF file of segments (address, memory size, bytes) and notes."""
    header, phdr = (64, 56) if bits == 64 else (52, 32)
    parts = [(4, 0, len(note), note)] if note else []
    parts += [(1, *segment) for segment in segments]
    at = header + phdr * len(parts)
    table, body = b"", b""
    for type, address, memsz, data in parts:
        place = (at + len(body), address, address, len(data), memsz)
        if bits == 64:
            table += struct.pack(f"{order}IIQQQQQQ", type, 7, *place, 16)
        else:
            table += struct.pack(f"{order}IIIIIIII", type, *place, 7, 16)
        body += data
    ident = b"\x7fELF" + bytes((bits // 32, 1 if order == "<" else 2, 1)) + bytes(9)
    words = "QQQ" if bits == 64 else "III"
    rest = (kind, machine, 1, entry, header, 0, 0, header, phdr, len(parts), 0, 0, 0)
    return ident + struct.pack(f"{order}HHI{words}IHHHHHH", *rest) + table + body
