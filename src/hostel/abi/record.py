"""``Record``: a packed little-endian C structure, as one line of Python.

For structures that lie in guest memory, in a config space or on a socket, and are packed and unpacked
all the time. (KVM's structures, which are filled field by field, are ctypes: see ``kvm.py``.)
"""

from __future__ import annotations

import struct


class Record:
    """``Record("virtq_desc", addr="Q", len="I", flags="H", next="H")``: C name, then the fields.

    A field's code is that of ``struct``; there is no padding but what is written. The ABI tests
    compare ``size`` and ``offsets`` with the C structure of this name.
    """

    def __init__(self, c_name: str, /, **fields: str) -> None:
        packer = struct.Struct("<" + "".join(fields.values()))
        self.c_name = c_name
        self.size = packer.size
        self.offsets: dict[str, int] = {}
        offset = 0
        for name, code in fields.items():
            self.offsets[name] = offset
            offset += struct.calcsize("<" + code)
        self.pack = packer.pack
        self.pack_into = packer.pack_into
        self.unpack = packer.unpack
        self.unpack_from = packer.unpack_from
