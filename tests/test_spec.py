"""What a machine's description may be, from keywords."""

from __future__ import annotations

from typing import Any

import pytest

from hostel import Machine, SpecError, Volume


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nics": ["nat"]}, "nics must hold Nic values, not 'nat'"),
        ({"volumes": ["/a:/b"]}, "volumes must hold Volume values, not '/a:/b'"),
        ({"disks": [5]}, "disks must hold Disk values, not 5"),
        ({"publish": [80]}, "publish must hold Publish values, not 80"),
        ({"tmpfs": [b"/x"]}, "tmpfs must hold str values"),
        ({"volumes": [Volume(source="/etc", target="/proc")]}, "nothing can be mounted over"),
        ({"tmpfs": ["/dev/"]}, "the guest's /dev; no program would work in it"),
        ({"tmpfs": ["/"]}, "nothing can be mounted over the guest's root"),
    ],
)
def test_parts_of_another_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Machine(**fields)
