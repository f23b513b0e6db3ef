"""A NIC's rates, kept by the host's kernel: for engines that have no limiter of their own.

::

    guest ─► tap ─► prerouting ──┐                    over the limit: dropped
                                 ├─ the same buckets
    guest ◄─ tap ◄─ postrouting ─┘

One table of the bridge family for each tap, of its name. Named limits (nft(8), STATEFUL OBJECTS) are shared
by both directions, as ``Limits`` says; tc's policers and shapers know one direction each. What exceeds is
lost and not late: a sender that heeds losses, as TCP does, settles below the rate.

A frame here may be a segment of up to 64 KiB that nobody has cut yet: one operation, as in our own plane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from . import kernel
from .rules import chain
from .state import State

LARGEST = (1 << 16) + 14
"""Bytes of a frame that is still to be cut. A bucket that never holds as many would never let it pass."""
MOST_BYTES, MOST_FRAMES = 9_000_000_000, 1_000_000_000
"""A second. The kernel counts bucket and rate in nanoseconds, in 64 bits; no tap is as fast."""
MOST_BURST = (1 << 32) - 1


def hold(state: State, tap: str, limits: dict[str, Any]) -> None:
    """From now on, and until ``release``."""
    state.note("table", f"bridge:{tap}")
    kernel.nft(render(tap, limits))


def release(state: State, tap: str) -> None:
    """For any tap, limited or not."""
    if state.has("table", f"bridge:{tap}"):
        kernel.nft(_without(tap))
        state.forget("table", f"bridge:{tap}")


def render(tap: str, limits: dict[str, Any]) -> str:
    """The table; what was there before goes in the same transaction."""
    objects = dict(_objects(limits))
    return "\n".join(
        (
            _without(tap) + f"table bridge {tap} {{",
            *(f"limit {name} {{ {rate} }}" for name, rate in objects.items()),
            *_chain("prerouting", f'iifname "{tap}"', objects),
            *_chain("postrouting", f'oifname "{tap}"', objects),
            "}\n",
        )
    )


def _chain(hook: str, frames: str, objects: Iterable[str]) -> Iterator[str]:
    rules = (f"{frames} limit name {name} drop" for name in objects)
    return chain(f"at_{hook}", f"type filter hook {hook} priority filter;", rules)


def _without(tap: str) -> str:
    """Naming a table first makes sure that there is one to delete."""
    return f"table bridge {tap}\ndelete table bridge {tap}\n"


def _objects(limits: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if rate := limits.get("bytes"):
        per_second = min(rate["per_second"], MOST_BYTES)
        bucket = max(rate["burst"] or per_second, LARGEST)
        # of bytes the kernel's bucket holds what a second brings, and the burst besides (nft_limit.c)
        burst = min(max(bucket - per_second, 0), MOST_BURST)
        extra = f" burst {burst} bytes" if burst else ""
        yield "octets", f"rate over {per_second} bytes/second{extra}"
    if rate := limits.get("operations"):
        per_second = min(rate["per_second"], MOST_FRAMES)
        burst = min(rate["burst"] or per_second, MOST_BURST)
        yield "frames", f"rate over {per_second}/second burst {burst} packets"
