"""Whether a kernel, its command line and its initrd fit into a machine: known before there is any memory.

Both engines ask here, so that a user reads the same words; a guest that finds out by itself dies without
one.
"""

from __future__ import annotations

import os
from pathlib import Path

from hostel.abi import boot as abi
from hostel.errors import ImageError, SpecError
from hostel.vmm import layout

from .image import KernelImage
from .source import Source

_PAGE = 4096
SEED_ROOM = 0x100


def check_fits(image: KernelImage, *, cmdline: str, initrd: Path | None, memory: int) -> None:
    """``memory`` in bytes. ImageError: the kernel does not; SpecError: what goes with it does not."""
    check_segments(image, memory)
    cmdline_bytes(image, cmdline)
    if initrd is not None:
        with Source.open(initrd, "initrd") as source:
            initrd_address(image, source, memory)


def check_segments(image: KernelImage, memory: int) -> None:
    for segment in image.segments:
        if not _is_ram(segment.paddr, segment.end, memory):
            raise ImageError(
                f"{image.source.name} needs memory up to {segment.end >> 20} MiB; the machine has"
                f" {memory >> 20} MiB",
                cure=f"give it more than {-(-image.end >> 20)} MiB",
            )


def cmdline_bytes(image: KernelImage, cmdline: str) -> bytes:
    """As the kernel reads it, without its NUL."""
    data = os.fsencode(cmdline)
    limit = layout.CMDLINE_MAX - SEED_ROOM
    if image.protocol == "linux":
        limit = min(limit, _linux_cmdline_limit(image))
    if b"\0" in data:
        raise SpecError("the kernel's command line contains a NUL")
    if len(data) > limit:
        raise SpecError(
            f"the kernel's command line has {len(data)} bytes; this kernel reads {limit}",
            cure="shorten what is appended to it",
        )
    return data


def initrd_address(image: KernelImage, initrd: Source, memory: int) -> int:
    """Where it goes: high, for the kernel's own early allocations go upwards from its end. A multiboot
    kernel may map no more than its first few megabytes, so its module stays near."""
    floor = address = -(-image.end // _PAGE) * _PAGE
    low_end = min(memory, layout.LOW_RAM_END)
    limit = _linux_initrd_limit(image) if image.protocol == "linux" else low_end
    if image.protocol != "multiboot":
        address = (min(low_end, limit) - initrd.size) // _PAGE * _PAGE
    if address < floor or address + initrd.size > low_end:
        raise SpecError(
            f"the initrd {initrd.name} has {initrd.size >> 20} MiB, and beside the kernel there is no"
            f" room for it in {memory >> 20} MiB",
            cure="give the machine more memory",
        )
    return address


def _is_ram(start: int, end: int, memory: int) -> bool:
    high_end = layout.HIGH_RAM_START + memory - layout.LOW_RAM_END
    return (
        end <= min(memory, layout.LOW_RAM_END) or layout.HIGH_RAM_START <= start <= end <= high_end
    )


def _linux_cmdline_limit(image: KernelImage) -> int:
    return image.header.cmdline_size if image.header else abi.DEFAULT_CMDLINE_SIZE


def _linux_initrd_limit(image: KernelImage) -> int:
    """The first address that an initrd must not reach."""
    top = image.header.initrd_addr_max if image.header else abi.DEFAULT_INITRD_ADDR_MAX
    return top + 1
