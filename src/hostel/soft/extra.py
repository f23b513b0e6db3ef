"""Whether the packages of the extra ``soft`` are there, without importing them."""

from __future__ import annotations

from hostel.errors import MissingTool

PINNED = "2.1.4"
"""The one version of unicorn whose private ground we know."""
INSTALL = "pip install 'hostel[soft]'"
COST = "no engine soft, no hostel lab"


def unicorn_version() -> str:
    """Of the unicorn that is installed; ``MissingTool`` if there is none, or another."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("unicorn")
        version("iced-x86")
    except PackageNotFoundError as error:
        raise MissingTool(f"no {error.name} for this Python", cost=COST, cure=INSTALL) from None
    if found != PINNED:
        raise MissingTool(f"unicorn {found} is not {PINNED}", cost=COST, cure=INSTALL)
    return found
