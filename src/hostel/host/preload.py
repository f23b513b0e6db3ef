"""``openat.c``: what virtiofsd needs preloaded to serve an ordinary user's machine."""

from __future__ import annotations

from pathlib import Path

from .compiler import compiled

_SOURCE = Path(__file__).with_name("openat.c")
_FLAGS = ("-shared", "-fPIC", "-Os", "-nostdlib", "-s")
_COST = "in a machine of an ordinary user no file of others can be read, not even a program"


def library() -> Path:
    """The shared object. It is linked with nothing, and so takes the libc that is there."""
    return compiled("openat.so", [_SOURCE], _FLAGS, cost=_COST)
