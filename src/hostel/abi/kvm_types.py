"""How a C structure is written here, as annotations of a class marked ``layout``; and a request number.

``Annotated[int, c_uint32]`` is an ``int`` to the type checker and a ``c_uint32`` in memory; a field
of another structure is annotated with its class.
"""

import ctypes
from ctypes import c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated, Any, TypeVar

u8 = Annotated[int, c_uint8]
u16 = Annotated[int, c_uint16]
u32 = Annotated[int, c_uint32]
u64 = Annotated[int, c_uint64]
s16 = Annotated[int, c_int16]
s32 = Annotated[int, c_int32]
s64 = Annotated[int, c_int64]


_T = TypeVar("_T", bound=ctypes.Structure | ctypes.Union)


def layout(cls: type[_T]) -> type[_T]:
    """Give ctypes the fields that the annotations describe."""
    annotations: dict[str, Any] = cls.__annotations__
    cls._fields_ = [
        (name, getattr(kind, "__metadata__", (kind,))[0]) for name, kind in annotations.items()
    ]
    return cls


_Layout = type[ctypes.Structure] | type[c_uint64] | None


def _request(direction: int, number: int, layout: _Layout) -> int:
    """<asm-generic/ioctl.h>; 0xAE is KVM's letter."""
    return direction << 30 | (ctypes.sizeof(layout) if layout else 0) << 16 | 0xAE << 8 | number


def io(number: int) -> int:
    return _request(0, number, None)


def iow(number: int, layout: _Layout) -> int:
    return _request(1, number, layout)


def ior(number: int, layout: _Layout) -> int:
    return _request(2, number, layout)


def iowr(number: int, layout: _Layout) -> int:
    return _request(3, number, layout)
