"""Where the host's programs are, and which package brings one that is missing."""

from __future__ import annotations

from hostel.errors import MissingTool

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Not in an ordinary user's PATH on Debian, and programs that we run are there."""


def find(program: str, *, package: str, cost: str, places: tuple[str, ...] = ()) -> str:
    """The path of a program: the first of ``places`` that can be run, else by PATH.

    ``MissingTool`` says what is lost without it and how to get it.
    """
    import shutil

    for candidate in (*places, program):
        found = shutil.which(candidate) or shutil.which(candidate, path=_SYSTEM_PATH)
        if found:
            return found
    raise MissingTool(
        f"{program} is not installed", cost=cost, cure=f"apt-get install {package} (as root)"
    )


def find_qemu() -> str:
    """The QEMU of this host's CPU."""
    return find("qemu-system-x86_64", package="qemu-system-x86", cost="engine qemu cannot run")
