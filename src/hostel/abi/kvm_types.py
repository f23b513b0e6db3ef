"""How a C structure is written here: as annotations of a class marked ``layout``.

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
