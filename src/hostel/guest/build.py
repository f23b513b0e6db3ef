"""The agent's binary: compiled on first use (``host/compiler.py``), or shipped with the package
(``guest/hostel-agent``)."""

from __future__ import annotations

from pathlib import Path

from hostel.host.compiler import compiled

from .protocol import c_header

_HERE = Path(__file__).parent
_FLAGS = (
    *("-std=gnu17", "-Os", "-static", "-s"),
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
)
_COST = "the agent that runs in the guest cannot be built"


def agent_binary() -> Path:
    """The static agent, ready to be ``/init``."""
    shipped = _HERE / "hostel-agent"
    if shipped.exists():
        return shipped
    sources = sorted((_HERE / "agent").glob("*.[ch]"))
    return compiled("agent", sources, _FLAGS, cost=_COST, headers={"protocol.h": c_header()})
