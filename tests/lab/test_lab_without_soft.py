from __future__ import annotations

import importlib.metadata

import pytest

from hostel import lab
from hostel.errors import MissingTool


@pytest.mark.parametrize("name", lab.LABS)
def test_without_the_extra_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any import of a lab, which would be a traceback."""

    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingTool, match=r"no unicorn.*pip install 'hostel\[soft\]'"):
        lab.run(name)
